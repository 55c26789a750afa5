"""The named parts of a job."""

from __future__ import annotations

import json

from llmsurgeon.checkpoint.job import differences, fingerprint_of
from llmsurgeon.checkpoint.journal import JOURNAL
from llmsurgeon.checkpoint.writer import Stage


def test_a_job_is_the_same_whatever_the_order_of_its_parts():
    assert fingerprint_of({"a": "1", "b": "2"}) == fingerprint_of({"b": "2", "a": "1"})
    others = [{"a": "1"}, {"a": "1", "b": "3"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}]
    assert len({fingerprint_of(job) for job in ({"a": "1", "b": "2"}, *others)}) == 5


def test_what_differs_is_named():
    before = {"dtype": "float32", "text a.txt": "a" * 64, "device": "cpu", "gone": "1"}
    now = {"dtype": "bfloat16", "text a.txt": "b" * 64, "device": "cpu", "new": "2"}
    found = differences(before, now)
    assert found == ["dtype is bfloat16 and was float32", "text a.txt changed", "new is new", "gone is gone"]
    assert differences(now, dict(now)) == []


def test_the_journal_keeps_the_parts(tmp_path):
    with Stage.open(tmp_path / "out", job={"dtype": "float32"}) as stage:
        (stage.scratch / "kept").write_text("x")
    journal = json.loads((tmp_path / "out.partial" / JOURNAL).read_text())
    assert journal["job"] == {"dtype": "float32"} and journal["fingerprint"] == fingerprint_of({"dtype": "float32"})
