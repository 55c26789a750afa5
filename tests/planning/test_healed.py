"""Each healing step holds out its own share of the text, and nothing is fitted to what judges the result."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_tiny

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.healers import HEALERS
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.operations.distill import Distill
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.refit import Refit
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.planning.healed import judging_share, set_aside
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run
from llmsurgeon.text.sequences import Sequences, held_out

WINDOWS = Sequences(torch.arange(48)[:, None].expand(-1, 4), ("prose",) * 48)


def test_every_step_that_heals_has_a_healer():
    assert HEALERS.keys() == {"refit", "distill", "ternary"}
    assert {op for op, step in OPERATIONS.items() if step.heals is True} <= HEALERS.keys()
    assert Ternary().heals and not Ternary(method="round").heals and Ternary(method="round").withholds() is None


def test_the_largest_share_judges():
    assert judging_share([]) == judging_share([Distill(minutes=1)]) == 0.125
    assert judging_share([Refit(held_out=0.05), Distill(minutes=1)]) == 0.05
    assert judging_share([Ternary(held_out=0.25), Refit()]) == 0.25


@pytest.mark.parametrize("step", [Refit(held_out=0.25), Ternary(held_out=0.25), Distill(minutes=1), PruneFFN(count=1)])
def test_with_one_share_for_all_every_step_works_with_the_whole_text(step):
    judges = held_out(WINDOWS.kinds, 0.25)
    windows, held = set_aside(WINDOWS, judges, step)
    assert torch.equal(windows.tokens, WINDOWS.tokens) and torch.equal(held, judges)


def test_a_step_holds_out_its_own_share_and_sees_no_other_judge():
    judges = held_out(WINDOWS.kinds, 0.25)
    own = held_out(WINDOWS.kinds, 0.125)
    assert int(judges.sum()) == 12 and int(own.sum()) == 6 and not (judges & own).any()
    windows, held = set_aside(WINDOWS, judges, Refit(held_out=0.125))
    assert windows[held].tokens.tolist() == WINDOWS[own].tokens.tolist()
    assert windows[~held].tokens.tolist() == WINDOWS[~own & ~judges].tokens.tolist()


def test_shares_that_leave_nothing_are_refused():
    windows = WINDOWS[torch.arange(48) < 3]
    judges = held_out(windows.kinds, 0.6)
    with pytest.raises(SurgeryError, match=r"refit: 3 calibration sequences leave none to fit to.*same held_out"):
        set_aside(windows, judges, Refit())


def test_a_run_gives_each_step_its_own_share(tmp_path, monkeypatch):
    """Ternary codes and a refit of different shares: neither reads what judges, but where it holds it out itself."""
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    # No two windows are alike.
    (tmp_path / "text.txt").write_text(" ".join(str(7919 * number) for number in range(2000)))
    seen = {}

    def watched(op):
        heal = HEALERS[op]

        def healer(context, step):
            seen[op] = context
            return heal(context, step)

        return healer

    for op in ("ternary", "refit"):
        monkeypatch.setitem(HEALERS, op, watched(op))
    recipe = loads(
        f"version: 1\ncalibration: {{text: {tmp_path}/text.txt, tokens: 768, sequence_length: 16}}\n"
        "steps: [{op: ternary, layers: [2], held_out: 0.25}, {op: refit, held_out: 0.125}]\n"
    )
    outcome = run(recipe, str(parent), str(tmp_path / "out"), Options())
    ternary, refit = seen["ternary"], seen["refit"]
    count = len(ternary.windows)
    assert int(ternary.held_out.sum()) == round(count * 0.25)
    assert int(refit.held_out.sum()) == round(count * 0.125)
    judges = {tuple(window) for window in ternary.windows[ternary.held_out].tolist()}
    fitted = {tuple(window) for window in refit.windows[~refit.held_out].tolist()}
    assert not judges & fitted
    assert outcome.evaluation.tokens == round(count * 0.25) * 15  # what follows each token
    surgery = json.loads((outcome.out / "surgery.json").read_text())
    assert [entry["linear"] for entry in surgery["ternary"]] and surgery["refit"]
    assert list(outcome.results) == ["ternary", "refit"]
