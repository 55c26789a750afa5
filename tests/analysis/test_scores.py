"""The table of scores: each name that a step can ask for is in it, and steps tell scores what they are measured for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import tiny_model
from operations.helpers import some_tokens, subject_of

from llmsurgeon.analysis import scores as table
from llmsurgeon.analysis.score import Score, few
from llmsurgeon.analysis.scores import SCORES, compute_scores, unpadded
from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.fff import FFF
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.matmulfree import MatMulFree
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_experts import PruneExperts
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_heads import PruneHeads
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.walk.runner import LayerRunner

ASKING = [
    *(PruneAttention(count=1, score=score) for score in ("joint", "kl", "similarity")),
    *(PruneFFN(count=1, score=score) for score in ("kl", "similarity")),
    *(PruneBlocks(count=1, score=score) for score in ("rescored", "influence", "kl")),
    PruneBlocks(window=1),
    *(PruneWidth(keep=0.5, score=score) for score in ("least_squares", "activation")),
    *(PruneExperts(keep=0.5, score=score) for score in ("reap", "loss")),
    *(PruneHeads(keep=0.5, unit=unit) for unit in ("group", "head")),
    FuseFFN(),
    ParallelBlocks(),
    FFF(depth=1, leaf_width=4),
    Ternary(share=0.5),
    Ternary(sub_norm=True),
    MatMulFree(count=1),
]


def test_all_that_steps_can_ask_for_is_measured():
    needed = {name for step in ASKING for name in step.needs()}
    assert all(step.needs() for step in ASKING) and needed <= SCORES.keys()
    # What is measured beside what is asked for: widths by loss, and budgets in bytes.
    assert SCORES.keys() - needed == {"ffn_elimination_loss", "ternary_bytes"} - needed
    assert unpadded() == {"fff"}


def test_the_order_of_attentions_hears_of_runs_and_the_dependency_of_what_is_dropped(monkeypatch):
    """Each score gets what all steps say to it, in the order of the table, the earlier ones measured."""
    heard = {}

    def fake(names, values):
        def measure(scene, requests):
            heard[names[0]] = (requests, scene.tokens.numel(), dict(scene.subject.scores))
            return dict.fromkeys(names, values)

        return measure

    made = {"attention_order": [3, 2, 1], "ffn_dependency": "M"}
    few_ = {name: Score(fake([name], value), tokens=24) for name, value in made.items()}
    monkeypatch.setattr(table, "SCORES", {**SCORES, **few_})
    steps = [PruneAttention(count=2), PruneAttention(layers=(5,)), FuseFFN(max_run=3), FuseFFN(runs=((1, 2),))]
    model, tokens = tiny_model("llama"), some_tokens(batch=8, length=12)
    subject, weights, config = subject_of(model)
    found = compute_scores(steps, LayerRunner(config, weights, model.dtype), tokens, subject)
    assert found == made
    requests, count, known = heard["attention_order"]
    assert [getattr(r, "count", None) or r.max_run for r in requests] == [2, 3, 4] and count == 24 and known == {}
    requests, _, known = heard["ffn_dependency"]
    assert known == {"attention_order": [3, 2, 1]}
    gone = [r.layers(replace(subject, scores=known)) for r in requests if hasattr(r, "layers")]
    assert gone == [(2, 3), (5,)]


def test_what_does_not_fit_is_refused_before_anything_is_measured(monkeypatch):
    def measure(scene, requests):
        pytest.fail("it measured")

    monkeypatch.setattr(table, "SCORES", {name: Score(measure) for name in SCORES})
    model = tiny_model("llama")
    subject, weights, config = subject_of(model)
    runner = LayerRunner(config, weights, model.dtype)
    with pytest.raises(SurgeryError, match="more than the layer's"):
        compute_scores([PruneBlocks(count=1), FFF(depth=1, leaf_width=4096)], runner, some_tokens(), subject)


def test_few_takes_whole_sequences_spread_evenly():
    tokens = some_tokens(batch=9, length=4)
    assert few(tokens, 12).tolist() == tokens[[0, 4, 8]].tolist()
    assert few(tokens, 1).shape == (1, 4) and few(tokens, 10_000).shape == tokens.shape
