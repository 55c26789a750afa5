"""What shapes alone refuse is refused before anything is measured or sampled."""

from __future__ import annotations

import pytest
from conftest import save_tiny

from llmsurgeon.errors import SurgeryError
from llmsurgeon.planning.texts import Texts
from llmsurgeon.recipe import recipe
from llmsurgeon.run import Options, run


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("llama", "{op: prune_heads, heads: 3}", "3 asked for"),
        ("llama", "{op: prune_width, width: 4096}", "4096"),
        ("llama", "{op: prune_width, keep: 0.5}\n  - {op: prune_width, width: 32}", "cut by a step before"),
        ("mixtral", "{op: prune_experts, keep: 64}", "64"),
    ],
)
def test_nothing_is_measured_for_what_cannot_be(family, step, message, tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "model", family, tokenizer=True)

    def measured(self):
        raise AssertionError("text was asked for")

    monkeypatch.setattr(Texts, "sequences", property(measured))
    with pytest.raises(SurgeryError, match=message):
        run(recipe.loads(f"version: 1\nsteps:\n  - {step}\n"), model, tmp_path / "out", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
