"""What a run takes, foreseen: operations against those that a refit makes, and what follows from rates."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT, save_tiny
from torch.utils.flop_counter import FlopCounterMode

from llmsurgeon.healing import healers
from llmsurgeon.model.costs import costs, part_work
from llmsurgeon.operations.fit_memory import Text
from llmsurgeon.operations.fit_work import regression_work
from llmsurgeon.planning.estimate import estimate
from llmsurgeon.planning.opened import open_model, shapes_of
from llmsurgeon.planning.rates import Rates
from llmsurgeon.run import Options, preview
from llmsurgeon.run import run as run_recipe

ONE = Rates(*[1.0] * len(fields(Rates)))
RECIPE = """version: 1
calibration: {text: text.txt, tokens: 2048, sequence_length: 64}
steps:
  - {op: prune_attention, layers: [2]}
  - {op: fuse_ffn, runs: [1-2]}
  - {op: refit}
"""


@pytest.fixture
def planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "fuse.yaml").write_text(RECIPE)
    return preview("fuse.yaml", "parent")


def test_what_parts_multiply_is_what_a_model_costs(planned):
    parent, shapes = planned.parent, shapes_of(planned.parent.meta())
    parts = part_work(parent.spec, parent.family, shapes, 0)
    head = 2 * parent.spec.vocab * parent.spec.hidden
    assert sum(map(sum, parts)) + head == costs(parent.spec, parent.family, shapes, 2).flops_per_token
    longer = part_work(parent.spec, parent.family, shapes, 100)[0][0] - parts[0][0]
    assert longer == 2 * 100 * parent.spec.layers[0].attention.heads * parent.spec.layers[0].attention.head_dim


@pytest.mark.parametrize("tokens", [64, 4096])
def test_a_regression_counts_its_products(tokens):
    """Tokens where they are fewer than features, else their sums; the first column of each is what is done once."""
    once, twice = (regression_work(512, 96, Text(tokens, 64, 2, held_out=0.25), ridges) for ridges in (1, 2))
    fits, judges = tokens * 3 // 4, tokens // 4
    more = replace(twice, **{name: value - getattr(once, name) for name, value in vars(twice).items()})
    if tokens == 64:
        assert once.sums == fits**2 * 512 and more.solved == fits**3 / 3 + 2 * fits**2 * 96
        assert more.wide == 2 * (fits + judges) * 512 * 96
    else:
        assert once.sums == (fits + judges) * 512**2 and more.solved == 512**3 / 3 + 2 * 512**2 * 96
        assert more.wide == 2 * 512 * 512 * 96


def test_a_refit_makes_the_operations_that_are_foreseen(planned, monkeypatch):
    """But for factorisations and what attention looks back at, which torch does not count here; small Gram matrices are
    made whole, not by triangles."""
    text = Text(2048, 64, 4, held_out=0.125)
    parts = [
        part_work(spec, planned.parent.family, shapes_of(meta), 0)
        for spec, meta in ((planned.parent.spec, planned.parent.meta()), (planned.spec, planned.meta))
    ]
    work = planned.heals[0].fit_work(planned.parent.spec, planned.spec, tuple(parts), text)
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]}
    counter, refit = FlopCounterMode(display=False, custom_mapping=in_place), healers.HEALERS["refit"]

    def counted(context, step):
        with counter:
            return refit(context, step)

    monkeypatch.setitem(healers.HEALERS, "refit", counted)
    run_recipe("fuse.yaml", "parent", "out", Options(device="cpu"))
    assert counter.get_total_flops() == pytest.approx(work.layers + 2 * work.sums + work.wide, rel=0.05)


def test_an_estimate_follows_from_rates(planned):
    slow, fast = (
        estimate(planned, torch.float32, rates, 1000) for rates in (ONE, replace(ONE, **dict.fromkeys(vars(ONE), 1e12)))
    )
    assert slow.seconds > 1e8 and fast.seconds == 0.0 and slow.without == ()
    assert slow.bytes_written > planned.after.disk_bytes
    parent = sum(t.numel() * 4 for t in open_model("parent").weights.values())
    assert slow.bytes_read == 2 * parent + 3 * planned.after.disk_bytes
    assert slow.peak_memory_bytes == 1000 + max(planned.healing_bytes, planned.peak_bytes)
    assert estimate(planned, torch.float32, replace(ONE, read=1e12), 0).seconds == slow.seconds - parent


def test_a_dry_run_says_what_a_run_takes_and_what_is_not_counted(planned, run):
    code, out, _ = run(
        "run", "fuse.yaml", "parent/config.json", "-o", "out", "--dry-run", "--set", "calibration.self_share=0.5"
    )
    assert code == 0 and "on this machine: about" in out and "not counted" not in out
    Path("narrow.yaml").write_text("version: 1\nsteps: [{op: prune_width, width: 64}]\n")
    code, out, _ = run("run", "narrow.yaml", "parent", "-o", "out", "--dry-run")
    assert code == 0 and "not counted: the score ffn_elimination" in " ".join(out.split())
    code, out, _ = run("run", "fuse.yaml", "parent", "-o", "out", "--dry-run", "--json")
    takes = json.loads(out)["estimate"]
    assert code == 0 and takes["seconds"] >= 0 and takes["bytes_read"] > 0 and all(takes["rates"].values())


@pytest.mark.parametrize(("given", "share"), [({}, 0.25), ({"self_share": 0.0}, 0.0), ({"text": None}, 1.0)])
def test_text_that_the_model_writes_is_counted(planned, given, share):
    """By what a token multiplies and by the logits that it is drawn from."""
    asked = planned.recipe.calibration.model_copy(update={"self_share": None, **given})
    some = replace(planned, recipe=planned.recipe.model_copy(update={"calibration": asked}))
    fast = replace(ONE, **dict.fromkeys(vars(ONE), 1e30))
    stepped, drawn = (estimate(some, torch.float32, replace(fast, **{name: 1.0}), 0) for name in ("stepped", "drawn"))
    spec, shapes = planned.parent.spec, shapes_of(planned.parent.meta())
    layers = sum(map(sum, part_work(spec, planned.parent.family, shapes, 64)))
    assert stepped.seconds == pytest.approx(2048 * share * (layers + 2 * spec.vocab * spec.hidden))
    assert drawn.seconds == 2048 * share * spec.vocab
