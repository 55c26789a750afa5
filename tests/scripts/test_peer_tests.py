"""What the table of transformers' own tests counts; the tests themselves are run by scripts/peer_tests."""

from __future__ import annotations

from pathlib import Path


def test_what_the_parent_alone_passes_is_listed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    from peer_tests import rows

    theirs = {"a": "", "b_0_half": "", "b_1_whole": "", "c": "broken", "d": "skipped", "e": "", "f": ""}
    mine = {"a": "", "b_0_half": "x | y", "b_1_whole": "x | y", "c": "broken", "d": "", "e": "skipped"}
    line, lost = rows("surgeon-llama", mine, theirs)
    assert line == "| surgeon-llama | 5 of 6 | 2 of 5 | 3 |"
    assert lost == ["| surgeon-llama | `b`, 2 times | x / y |", "| surgeon-llama | `f` | is gone |"]
