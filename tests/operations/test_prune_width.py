"""Narrower FFNs against the parent with the lost channels forced to zero."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from operations.helpers import declared, logits, operate, some_tokens, subject_of, taking

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.model.families import family_of
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_width import PruneWidth, top_channels, widths_by_loss
from llmsurgeon.recipe.recipe import dump, loads


def masked(model, kept):
    """The parent with every inner channel but `kept[layer]` zero where the output projection reads it."""
    family = family_of(normalised(model.config.to_dict()))
    model = copy.deepcopy(model)
    layers = model.get_submodule(family.layers)
    for layer, channels in kept.items():
        projection = layers[layer].get_submodule(family.ffn_module(family.ffn_out))

        def mask(_, inputs, channels=channels):
            return (inputs[0] * torch.zeros(inputs[0].shape[-1]).index_fill(0, torch.tensor(channels), 1),)

        projection.register_forward_pre_hook(mask)
    return model


def by_magnitude(model, layer, kept):
    """Channels by the product of their weights' norms, one at a time."""
    family = family_of(normalised(model.config.to_dict()))
    block = model.get_submodule(family.layers)[layer]

    def rows(name):
        weight = block.get_submodule(family.ffn_module(name)).weight
        return weight.T if family.transposed else weight

    out = rows(family.ffn_out)
    width = out.shape[1]
    scores = []
    for channel in range(width):
        score = out[:, channel].norm()
        for name in family.ffn_in:
            for start in range(0, width * family.ffn_stacked, width):
                score = score * rows(name)[start + channel].norm()
        scores.append(score.item())
    return sorted(sorted(range(len(scores)), key=lambda c: -scores[c])[:kept])


@pytest.mark.parametrize(("family_name", "changes"), taking("prune_width"))
def test_magnitude(family_name, changes):
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    narrow, written, spec = operate(model, PruneWidth(width=40, score="magnitude"))
    expected = logits(masked(model, {i: by_magnitude(model, i, 40) for i in range(6)}), tokens)
    torch.testing.assert_close(logits(narrow, tokens), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model, tokens), expected, atol=1e-2)
    assert {layer.ffn.width for layer in spec.layers} == {40}
    key = declared(family_name, changes).width_key
    assert (written.format, key and written.config[key]) == (("native", 40) if key else ("surgeon", None))


@pytest.mark.parametrize(("family_name", "changes"), taking("prune_width"))
def test_activation_in_some_layers(family_name, changes):
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    width = subject_of(model)[0].spec.layers[0].ffn.width
    scores = torch.rand(6, width, generator=torch.Generator().manual_seed(3))
    step = PruneWidth(width=32, layers=(1, 4), score="activation")
    assert step.needs() == {"ffn_channel"}
    narrow, written, spec = operate(model, step, scores={"ffn_channel": scores})
    kept = {i: sorted(scores[i].argsort(descending=True)[:32].tolist()) for i in (1, 4)}
    expected = logits(masked(model, kept), tokens)
    torch.testing.assert_close(logits(narrow, tokens), expected, atol=1e-4, rtol=1e-4)
    assert [layer.ffn.width for layer in spec.layers] == [width, 32, width, width, 32, width]
    assert written.format == "surgeon"


def test_ties_go_to_the_lower_index():
    assert top_channels(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("keep", "multiple_of", "width"), [(0.5, 16, 48), (0.5, 64, 64), (0.9, 16, 80), (1.0, 64, 96), (0.01, 16, 16)]
)
def test_a_fraction_is_rounded(keep, multiple_of, width):
    subject, _, _ = subject_of(tiny_model("llama"))
    plan = PruneWidth(keep=keep, multiple_of=multiple_of, score="magnitude").plan(subject)
    assert {layer.ffn.width for layer in plan.spec.layers} == {width}


def test_steps_that_do_not_fit():
    subject, _, _ = subject_of(tiny_model("llama"), {"ffn_channel": torch.ones(6, 96)})
    with pytest.raises(SurgeryError, match="layer 0 has 96 channels, 97 asked for"):
        PruneWidth(width=97).plan(subject)
    dropped = subject.after(PruneFFN(layers=(2,)).plan(subject))
    with pytest.raises(SurgeryError, match="layer 2 has no FFN"):
        PruneWidth(width=40, layers=(2,)).plan(dropped)
    bare, _, _ = subject_of(tiny_model("llama"))
    for score, needed in (("activation", "ffn_channel"), ("least_squares", "ffn_elimination")):
        with pytest.raises(SurgeryError, match=f"needs the score '{needed}'"):
            PruneWidth(width=40, score=score).plan(bare)
    dropped = subject.after(PruneAttention(layers=(2,)).plan(subject))
    fused = dropped.after(FuseFFN(runs=((1, 2),)).plan(dropped))
    with pytest.raises(SurgeryError, match="cut widths before fusing"):
        PruneWidth(width=40, score="activation").plan(fused)
    with pytest.raises(ValueError, match="takes exactly one of width, keep, widths"):
        PruneWidth(width=40, keep=0.5)


def test_widths_by_loss():
    """Beside the slow way: every split of the goal over the layers, the cheapest of them."""
    curves = {
        0: torch.linspace(1, 0, 97).square(),
        1: 4 * torch.linspace(1, 0, 97).square(),
        5: torch.linspace(1, 0, 65).pow(3),
    }
    for keep in (0.25, 0.5, 0.75, 0.9):
        found = widths_by_loss(curves, keep, 16)
        total = sum(found.values())
        assert total <= keep * (96 + 96 + 64) and total > keep * (96 + 96 + 64) - 16
        splits = (
            (a, b, c) for a in range(16, 97, 16) for b in range(16, 97, 16) for c in range(16, 65, 16)
            if a + b + c == total
        )  # fmt: skip
        costs = {s: sum(float(curves[i][w]) for i, w in zip(curves, s, strict=True)) for s in splits}
        assert costs[tuple(found.values())] == pytest.approx(min(costs.values()), rel=1e-5)
    assert widths_by_loss({0: torch.linspace(1, 0, 101)}, 0.99, 16) == {0: 96}, "down to a multiple first"
    assert widths_by_loss({0: torch.linspace(1, 0, 33)}, 0.01, 16) == {0: 16}, "no FFN goes as a whole"


def test_spread_by_loss_resolves_to_widths():
    curves = {i: (i + 1) * torch.linspace(1, 0, 97).square() for i in range(6)}
    order = {i: torch.arange(96.0).roll(i) for i in range(6)}
    model = tiny_model("llama")
    scores = {"ffn_elimination": order, "ffn_elimination_loss": curves}
    subject, _, _ = subject_of(model, scores)
    step = PruneWidth(keep=0.5, spread="loss", multiple_of=16)
    made = step.resolve(subject)
    assert made.widths == tuple(widths_by_loss(curves, 0.5, 16).values()) and made.layers == tuple(range(6))
    assert made.resolve(subject) == made and list(made.widths) == sorted(made.widths)
    narrow, _, spec = operate(model, made, scores=scores)
    assert [layer.ffn.width for layer in spec.layers] == list(made.widths)
    kept = {i: sorted(order[i].argsort(descending=True)[: made.widths[i]].tolist()) for i in range(6)}
    tokens = some_tokens()
    torch.testing.assert_close(logits(narrow, tokens), logits(masked(model, kept), tokens), atol=1e-4, rtol=1e-4)
    even = step.resolve(subject_of(model, step.foresee(subject))[0])
    assert set(even.widths) == {48}, "a dry run takes all layers for alike"
    with pytest.raises(ValueError, match="spread: loss goes with keep"):
        PruneWidth(width=32, spread="loss")
    with pytest.raises(ValueError, match="one for each of layers"):
        PruneWidth(widths=(32, 48), layers=(1,))


def test_a_fused_ffn_can_be_narrowed_by_magnitude():
    model, tokens = tiny_model("llama"), some_tokens()
    steps = (PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),)))
    fused, _, _ = operate(model, *steps)
    narrow, _, spec = operate(model, *steps, PruneWidth(width=100, layers=(2,), score="magnitude"))
    assert [layer.ffn.width for layer in spec.layers] == [96, 100, 96, 96]
    fused.config.model_type = "llama"
    expected = logits(masked(fused, {1: by_magnitude(fused, 1, 100)}), tokens)
    torch.testing.assert_close(logits(narrow, tokens), expected, atol=1e-4, rtol=1e-4)


def test_scores_are_for_channels_as_the_parent_has_them():
    subject, _, _ = subject_of(tiny_model("llama"))
    found = {
        "ffn_elimination": {layer: torch.arange(96.0) for layer in range(6)},
        "ffn_elimination_loss": {layer: torch.linspace(1, 0, 97) for layer in range(6)},
    }
    cut = replace(subject.after(PruneWidth(width=64, score="magnitude").plan(subject)), scores=found)
    with pytest.raises(SurgeryError, match="layer 0 was cut by a step before"):
        PruneWidth(width=32).plan(cut)
    with pytest.raises(SurgeryError, match="layer 0 was cut by a step before"):
        PruneWidth(keep=0.5, spread="loss").resolve(cut)


def test_widths_belong_to_layers_as_they_are_written():
    assert PruneWidth(layers=[3, 1], widths=[64, 32]).widths == (32, 64)


def test_a_recipe_file_may_name_widths_in_any_order():
    steps = "- {op: prune_width, widths: [64, 32], layers: [2, 1]}\n- {op: prune_heads, counts: [6, 3], layers: [2, 1]}"
    recipe = loads(f"version: 1\nsteps:\n{steps}\n")
    assert recipe.steps[0].widths == (32, 64) and recipe.steps[1].counts == (3, 6)
    assert loads(dump(recipe)) == recipe
