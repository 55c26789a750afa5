"""Run a unit's cases and write down what each said and made."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.golden.cases import Case
from tests.golden.parents import Unit, text

# Files of an output that are written down as they are; of all others a hash is.
AS_THEY_ARE = (".json", ".yaml", ".md", ".html", ".jsonl")
HASHED = ("tokenizer.json", "checksums.b3")
TIMES = {"seconds", "minutes_taken", "tokens_per_second", "time", "hours", "elapsed"}


@dataclass
class Made:
    """What a case came to: file name -> text of it, everything volatile replaced."""

    name: str
    code: int
    said: str
    files: dict[str, str] = field(default_factory=dict)
    resolved: bool = False

    @property
    def crashed(self) -> bool:
        """It ended with a traceback, which is never right."""
        return "Traceback (most recent call last)" in self.said


def normal(said: str, folder: Path) -> str:
    """A text without what differs from one run to the next: folders, versions, times and speeds."""
    from llmsurgeon import __version__

    for place in {str(folder.resolve()), str(folder)}:
        said = said.replace(place, "<folder>")
    said = re.sub(r'("(?:llmsurgeon|transformers_version|torch|version)": )"[^"]*"', r'\1"<version>"', said)
    said = said.replace(f"llmsurgeon {__version__}", "llmsurgeon <version>")
    # Whether the hub may be asked depends on where this runs.
    said = re.sub(r"(not in the hub cache), and [^\n\"]*", r"\1", said)
    names = "|".join(sorted(TIMES))
    said = re.sub(rf'("(?:{names})": )[-+.e0-9]+', r'\1"<time>"', said)
    said = re.sub(r'"phases": \{[^}]*\}', '"phases": "<times>"', said)
    said = re.sub(r'"estimate": \{.*?\}\}', '"estimate": "<by rates>"', said)
    said = re.sub(r"(on this machine: )about[^;\n]*", r"\1<by rates>", said)
    said = re.sub(r"(<dt>Tokens a second</dt><dd>)[^<]*", r"\1<speed>", said)
    said = re.sub(r"(<h2>Where the time went</h2>).*?(?=</section>)", r"\1<times>", said, flags=re.DOTALL)
    said = re.sub(
        r"\b\d[\d,.]* (seconds|second|minutes|minute|ms|s|tokens a second|tokens/s)(?![\w-])", r"<time> \1", said
    )
    return said


def recorded(unit: Unit, names: frozenset[str] = frozenset()) -> Iterator[Made]:
    """Write down the parent, then run the unit's cases one after the other in a folder of their own.

    names: the cases to run; all, if none are given.
    """
    # Resolved: messages may name the folder either way.
    with tempfile.TemporaryDirectory(prefix="llmsurgeon-golden-") as place:
        folder = Path(place).resolve() / "work"
        folder.mkdir()
        with _inside(folder):
            with _heard():
                unit.prepare(folder)
            (folder / "text.txt").write_text(text())
            (folder / "some.txt").write_text(text()[:40])
            if (folder / "parent").exists():
                yield Made("parent", 0, "", written_down(folder / "parent", folder))
            for case in unit.cases:
                if not names or case.name in names:
                    yield _made(case, folder)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, with caches beside it and nothing of the user's."""
    changed = {
        "LLMSURGEON_CACHE": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "TMPDIR": str(folder.parent),
    }
    before, here = {name: os.environ.get(name) for name in changed}, Path.cwd()
    os.environ.update(changed)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _heard() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """What is printed, in place of printing it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield out, err


def _made(case: Case, folder: Path) -> Made:
    if case.recipe is not None:
        (folder / f"{case.name}.yaml").write_text(case.recipe)
    code, out, err = _run(case)
    asked = " ".join(("llmsurgeon", *case.arguments)) if case.resolved is None else f"resolved {case.resolved}"
    said = f"$ {asked}\nexit code {code}\n--- stdout\n{out}\n--- stderr\n{err}"
    said = "".join(f"{line.rstrip()}\n" for line in said.splitlines())
    made = Made(case.name, code, normal(said, folder), resolved=case.resolved is not None)
    if case.out:
        made.files = written_down(folder / case.out, folder)
    return made


def _run(case: Case) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a case."""
    from llmsurgeon.cli.main import main

    with _heard() as (out, err):
        try:
            if case.resolved is None:
                main(list(case.arguments))
            else:
                print(resolved(case.resolved), end="")
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            traceback.print_exc(file=sys.stderr)
            code = 1
    return int(code), out.getvalue(), err.getvalue()


def resolved(name: str) -> str:
    """A recipe that comes along with every default written out, which no command prints."""
    import llmsurgeon

    for found in pkgutil.walk_packages(llmsurgeon.__path__, "llmsurgeon."):
        if found.name.rpartition(".")[2] == "recipe":
            recipes = importlib.import_module(found.name)
            if hasattr(recipes, "load") and hasattr(recipes, "dump"):
                return str(recipes.dump(recipes.load(name)))
    raise LookupError("no module named recipe loads and dumps recipes")


def written_down(out: Path, folder: Path) -> dict[str, str]:
    """What is in an output: its texts, its tensors, and hashes of everything else."""
    if not out.exists():
        return {}
    paths = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    base = out.parent if out.is_file() else out
    files: dict[str, str] = {}
    tensors: list[str] = []
    hashes: list[str] = []
    code: list[str] = []
    for path in paths:
        name = path.relative_to(base).as_posix()
        if path.suffix in AS_THEY_ARE and path.name not in HASHED:
            files[name] = normal(path.read_text(), folder)
        elif path.suffix == ".safetensors":
            tensors += [f"{name} {line}" for line in _safetensors(path)]
        elif path.suffix == ".gguf":
            tensors += [f"{name} {line}" for line in _gguf(path)]
        elif path.name != "checksums.b3":
            (code if path.suffix == ".py" else hashes).append(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    files["files.txt"] = "".join(f"{path.relative_to(base).as_posix()}\n" for path in paths)
    files["tensors.txt"] = "".join(f"{line}\n" for line in tensors)
    files["code.txt"] = "".join(f"{line}\n" for line in code)
    files["hashes.txt"] = "".join(f"{line}\n" for line in hashes)
    return {name: content for name, content in files.items() if content}


def _safetensors(path: Path) -> list[str]:
    """Name, dtype, shape and hash of each tensor, in the file's order of names."""
    held = path.read_bytes()
    start = 8 + int.from_bytes(held[:8], "little")
    header: Mapping[str, Any] = json.loads(held[8:start])
    lines = [f"metadata: {json.dumps(header['__metadata__'], sort_keys=True)}"] if "__metadata__" in header else []
    for name, entry in sorted(header.items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(held[start + begin : start + end]).hexdigest()
            lines.append(f"{name} {entry['dtype']} {'x'.join(map(str, entry['shape']))} {digest}")
    return lines


def _gguf(path: Path) -> list[str]:
    """The metadata of a GGUF file, long values as hashes, and name, type, shape and hash of each tensor."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    lines = []
    for key, value in sorted(reader.fields.items()):
        told = json.dumps(value.contents(), default=str)
        lines.append(f"{key}: {told if len(told) <= 120 else hashlib.sha256(told.encode()).hexdigest()}")
    for tensor in reader.tensors:
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        shape = "x".join(str(int(size)) for size in tensor.shape)
        lines.append(f"{tensor.name} {tensor.tensor_type.name} {shape} {digest}")
    return lines
