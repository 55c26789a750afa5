"""Refit where norms follow the residual sums: each fit against its slow obvious version, and the whole of it."""

from __future__ import annotations

import pytest
import torch
from conftest import ENCODER_NAMES, LAYERS, tiny_encoder
from operations.helpers import subject_of

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.surgeon import as_surgeon
from llmsurgeon.formats.write import write_config
from llmsurgeon.healing.batches import Batches
from llmsurgeon.healing.refit.context import Context, RefitOptions
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.store import LayerStore, overlay
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

TOKENS = torch.randint(3, 64, (48, 16), generator=torch.Generator().manual_seed(1))
HELD_OUT = torch.arange(48) % 6 == 0
STEPS = {
    "block": (PruneBlocks(layers=(2,)),),
    "attention": (PruneAttention(layers=(1, 3)),),
    "ffn": (PruneFFN(layers=(2,)),),
    "width": (PruneWidth(width=24, score="magnitude"),),
}


def cut(model, steps):
    subject, weights, config = subject_of(model)
    spec, parent = subject.spec, weights
    for step in steps:
        plan = step.plan(subject)
        weights, subject = TransformedWeights(weights, plan.transforms), subject.after(plan)
    student = normalised(write_config(subject.spec, subject.family, config).student)
    return config, spec, parent, student, subject.spec, weights


def refitted(model, steps, store, **options):
    config, spec, parent, student, cut_spec, weights = cut(model, steps)
    runners = LayerRunner(config, parent, torch.float32), LayerRunner(student, weights, torch.float32)
    text = Batches.of(TOKENS, HELD_OUT, 8)
    made = refit(Context(*runners, spec, cut_spec, text, RefitOptions(**options), LayerStore(store)))
    return made, student, overlay(weights, made.files)


def error(config, weights, target):
    """Squared error of the last hidden state on the held-out sequences."""
    out = walk(LayerRunner(config, weights, torch.float32), TOKENS[HELD_OUT], [Variant()])[0]
    return (out - target).square().mean().item()


@pytest.mark.parametrize("what", STEPS)
@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_the_end_comes_nearer(tmp_path, name, what):
    model = tiny_encoder(name)
    config, _, parent, student, _, weights = cut(model, STEPS[what])
    target = walk(LayerRunner(config, parent, torch.float32), TOKENS[HELD_OUT], [Variant()])[0]
    made, _, healed = refitted(model, STEPS[what], tmp_path)
    assert error(student, healed, target) < 0.9 * error(student, weights, target)
    family = subject_of(model)[0].family
    assert family.post_norm is (family.ffn_norm in {update.projection for update in made.updates})


def test_the_norm_fit_is_least_squares(tmp_path):
    """Alone, it gives each channel the gain and shift that regression on all fitting tokens gives."""
    model = tiny_encoder("bert")
    made, _, healed = refitted(model, STEPS["block"], tmp_path, align=False, ridges=(1e9,))
    config, _, parent, student, _, weights = cut(model, STEPS["block"])
    mine, theirs = LayerRunner(student, weights, torch.float32), LayerRunner(config, parent, torch.float32)
    fitting = TOKENS[~HELD_OUT]

    def after(runner, layers):
        hidden = runner.embed(fitting)
        with torch.no_grad():
            for index in layers:
                with runner.loaded(index):
                    hidden = runner.whole(index, hidden)
        return hidden

    wanted = after(theirs, range(3)).double().flatten(0, 1)  # block 1 stands for layers 1 and 2
    norm = "encoder.layer.1.output.LayerNorm."
    gain, shift = parent[norm + "weight"].double(), parent[norm + "bias"].double()
    z = (after(mine, range(2)).double().flatten(0, 1) - shift) / gain
    for channel in (0, 7, 31):
        design = torch.stack([z[:, channel], torch.ones(len(z))], 1)
        solution = torch.linalg.lstsq(design, wanted[:, channel, None]).solution[:, 0]
        assert healed[norm + "weight"][channel].item() == pytest.approx(solution[0].item(), abs=1e-3)
        assert healed[norm + "bias"][channel].item() == pytest.approx(solution[1].item(), abs=1e-3)
    assert next(update.projection for update in made.updates if update.layer == 1) == "output.LayerNorm"


def test_what_is_unchanged_stays(tmp_path):
    """Nothing was cut before block 2, and the parent itself needs no fit at all."""
    model = tiny_encoder("bert")
    _, _, healed = refitted(model, STEPS["ffn"], tmp_path)
    _, _, parent, *_ = cut(model, STEPS["ffn"])
    for name in parent:
        if name.startswith(("encoder.layer.0.", "encoder.layer.1.", "embeddings.")):
            assert torch.equal(healed[name], parent[name]), name
    (tmp_path / "none").mkdir()
    made, _, same = refitted(model, (), tmp_path / "none")
    assert made.updates == () and all(torch.equal(same[name], parent[name]) for name in parent)


def test_a_killed_refit_goes_on(tmp_path):
    """With what is stored of the first blocks the rest comes out the same, bit for bit."""
    model = tiny_encoder("distilbert")
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    _, _, whole = refitted(model, STEPS["attention"], tmp_path / "whole")
    for file in sorted((tmp_path / "whole").iterdir())[:2]:
        (tmp_path / "resumed" / file.name).write_bytes(file.read_bytes())
    made, _, resumed = refitted(model, STEPS["attention"], tmp_path / "resumed")
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert {update.layer for update in made.updates} == set(range(1, LAYERS))


def test_the_surgeon_form_of_a_stock_config_describes_every_block():
    config = tiny_encoder("roberta").config.to_dict()
    assert len(as_surgeon(config)["block_configs"]) == LAYERS
