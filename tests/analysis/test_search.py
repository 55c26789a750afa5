"""The joint choice of attentions and runs against trying everything, one model at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, save_tiny, tiny_model
from operations.helpers import VARIANTS, logits, operate, some_tokens, subject_of
from walk.test_walk import CountingReads, runner_of

from llmsurgeon import analyze
from llmsurgeon.analysis.attention_order import default_count, runs_of, search_attentions, variant_without
from llmsurgeon.analysis.block_order import search_blocks
from llmsurgeon.analysis.greedy import order_of
from llmsurgeon.analysis.measure import measure
from llmsurgeon.analysis.score import few
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.recipe.recipe import load
from llmsurgeon.walk.runner import LayerRunner


def cost_of(model, parent, tokens, dropped, fuse):
    """KL(parent || model without these attentions, runs fused), on the model that the operations write."""
    runs = runs_of(frozenset(dropped), LAYERS)
    steps = [PruneAttention(layers=tuple(sorted(dropped)))]
    if fuse and runs:
        steps.append(FuseFFN(runs=runs))
    student = logits(operate(model, *steps)[0], tokens)
    at = list(range(parent.shape[1] - 1, -1, -4))
    p, q = (F.log_softmax(x[:, at].double(), -1) for x in (parent, student))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(("family_name", "changes"), [v for v in VARIANTS if v[0] in ("llama", "gpt2", "gpt_neox")])
def test_greedy_over_everything(family_name, changes, fuse):
    """Every allowed candidate, scored as a converted model after each step; the same layers in the same order."""
    model, tokens, max_run, count = tiny_model(family_name, **changes), some_tokens(length=12), 3, 3
    choices = search_attentions(runner_of(model), tokens, count, max_run, fuse=fuse, width=LAYERS, batch=2)
    parent = logits(model, tokens)
    dropped: set[int] = set()
    for choice in choices:
        candidates = [
            layer
            for layer in range(1, LAYERS - 1 if fuse else LAYERS)
            if layer not in dropped
            and (not fuse or all(len(run) <= max_run for run in runs_of(frozenset(dropped | {layer}), LAYERS)))
        ]
        costs = {layer: cost_of(model, parent, tokens, dropped | {layer}, fuse) for layer in candidates}
        assert choice.candidates == pytest.approx(costs, rel=1e-3, abs=1e-6)
        best = min(costs, key=costs.get)
        assert (choice.layer, choice.kl) == (best, pytest.approx(costs[best], rel=1e-3, abs=1e-6))
        dropped.add(best)
    assert order_of(choices) == [choice.layer for choice in choices]
    assert len(choices) == count


@pytest.mark.parametrize("family_name", ["llama", "gpt2", "gemma2", "mistral"])
def test_blocks_over_everything(family_name):
    """Every block, scored as a converted model after each removal."""
    model, tokens = tiny_model(family_name), some_tokens(length=12)
    choices = search_blocks(runner_of(model), tokens, 3, width=LAYERS, batch=2)
    parent = logits(model, tokens)
    at = list(range(parent.shape[1] - 1, -1, -4))
    dropped: set[int] = set()
    for choice in choices:
        costs = {}
        for layer in sorted(set(range(LAYERS)) - dropped):
            student = logits(operate(model, PruneBlocks(layers=tuple(sorted(dropped | {layer}))))[0], tokens)
            p, q = (F.log_softmax(x[:, at].double(), -1) for x in (parent, student))
            costs[layer] = (p.exp() * (p - q)).sum(-1).mean().item()
        assert choice.candidates == pytest.approx(costs, rel=1e-3, abs=1e-6)
        assert choice.layer == min(costs, key=costs.get)
        dropped.add(choice.layer)
    subject = subject_of(model, {"block_order": order_of(choices)})[0]
    made = PruneBlocks(count=2, score="rescored").resolve(subject)
    assert made.layers == tuple(sorted(order_of(choices)[:2]))


def test_some_attention_stays():
    choices = search_blocks(runner_of(tiny_model("llama")), some_tokens(length=8), 6)
    assert len(choices) == 5


def test_a_narrow_search_scores_few_candidates():
    choices = search_attentions(runner_of(tiny_model("llama")), some_tokens(length=8), 3, 6, width=2)
    assert [len(choice.candidates) for choice in choices] == [4, 2, 2]


@pytest.mark.parametrize("family_name", ["llama", "qwen3", "mistral", "phi3"])
def test_a_narrow_search_ends_near_the_exhaustive_one(family_name):
    """Three candidates a step, six in the first by the attention KL, of twelve layers: within 5 % of the KL."""
    model, tokens = tiny_model(family_name, num_hidden_layers=12), some_tokens(batch=8, length=12)
    known = measure(runner_of(model), tokens, batch=8).scores["attention_kl"].mean
    whole = search_attentions(runner_of(model), tokens, 4, 3, width=12, batch=8)
    narrow = search_attentions(runner_of(model), tokens, 4, 3, width=3, batch=8, attention_kl=known)
    assert [len(choice.candidates) for choice in narrow] == [6, 3, 3, 3]
    assert narrow[-1].kl <= 1.05 * whole[-1].kl


def test_layers_not_scored_yet_wait_with_their_attention_kl():
    """The first step takes the lowest attention KL; a layer that it left out comes in when its own is low enough."""
    known = [0, 2, 3, 1e-9, 1, 0]
    choices = search_attentions(
        runner_of(tiny_model("llama")), some_tokens(length=8), 2, 6, width=1, attention_kl=known
    )
    assert set(choices[0].candidates) == {3, 4}, "of layers 1 to 4"
    loser = next(layer for layer in (3, 4) if layer != choices[0].layer)
    assert set(choices[1].candidates) == {loser}, "it was scored below 2"


def test_it_stops_where_no_run_may_grow():
    choices = search_attentions(runner_of(tiny_model("llama")), some_tokens(length=8), 5, 2)
    dropped = frozenset(order_of(choices))
    assert len(dropped) == 2, "six layers, the last kept, in runs of two"
    assert max(map(len, runs_of(dropped, LAYERS))) == 2


def test_weights_are_read_once_a_step():
    _, weights, config = subject_of(tiny_model("llama"))
    counted = CountingReads(weights)
    search_attentions(LayerRunner(config, counted, torch.float32), some_tokens(length=8), 3, 4)
    inside = {name: reads for name, reads in counted.reads.items() if ".layers." in name}
    assert set(inside.values()) == {3}


@pytest.mark.parametrize(
    ("dropped", "runs"),
    [
        ((), ()),
        ((0,), ()),
        ((3,), ((2, 3),)),
        ((1, 2, 4), ((0, 1, 2), (3, 4))),
        ((0, 1), ((0, 1),)),
        ((5,), ((4, 5),)),
        ((1, 2, 3, 4, 5), ((0, 1, 2, 3, 4, 5),)),
    ],
)
def test_runs_of(dropped, runs):
    assert runs_of(frozenset(dropped), 6) == runs
    assert variant_without(frozenset(dropped), 6).runs == runs
    assert variant_without(frozenset(dropped), 6, fuse=False).runs == ()


def test_few_takes_whole_sequences_from_all_over():
    tokens = torch.arange(100)[:, None].expand(100, 8)
    assert few(tokens, 40)[:, 0].tolist() == [0, 25, 50, 74, 99]
    assert few(tokens, 1).shape == (1, 8)
    assert few(tokens, 10_000).shape == (100, 8)


def test_default_count():
    assert [default_count(layers) for layers in (1, 12, 30, 126)] == [1, 3, 8, 34]


def test_without_fusing_runs_may_be_of_any_length():
    choices = search_attentions(runner_of(tiny_model("olmo2")), some_tokens(length=8), 4, 0, fuse=False)
    assert len(choices) == 4


def test_a_family_that_declines_fusing_is_offered_a_recipe_without_it(tmp_path):
    model = save_tiny(tmp_path / "model", "gemma2", tokenizer=True)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "out"
    found = analyze(model, out, text=tmp_path / "text.txt", tokens=32, sequence_length=8, drop=3, max_run=2)
    assert len(found.dropped) == 3 and found.runs == ()
    assert [step.op for step in load(out / "suggested.yaml").steps] == ["prune_attention", "refit"]
