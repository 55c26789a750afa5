"""A collapse of quality is said plainly."""

from __future__ import annotations

import json

import pytest
from conftest import SMALL

from llmsurgeon.report.card import collapse


@pytest.mark.parametrize(("evaluation", "message"), [
    (None, None),
    ({"perplexity": 29.0, "parent_perplexity": 10.0}, None),
    ({"perplexity": 31.0, "parent_perplexity": 10.0}, "perplexity is 3.1 times the parent's"),
    ({"perplexity": 3.8e7, "parent_perplexity": 13.9}, "perplexity is 2,733,812.9 times the parent's"),
    ({"perplexity": float("nan"), "parent_perplexity": 13.9}, "perplexity is nan times"),
    ({"hidden_cosine": 0.1, "pooled_cosine": 0.6}, None),
    ({"hidden_cosine": 0.1, "pooled_cosine": 0.31}, "the cosine of pooled states to the parent's is 0.31"),
])  # fmt: skip
def test_what_counts_as_a_collapse(evaluation, message):
    found = collapse(evaluation)
    assert found is None if message is None else message in found


def test_card_report_and_terminal_say_so(run, folder, monkeypatch):
    monkeypatch.setattr("llmsurgeon.report.card.COLLAPSED_RATIO", 0.01)  # a random model has nothing to lose
    command = ("ternary", "parent", "--linears", "ffn", "--text", "text.txt", *SMALL)
    code, out, _ = run(*command, "-o", "out")
    assert code == 0 and "WARNING: Quality has collapsed: perplexity is " in out
    assert "> **Quality has collapsed: perplexity is " in (folder / "out/README.md").read_text()
    assert json.loads((folder / "out/surgery.json").read_text())["warning"].startswith("Quality has collapsed")
    _, out, _ = run(*command, "-o", "again", "--json")
    assert json.loads(out)["warning"].startswith("Quality has collapsed")
