"""Text that a user names: every kind of file is read as what it is, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from conftest import byte_tokenizer
from pyarrow import parquet
from typer.testing import CliRunner

from llmsurgeon.cli.main import app
from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.healing.distill.data import Text, read_rows
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.documents import documents
from llmsurgeon.text.files import file_text, kind_of
from llmsurgeon.text.wanted import Calibration

LETTERS = "abcdefghijklmnopqrstuvwxyz"
REFUSED = {
    "a.json": "where it has one object a line, call it .jsonl",
    "a.JSON": "call it .jsonl",
    "a.csv": "call it .txt",
    "a.md": "call it .txt",
    "a.html": "call it .txt",
    "a.txt.gz": "unpack it first",
    "a.jsonl.zst": "unpack it first",
    "a.pdf": "expected .txt",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_suffixes_are_refused_by_name(tmp_path, monkeypatch, name):
    """By every reader: measured as prose, markup would count as the model's failure."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text('{"text": "' + LETTERS + '"}\n', encoding="utf-8")
    readers = (
        lambda: file_text(name),
        lambda: list(documents(text=name)),
        lambda: Calibration(text=name),
        lambda: calibration_sequences("m", byte_tokenizer(), Calibration(text=name, tokens=16, sequence_length=8)),
        lambda: read_rows(byte_tokenizer(), 8, Text(text=name)),
    )
    for reader in readers:
        with pytest.raises(SurgeryError, match=rf"{name}: .* are not read as text: .*{REFUSED[name]}"):
            reader()
    for command in (["eval", "m"], ["analyze", "m"], ["run", "r.yaml", "m"], ["heal", "m", "--parent", "m"]):
        found = CliRunner().invoke(app, [*command, "--text", name])
        assert isinstance(found.exception, SurgeryError) and REFUSED[name] in str(found.exception)
    for step in (
        f"calibration: {{text: {name}}}\nsteps: [{{op: refit}}]",
        f"steps: [{{op: distill, data: [{{text: {name}}}]}}]",
        f"steps: [{{op: trim_vocab, keep: {{text: {name}}}}}]",
    ):
        with pytest.raises(RecipeError, match="are not read as text"):
            loads(f"version: 1\n{step}\n")


def test_case_does_not_matter(tmp_path):
    assert [kind_of(name) for name in ("A.TXT", "b.JsonL", "c.PARQUET", "README", "/dev/fd/63")] == [
        "text",
        "jsonl",
        "parquet",
        "text",
        "text",
    ]
    (tmp_path / "A.JSONL").write_text(json.dumps({"text": LETTERS}))
    assert file_text(str(tmp_path / "A.JSONL")) == LETTERS


@pytest.mark.parametrize("name", ("a.txt", "a.jsonl"))
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = LETTERS if name == "a.txt" else json.dumps({"text": LETTERS})
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert file_text(str(tmp_path / name)) == LETTERS
    assert ["".join(pieces) for pieces in documents(text=str(tmp_path / name))] == [LETTERS]


@pytest.mark.parametrize("encoding", ("utf-16", "utf-16-le", "utf-16-be"))
@pytest.mark.parametrize("name", ("a.txt", "a.jsonl"))
def test_utf_16_is_refused(tmp_path, encoding, name):
    (tmp_path / name).write_text(json.dumps({"text": LETTERS}), encoding=encoding)
    with pytest.raises(SurgeryError, match=r"UTF-16|expected a JSON object"):
        file_text(str(tmp_path / name))


def test_rows_without_text_are_skipped_and_counted(tmp_path, capsys):
    rows = [LETTERS, None, "", "ABC", None]
    parquet.write_table(pyarrow.table({"text": rows, "other": [1] * 5}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        assert file_text(str(tmp_path / name)) == f"{LETTERS}\n\nABC"
        assert f'{name}: 2 of 5 rows have no text (null under "text") and are left out' in capsys.readouterr().err


def test_a_hub_dataset_with_nulls(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    rows = [{"text": LETTERS}, {"text": None}] * 3
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ["".join(pieces) for pieces in documents(dataset=str(tmp_path / "set"))]
    assert found == [LETTERS] * 3 and "3 of 6 rows have no text" in capsys.readouterr().err


def test_columns(tmp_path):
    parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SurgeryError, match=r'a.parquet: no column "text"; it has content, id'):
        file_text(str(tmp_path / "a.parquet"))
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), tmp_path / "b.parquet")
    with pytest.raises(SurgeryError, match=r'b.parquet, row 0: "text" is list, expected a string'):
        file_text(str(tmp_path / "b.parquet"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n[1]')
    with pytest.raises(SurgeryError, match=r"line 2: expected a JSON object .* found list"):
        file_text(str(tmp_path / "a.jsonl"))


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    parquet.write_table(pyarrow.table({"text": [LETTERS]}), tmp_path / "a[1]*.parquet")
    assert file_text(str(tmp_path / "a[1]*.parquet")) == LETTERS


def test_the_same_bytes_are_other_documents_under_another_suffix(tmp_path, monkeypatch):
    """Tokens of one are not taken from the cache for the other."""
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    content = "\n".join(json.dumps({"text": LETTERS}) for _ in range(4))
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(content)
    plain, lines = (read_rows(byte_tokenizer(), 8, Text(text=str(tmp_path / name))) for name in ("a.txt", "a.jsonl"))
    assert plain.key != lines.key and len(plain.tokens) > len(lines.tokens)
