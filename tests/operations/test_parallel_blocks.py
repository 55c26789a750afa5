"""Parallel blocks against x + sum(block(x) - x)."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from operations.helpers import cut_plan, logits, naive, operate, skip, some_tokens, subject_of, taking

from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_ffn import PruneFFN


def side_by_side(*layers):
    return lambda x, parts: x + sum(parts.block(j, x) - x for j in layers)


@pytest.mark.parametrize(("family_name", "changes"), taking("parallel_blocks"))
def test_contributions_add_up(family_name, changes):
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    parallel, written, spec = operate(model, ParallelBlocks(windows=((0, 1), (3, 4, 5))))
    stages = {0: side_by_side(0, 1), 1: skip, 3: side_by_side(3, 4, 5), 4: skip, 5: skip}
    torch.testing.assert_close(logits(parallel, tokens), logits(naive(model, stages), tokens), atol=1e-4, rtol=1e-4)
    assert cut_plan(spec) == [(0, 1), (2,), (3, 4, 5)]
    assert len(spec.attentions) == 6
    assert written.format == "surgeon" and written.why.startswith("block 0 runs 2 blocks in parallel")


def test_branches_without_attention_or_ffn(family_name):
    model, tokens = tiny_model(family_name), some_tokens()
    steps = (PruneAttention(layers=(1,)), PruneFFN(layers=(2,)), ParallelBlocks(windows=((1, 2),)))
    parallel, _, spec = operate(model, *steps)
    # In the place of layer 2: the mask is that of the branch that attends.
    stages = {1: skip, 2: lambda x, parts: x + parts.ffn(1, x) + parts.attention(2, x)}
    torch.testing.assert_close(logits(parallel, tokens), logits(naive(model, stages), tokens), atol=1e-4, rtol=1e-4)
    assert len(spec.attentions) == 5


@pytest.mark.parametrize("family_name", ["qwen2", "qwen3"])
def test_the_mask_is_that_of_the_branch_that_attends(family_name):
    """Layer 2 is full and has lost its attention; layer 3 slides: the merged block slides."""
    model = tiny_model(family_name, use_sliding_window=True, sliding_window=5, max_window_layers=3)
    tokens = some_tokens(length=20)
    parallel, written, _ = operate(model, PruneAttention(layers=(2,)), ParallelBlocks(windows=((2, 3),)))
    stages = {2: skip, 3: lambda x, parts: x + parts.ffn(2, x) + (parts.block(3, x) - x)}
    torch.testing.assert_close(logits(parallel, tokens), logits(naive(model, stages), tokens), atol=1e-4, rtol=1e-4)
    assert written.config["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 3


def test_auto_takes_the_windows_of_least_dependency():
    dependency = torch.ones(6, 6)
    dependency[3, 4] = 0.1
    subject, _, _ = subject_of(tiny_model("llama"), {"block_dependency": dependency})
    step = ParallelBlocks(size=2)
    assert step.needs() == {"block_dependency"}
    assert step.resolve(subject).windows == ((3, 4),)
    assert ParallelBlocks(size=2, count=2).resolve(subject).windows == ((0, 1), (3, 4))
    with pytest.raises(SurgeryError, match="only 1 windows of 4 fit into 6 blocks, 2 asked for"):
        ParallelBlocks(size=4, count=2).resolve(subject)


@pytest.mark.parametrize(
    ("family_name", "windows", "message"),
    [
        ("gemma2", ((1, 2),), "mixes full and sliding attention"),
        ("smollm3", ((2, 3),), "mixes attention with and without rotary positions"),
        ("llama", ((1, 3),), r"\[1, 3\] is not a window of neighbouring blocks"),
        ("llama", ((5, 6),), "layer 6 is not in the model"),
        ("llama", ((1, 2), (2, 3)), r"\[2, 3\] overlaps another window"),
        ("qwen2", ((2, 3),), "mixes full and sliding attention"),
    ],
)
def test_windows_that_do_not_fit(family_name, windows, message):
    subject, _, _ = subject_of(tiny_model(family_name))
    with pytest.raises(SurgeryError, match=message):
        ParallelBlocks.model_construct(windows=windows).plan(subject)


def test_what_is_parallel_is_left_alone():
    subject, _, _ = subject_of(tiny_model("llama"))
    subject = subject.after(ParallelBlocks(windows=((1, 2),)).plan(subject))
    with pytest.raises(SurgeryError, match="a block of the window is parallel already"):
        ParallelBlocks(windows=((0, 1),)).plan(subject)
    with pytest.raises(SurgeryError, match="layer 1 has no attention to drop"):
        PruneAttention(layers=(1,)).plan(subject)
