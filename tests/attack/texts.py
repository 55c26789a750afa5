"""Texts to calibrate and to measure on: .txt, .jsonl and .parquet."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from tests.attack.ground import SMALL
from tests.attack.mutations import mutated_json, raw
from tests.attack.scene import Scene, Verdict

LINES = (
    '{"text": null}', '{"text": 5}', '{"text": ["a"]}', '{"other": "x"}', "null", "[]", '"x"', "{", "", "NaN",
    '{"text": "\\ud800"}', '{"text": ""}',
    '{"text": "a", "text": "b"}', "[" * 5000, "1" * 5000,
)  # fmt: skip
SUFFIXES = (".json", ".csv", ".JSONL", ".TXT", "", ".md", ".gz", ".parquet", ".jsonl", ".txt")


def attempt(draw: Random, scene: Scene) -> Verdict:
    scene.copy("llama")
    name = draw.choice(("text.txt", "text.jsonl", "text.jsonl", "text.parquet"))
    file = scene.copy(name)
    match draw.choice(("raw", "raw", "lines", "name", "kind", "odd")):
        case "lines" if name == "text.jsonl":
            lines = file.read_text().splitlines()
            lines[draw.randrange(len(lines))] = odd = draw.choice(LINES)
            file.write_text("\n".join(lines))
            what = f"a line {odd[:30]!r}"
        case "lines" if name == "text.parquet":
            what = _columns(draw, file)
        case "name":
            file = file.rename(
                file.with_name(f"{draw.choice(('text', 'ﬁ text', 'n' * 240, '-x', 'a[b]'))}{draw.choice(SUFFIXES)}")
            )
            what = f"{name} is called {file.name[:30]!r}"
        case "kind":
            file.unlink()
            what = draw.choice(("a folder", "a dead link", "a link to itself", "/dev/zero", "unreadable"))
            if what == "a folder":
                file.mkdir()
            elif what == "unreadable":
                file.write_text("a")
                file.chmod(0)
            else:
                os.symlink({"a dead link": "nobody", "a link to itself": file.name}.get(what, what), file)
        case "odd":
            made = draw.choice(
                (
                    b"",
                    b"\n" * 999,
                    b"a",
                    b"\xef\xbb\xbf",
                    b"\0" * 500,
                    b"\xff" * 500,
                    "🤷🏽‍♀️ ﷽ e\u0301".encode() * 50,
                    b"a" * 300_000,
                )
            )
            file.write_bytes(made)
            what = f"{name} holds {made[:10]!r} ({len(made)} bytes)"
        case _:
            content = file.read_bytes()
            if name == "text.jsonl" and draw.random() < 0.5:
                lines = content.splitlines()
                at = draw.randrange(len(lines))
                lines[at], what = mutated_json(
                    draw, json.dumps({"text": "the fox jumps " * 5}).encode(), ("text", "content", "")
                )
                content = b"\n".join(lines)
            else:
                content, what = raw(draw, content)
            file.write_bytes(content)
    short = ["--tokens", "128", "--seq-len", "16"]
    text = ["--text", file.name] if not file.name.startswith("-") else [f"--text={file.name}"]
    where = draw.choice((
        ["eval", "llama", *text, *short], ["analyze", "llama", "-o", "OUT", *text, *short], ["fuse", "llama",
        "--drop-count", "1", "-o", "OUT", *text, *SMALL],
        ["heal", "llama", "--parent", "llama", "-o", "OUT", *text, "--minutes", "0.02", "--set",
        "distill.sequence_length=16", "--set", "distill.batch=2"],
        ["ternary", "llama", "--share", "0.5", "-o", "OUT", *text, *SMALL],
    ))  # fmt: skip
    return scene.check(where, what)


def _columns(draw: Random, file: Path) -> str:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "nulls": {"text": ["abc the fox"] * 5 + [None] * 5},
        "numbers": {"text": [1, 2, 3]},
        "lists": {"text": [["a"], ["b"]]},
        "no column text": {"other": ["a"]},
        "no rows": {"text": pyarrow.array([], pyarrow.string())},
        "bytes": {"text": [b"\xff", b"a"]},
        "only nulls": {"text": pyarrow.array([None, None], pyarrow.string())},
        "no columns": {},
    }
    name = draw.choice(list(columns))
    parquet.write_table(pyarrow.table(columns[name]), file)
    return f"parquet: {name}"
