"""The manifest of a folder: the checksum of each of its files, written beside them, checked afterwards.

`checksums.b3`, `checksums.sha256` or `checksums.none`: the kind of checksum gives the name (`checksums.CHECKSUMS`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from llmsurgeon.checkpoint.checksums import MANIFESTS, Checksum, file_sum, is_sum
from llmsurgeon.checkpoint.files import opened
from llmsurgeon.checkpoint.index import INDEX, WEIGHTS, read_index
from llmsurgeon.checkpoint.safetensors_file import SafetensorsFile
from llmsurgeon.errors import CheckpointError

MARK = "# Written by llmsurgeon; it may replace the files named here, and no other."


def write_manifest(folder: Path, checksum: Checksum, known: Mapping[str, str]) -> None:
    """Write the manifest over every visible file of `folder`; `known` holds the sums that need no reading.

    It carries a mark by which it is known as ours: a line of comment, or, where the tools that read it know no
    comments, the first line said once more at the end.
    """
    path = folder / checksum.manifest
    path.unlink(missing_ok=True)  # never through a link
    lines = [f"{known.get(name) or file_sum(file, checksum)}  {name}\n" for name, file in _files(folder, path).items()]
    # Sizes alone may be another run's: a line of its own tells the two apart.
    marked = [f"{MARK}\n", f"# {uuid4()}\n", *lines] if checksum.comments else [*lines, *lines[:1]]
    with path.open("x", encoding="utf-8") as file:
        file.writelines(marked)


@dataclass(frozen=True)
class Strangers:
    """What a folder holds: the manifest that carries our mark, the files that it names, and whatever else is there.

    Names are relative; of a folder that the manifest knows nothing of, the folder's name alone.
    """

    manifest: Path | None
    ours: tuple[str, ...]
    foreign: tuple[str, ...]


def strangers(folder: Path) -> Strangers:
    """Tell what this tool wrote into a folder from what it did not."""
    manifest = own_manifest(folder)
    ours = tuple(read_manifest(manifest)) if manifest else ()
    known = {*ours, manifest.name} if manifest else set()
    folders = {name.rpartition("/")[0] for name in ours} - {""}
    foreign: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink() and name in folders:
            continue
        inside_foreign = any(name.startswith(f"{other}/") for other in foreign)
        if (name not in known or path.is_symlink() or path.is_dir()) and not inside_foreign:
            foreign.append(name)
    return Strangers(manifest, ours, tuple(foreign))


def own_manifest(folder: Path) -> Path | None:
    """The manifest of a folder that this tool wrote, which carries its mark; None where there is none."""
    for path in _manifests(folder):
        with suppress(CheckpointError):
            if not path.is_symlink() and read_manifest(path) and _marked(path):
                return path
    return None


def _marked(manifest: Path) -> bool:
    lines = _lines(manifest)
    return lines[0] == MARK or (not MANIFESTS[manifest.name].comments and len(lines) > 1 and lines[0] == lines[-1])


def _manifests(folder: Path) -> list[Path]:
    """The manifests that a folder holds, ours and others'."""
    return [folder / name for name in MANIFESTS if (folder / name).exists()]


def _lines(manifest: Path) -> list[str]:
    try:
        with opened(manifest) as file:
            return file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{manifest}: cannot be read ({error})") from error


def read_manifest(manifest: Path) -> dict[str, str]:
    """File name -> checksum, of the kind that the manifest is named by.

    Raises:
        CheckpointError: missing or malformed.
    """
    checksum = MANIFESTS[manifest.name]
    sums: dict[str, str] = {}
    for number, line in enumerate(_lines(manifest), start=1):
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+) [ *](.+)", line)
        if not match or not is_sum(match[1], checksum) or not is_plain(match[2]):
            raise CheckpointError(f"{manifest}: line {number} is not a {checksum.title} and a file name")
        if sums.setdefault(match[2], match[1]) != match[1]:
            raise CheckpointError(f"{manifest}: line {number} gives {match[2]} another {checksum.title} than before")
    return sums


def verify_files(folder: Path) -> list[str]:
    """Every problem with the files of a checkpoint folder; an empty list where all is well.

    Checks the sums, that nothing is missing or extra, the headers of the weight files, and the index against them.
    A checkpoint without a manifest (not written by this tool) is checked for the rest.
    """
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    problems = [problem for manifest in _manifests(folder) for problem in _manifest_problems(manifest)]
    weights: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            weights[path.name] = set(SafetensorsFile(path).entries)
        except CheckpointError as error:
            problems.append(str(error))
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        problems += _index_problems(folder, weights)
    return problems


def _manifest_problems(manifest: Path) -> list[str]:
    try:
        sums = read_manifest(manifest)
    except CheckpointError as error:
        return [str(error)]
    folder, checksum = manifest.parent, MANIFESTS[manifest.name]
    present = _files(folder, manifest)
    problems = [f"{folder / name}: missing, the manifest lists it" for name in sums if name not in present]
    problems += [f"{path}: not in the manifest" for name, path in present.items() if name not in sums]
    for name, path in present.items():
        if name in sums and file_sum(path, checksum) != sums[name]:
            problems.append(f"{path}: its content is not what was written ({checksum.title} differs)")
    return problems


def _index_problems(folder: Path, weights: Mapping[str, set[str]]) -> list[str]:
    try:
        index = read_index(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = [
        f"{folder / INDEX}: tensor {name!r} should be in {shard}, which does not have it"
        for name, shard in index.items()
        if shard in weights and name not in weights[shard]
    ]
    for shard, names in weights.items():
        problems += [
            f"{folder / INDEX}: does not list tensor {name!r} of {shard}" for name in sorted(names - set(index))
        ]
    return problems


def is_plain(name: str) -> bool:
    """True for the name of a file, or of a file in one folder, that can only lie inside a checkpoint."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..") and Path(part).name == part for part in parts)


def _files(folder: Path, manifest: Path) -> dict[str, Path]:
    """Visible files of a checkpoint by name, those in its folders (pooling configs) included, but for the manifest."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if path != manifest and not re.search(r"(^|/)\.", name)}
