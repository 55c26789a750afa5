"""What a checkpoint says of its own making is read back, or left out where it is not of our form."""

from __future__ import annotations

import json

import pytest
from conftest import SMALL

from llmsurgeon.report.provenance import read_records, read_surgery


@pytest.fixture
def student(folder, run):
    """A checkpoint of ours in the working folder."""
    cut = ("--blocks", "2", "--no-refit", "--text", "text.txt")
    assert run("prune", "parent", *cut, *SMALL, "-o", "student")[0] == 0
    return folder / "student"


def test_what_run_writes_is_read(student):
    records = read_records(student)
    surgery = json.loads((student / "surgery.json").read_text())
    assert records is not None and records.surgery == surgery and records.before.blocks == 6
    assert records.recipe == (student / "recipe.yaml").read_text()
    read = read_surgery(student)
    assert read is not None and read.parents == [[0], [1], [3], [4], [5]]


@pytest.mark.parametrize("change", [
    {"before": {"blocks": "6"}}, {"before": None}, {"evaluation": {"perplexity": 1.0}}, {"evaluation": [1]},
    {"parent": 7},    {"gate_missed": "no"}, {"parents": [[-1]]}, {"parents": [0, 1]}, {"calibration": 5},
])  # fmt: skip
def test_what_is_not_of_our_form_is_left_out_and_said(student, run, change):
    (student / "checksums.b3").unlink()
    surgery = json.loads((student / "surgery.json").read_text())
    (student / "surgery.json").write_text(json.dumps({**surgery, **change}))
    assert read_records(student) is None
    code, _, err = run("export", "student", "--to", "surgeon", "-o", "OUT")
    assert code == 0 and f"surgery.json: not as llmsurgeon writes it ({next(iter(change))}" in err
    assert run("verify", "OUT")[0] == 0 and not (student.parent / "OUT/surgery.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a": ' + b"1" * 5000 + b"}"])
def test_heal_and_export_of_a_student_whose_records_is_damaged(student, run, content):
    (student / "checksums.b3").unlink()
    for name in ("surgery.json", "recipe.yaml"):
        (student / name).write_bytes(content)
    assert run("export", "student", "--to", "surgeon", "-o", "OUT")[0] == 0
    code, _, err = run("heal", "student", "--parent", "parent", "--dry-run")
    assert code == 2 and "neither block_configs nor surgery.json says which parent layers" in err, err
