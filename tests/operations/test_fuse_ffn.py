"""FFN Fusion against the parallel sum, computed with the parent's own modules."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from operations.helpers import (
    FALCON_7B,
    Parts,
    cut_plan,
    declared,
    logits,
    naive,
    operate,
    skip,
    some_tokens,
    subject_of,
    taking,
)

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.model.families import FAMILIES, family_of
from llmsurgeon.operations.fuse_ffn import FuseFFN, fold_gain, fold_shift
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_width import PruneWidth

DROP = PruneAttention(layers=(2, 3, 4))
FUSING = taking("fuse_ffn")


def parallel_sum(run, family, parallel_residual, first_attends, last_norm=False):
    """x + attn_first(x) + sum_j FFN_j(norm_j(.)), and the other layers of the run skipped."""

    def compute(x, parts):
        attended = x + parts.attention(run[0], x) if first_attends else x
        read = x if parallel_residual else attended
        return attended + sum(parts.ffn(j, read, run[-1] if last_norm else None) for j in run)

    return {run[0]: compute, **dict.fromkeys(run[1:], skip)}


def parts_of(model):
    """The attention and FFN of each of a model's layers."""
    family = family_of(normalised(model.config.to_dict()))
    return Parts(list(model.get_submodule(family.layers)), family)


def reference(model, run, dropped, last_norm=False):
    family = family_of(normalised(model.config.to_dict()))
    parallel_residual = family.parallel_residual(model.config.to_dict())

    def without_attention(j):
        return lambda x, parts: x + parts.ffn(j, x)

    stages = {j: without_attention(j) for j in dropped}
    stages |= parallel_sum(run, family, parallel_residual, run[0] not in dropped, last_norm)
    return naive(model, stages)


@pytest.mark.parametrize("run", [(1, 2, 3, 4), (2, 3), (3, 4)], ids=str)
@pytest.mark.parametrize(("family_name", "changes"), FUSING)
def test_fold_is_the_parallel_sum(family_name, changes, run):
    """Runs whose first block keeps its attention, and runs without any."""
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    fused, written, spec = operate(model, DROP, FuseFFN(runs=(run,)))
    expected = logits(reference(model, run, DROP.layers), tokens)
    scale = expected.abs().max()
    torch.testing.assert_close(logits(fused, tokens) / scale, expected / scale, atol=1e-5, rtol=0)
    assert (logits(model, tokens) - expected).abs().max() > 1e-2 * scale, "a cut that does not matter proves nothing"
    assert written.format == "surgeon"
    assert run in cut_plan(spec) and len(spec.layers) == 6 - len(run) + 1


@pytest.mark.parametrize(("family_name", "changes"), FUSING)
def test_fold_is_exact_in_float64(family_name, changes):
    """The fused block alone on the same input: norms of Llama's kind round to float32 inside, for both alike."""
    model = tiny_model(family_name, dtype=torch.float64, **changes)
    fused, _, spec = operate(model, DROP, FuseFFN(runs=((2, 3, 4),)))
    parts = parts_of(model)
    block = fused.get_submodule(parts.family.layers)[2]
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sum(parts.ffn(j, x) for j in (2, 3, 4))
        torch.testing.assert_close(block.feed_forward(x), expected, atol=1e-10, rtol=0)
    assert spec.layers[2].attention is None


@pytest.mark.parametrize("family_name", ["llama", "gpt2"])
def test_bfloat16_is_one_cast_away(family_name):
    """Every fused weight is the exact product, rounded once."""
    model = tiny_model(family_name, dtype=torch.bfloat16)
    family = FAMILIES[family_name]
    fused, _, _ = operate(model, DROP, FuseFFN(runs=((2, 3, 4),)))
    parent, student = model.state_dict(), fused.state_dict()
    for projection in family.ffn_in:
        parts = []
        for layer in (2, 3, 4):
            weight = parent[family.layer(layer) + family.ffn_tensor(projection)].double()
            gain = parent[family.layer(layer) + f"{family.ffn_norm}.weight"].double()
            parts.append(gain[:, None] * weight if family.transposed else weight * gain)
        exact = torch.cat(parts, dim=1 if family.transposed else 0)
        found = student[family.layer(2) + family.ffn_tensor(projection)]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.float().bfloat16())
    tokens = some_tokens()
    expected = logits(reference(model.float(), (2, 3, 4), DROP.layers), tokens)
    error = (logits(fused, tokens).float() - expected).norm() / expected.norm()
    assert error < 0.05


@pytest.mark.parametrize(("family_name", "changes"), FUSING)
def test_norm_last_uses_the_last_norm_for_all(family_name, changes):
    model, tokens, run = tiny_model(family_name, **changes), some_tokens(), (1, 2, 3)
    fused, _, _ = operate(model, DROP, FuseFFN(runs=(run,), norm="last"))
    expected = logits(reference(model, run, DROP.layers, last_norm=True), tokens)
    torch.testing.assert_close(logits(fused, tokens), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(reference(model, run, DROP.layers), tokens), expected, atol=1e-3)


@pytest.mark.parametrize("norm", ["fold", "last"])
@pytest.mark.parametrize(("family_name", "changes"), FUSING)
def test_widths_may_differ(family_name, changes, norm):
    """One layer of the run was narrowed before: its channels beyond the width are gone, the others count."""
    model, tokens, run = tiny_model(family_name, **changes), some_tokens(), (2, 3, 4)
    narrow = PruneWidth(width=40, layers=(3,), score="magnitude")
    narrowed, _, _ = operate(model, DROP, narrow)
    fused, _, spec = operate(model, DROP, narrow, FuseFFN(runs=(run,), norm=norm))
    parts = parts_of(narrowed)
    block = fused.get_submodule(parts.family.layers)[2]
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sum(parts.ffn(j, x, run[-1] if norm == "last" else None) for j in run)
        torch.testing.assert_close(block.feed_forward(x), expected, atol=1e-5, rtol=1e-5)
    assert spec.layers[2].ffn.width == 2 * spec.layers[0].ffn.width + 40
    assert logits(fused, tokens).isfinite().all()


@pytest.mark.parametrize(
    ("family_name", "changes"),
    [
        ("llama", {}),
        ("phi3", {}),
        ("stablelm", {"use_parallel_residual": True}),
        ("falcon", FALCON_7B),
        ("granite", {}),
    ],
)
def test_several_runs_and_a_run_of_fused_blocks(family_name, changes):
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    drop = PruneAttention(layers=(1, 2, 3, 4, 5))
    twice, _, spec = operate(model, drop, FuseFFN(runs=((1, 2), (4, 5))))
    assert cut_plan(spec) == [(0,), (1, 2), (3,), (4, 5)]
    again, _, spec = operate(model, drop, FuseFFN(runs=((1, 2), (4, 5))), FuseFFN(runs=((1, 2, 3, 4, 5),)))
    assert cut_plan(spec) == [(0,), (1, 2, 3, 4, 5)]
    expected = logits(reference(model, (1, 2, 3, 4, 5), drop.layers), tokens)
    torch.testing.assert_close(logits(again, tokens), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(twice, tokens), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("family_name", "changes"), [("stablelm", {"use_parallel_residual": True}), ("falcon", FALCON_7B)]
)
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_a_fused_ffn_does_not_share_attentions_norm(family_name, changes, norm):
    """Either part of the fused block can still go, and takes its own norm along."""
    model, run = tiny_model(family_name, **changes), (1, 2, 3)
    fuse = (DROP, FuseFFN(runs=(run,), norm=norm))
    fused, _, spec = operate(model, *fuse)
    assert spec.layers[1].ffn.own_norm and spec.layers[1].ffn.bias == (norm == "fold")
    family = declared(family_name, changes)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for gone, left in ((PruneAttention(layers=(1,)), "feed_forward"), (PruneFFN(layers=(1,)), "attend")):
        student, _, _ = operate(model, *fuse, gone)
        block = student.get_submodule(family.layers)[1]
        names = {name.split(".")[0] for name in block.state_dict()}
        expected = (
            {family.ffn, family.ffn_norm} if left == "feed_forward" else {family.attention, family.attention_norm}
        )
        assert names == expected
    with torch.no_grad():
        student, _, _ = operate(model, *fuse, PruneAttention(layers=(1,)))
        mine, whole = (m.get_submodule(family.layers)[1].feed_forward(x) for m in (student, fused))
    assert torch.equal(mine, whole)


def test_auto_takes_the_runs_of_least_dependency():
    far = (torch.arange(6.0)[None, :] - torch.arange(6.0)[:, None]).square()  # near neighbours depend least
    subject, _, _ = subject_of(tiny_model("llama"), {"ffn_dependency": far})
    step = FuseFFN(max_run=3)
    assert step.needs() == {"ffn_dependency"}
    with pytest.raises(SurgeryError, match="put a prune_attention step before"):
        step.resolve(subject)
    dropped = subject.after(DROP.plan(subject))
    assert step.resolve(dropped).runs == ((1, 2), (3, 4))
    assert step.plan(dropped).spec == FuseFFN(runs=((1, 2), (3, 4))).plan(dropped).spec
    bare, _, _ = subject_of(tiny_model("llama"))
    with pytest.raises(SurgeryError, match="needs the score 'ffn_dependency'"):
        step.resolve(bare)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (((4, 5),), r"run \[4-5\] goes across the attention of layer 5; drop it first"),
        (((2, 4),), r"run \[2-4\] is not contiguous"),
        (((5, 6),), r"run \[5-6\]: layer 6 is not in the model: it has layers 0 to 5"),
        (((2, 3), (3, 4)), r"runs overlap|overlap"),
    ],
)
def test_runs_that_do_not_fit(runs, message):
    subject, _, _ = subject_of(tiny_model("llama"))
    dropped = subject.after(DROP.plan(subject))
    with pytest.raises(SurgeryError, match=message):
        FuseFFN.model_construct(runs=runs).plan(dropped)


def test_a_run_needs_an_ffn_everywhere():
    subject, _, _ = subject_of(tiny_model("llama"))
    for step in (DROP, PruneFFN(layers=(1,))):
        subject = subject.after(step.plan(subject))
    with pytest.raises(SurgeryError, match="layer 1 has no dense FFN"):
        FuseFFN(runs=((1, 2),)).plan(subject)


@pytest.mark.parametrize("gain_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_rounds_once(dtype, gain_dtype):
    """Every 16-bit pattern of a weight, against the product in float64, whose one rounding is the reference."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    weight = (bits.view(dtype) if dtype.itemsize == 2 else bits.view(torch.bfloat16).to(dtype)).view(-1, 1024)
    gain = torch.linspace(-2, 3, 1024).to(gain_dtype)
    expected = (weight.double() * gain.double()).float().to(dtype)
    folded = fold_gain(weight, gain)
    assert folded.dtype == dtype and torch.equal(folded.isnan(), expected.isnan())
    assert torch.equal(folded.nan_to_num(), expected.nan_to_num())


def test_folds_are_the_linear_maps_they_stand_for():
    generator = torch.Generator().manual_seed(0)
    weight, gain, shift, bias, x = (torch.randn(s, generator=generator) for s in ((7, 5), 5, 5, 7, (3, 5)))
    expected = torch.nn.functional.linear(x * gain + shift, weight, bias)
    found = torch.nn.functional.linear(x, fold_gain(weight, gain), fold_shift(weight, bias, shift))
    torch.testing.assert_close(found, expected)
