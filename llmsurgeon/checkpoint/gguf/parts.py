"""GGUF files in several parts, as llama.cpp's gguf-split writes them: NAME-00001-of-00003.gguf and so on.

The first part has the metadata, each has some of the tensors; `split.no`, `split.count` and `split.tensors.count` of
each say how they belong together.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from llmsurgeon.checkpoint.gguf.file import GGUFEntry, GGUFFile
from llmsurgeon.errors import CheckpointError

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def open_gguf(path: Path) -> GGUFFile:
    """A GGUF file, with all of its parts where it is one of several (any of them may be named).

    Raises:
        CheckpointError: as `GGUFFile`, or parts that are missing or do not belong together.
    """
    file = GGUFFile(path)
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return file
    names = part_names(path, count)
    return SplitGGUF(path.with_name(names[0]), names)


def part_names(path: Path, count: int) -> list[str]:
    """Names of the `count` files of which `path` is one, all of which must be there."""
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: it is one of {count} parts, which are found by their names: call them "
            f"NAME-00001-of-{count:05}.gguf to NAME-{count:05}-of-{count:05}.gguf, as llama.cpp does"
        )
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent}: of the {count} parts of this GGUF file {', '.join(missing[:3])}"
            f"{' and more' if len(missing) > 3 else ''} {'is' if len(missing) == 1 else 'are'} missing; "
            "put all of them into one folder"
        )
    return names


def one_model(files: list[Path]) -> Path | None:
    """The first of these files where they are the parts of one model, else None."""
    matches = [PART.fullmatch(file.name) for file in files]
    kinds = {match and (match["stem"], match["count"]) for match in matches}
    if len(kinds) != 1 or None in kinds:
        return None
    return min(files)


class SplitGGUF(GGUFFile):
    """The parts of one GGUF file as if they were one: the first one's metadata, the tensors of all."""

    def __init__(self, path: Path, names: list[str]) -> None:
        super().__init__(path)
        self._parts = (self, *(GGUFFile(path.with_name(name)) for name in names[1:]))
        promised = self.metadata.get("split.tensors.count")
        self._part_of: dict[str, GGUFFile] = {}
        entries: dict[str, GGUFEntry] = {}
        for number, part in enumerate(self._parts):
            found = part.metadata.get("split.no"), part.metadata.get("split.count")
            if found != (number, len(names)):
                raise CheckpointError(
                    f"{part.path}: by its name it is part {number + 1} of {len(names)}, its metadata say split.no "
                    f"{found[0]} (counted from 0) and split.count {found[1]}; the parts are of different files"
                )
            for name, entry in part.entries.items():
                if name in entries:
                    raise CheckpointError(f"{part.path}: tensor {name!r} is in {self._part_of[name].path.name}, too")
                entries[name], self._part_of[name] = entry, part
        if promised is not None and promised != len(entries):
            raise CheckpointError(f"{path}: its parts hold {len(entries)} tensors, split.tensors.count says {promised}")
        self.entries = entries
        for key in [key for key in self.metadata if key.startswith("split.")]:
            del self.metadata[key], self.kinds[key]

    @property
    def parts(self) -> tuple[GGUFFile, ...]:
        return self._parts

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        part = self._part_of[name]
        return super().rows(name, first, last) if part is self else part.rows(name, first, last)

    def bytes_of(self, entry: GGUFEntry, start: int, end: int) -> bytes:
        part = self._part_of[entry.name]
        return super().bytes_of(entry, start, end) if part is self else part.bytes_of(entry, start, end)
