"""Where an output may be: not in what is read, not over what is somebody else's, and in a place that can be written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.checkpoint.manifest import strangers
from llmsurgeon.errors import SurgeryError

LONGEST_INSIDE = "x" * 80  # names of files inside


def place_of(out: str | os.PathLike[str], sources: Sequence[Path], single_file: bool) -> Path:
    """Where OUT is, links on the way resolved.

    Raises:
        SurgeryError: it cannot work there, or one of `sources`, which are read, lies in it.
    """
    if not os.fspath(out):
        raise SurgeryError("the name of the output is empty; give --out a name")
    path = local_path(out)
    # A file that is a link is replaced itself; a folder is where its link leads.
    target = Path(os.path.realpath(path.parent), path.name) if single_file else Path(os.path.realpath(path))
    _check_place(target, single_file)
    _check_sources(target, sources, single_file)
    return target


def partial_of(target: Path) -> Path:
    """The staging folder of an output."""
    return target.with_name(f"{target.name}.partial")


def _check_place(target: Path, single_file: bool) -> None:
    kind = "file" if single_file else "folder"
    if not target.name or os.path.ismount(target):
        raise SurgeryError(f"{target}: is where a file system is mounted; choose a {kind} inside it")
    if os.path.realpath(os.getcwd()) == str(target):
        raise SurgeryError(f"{target}: is the working folder; choose a {kind} inside it")
    parent = next(path for path in target.parents if os.path.lexists(path))
    if not parent.is_dir():
        raise SurgeryError(f"{target.parent}: cannot be created, because {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SurgeryError(f"{parent}: no permission to write here; choose another output {kind}")
    folder = partial_of(target)
    try:
        os.lstat(folder / "result" / LONGEST_INSIDE)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SurgeryError(f"{target}: this name is too long for the file system; choose a shorter one") from None
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or os.path.ismount(folder)):
        raise SurgeryError(
            f"{folder}: is needed to prepare {target.name} and is a file, a link or a mount point; move it away or "
            "choose another output"
        )
    if os.path.lexists(target) and _sticky(parent) and os.lstat(target).st_uid != os.geteuid():
        raise SurgeryError(f"{target}: belongs to another user; choose another output {kind}")


def _sticky(folder: Path) -> bool:
    """True where a folder lets its files be renamed by their owners alone (as /tmp does), and we are not above that."""
    found = folder.stat()
    return bool(found.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, found.st_uid)


def _check_sources(target: Path, sources: Sequence[Path], single_file: bool) -> None:
    """Raise where something that the run reads lies in what it will replace."""
    folders = [target, partial_of(target)]
    for source in sources:
        inside = [path for path in source.iterdir() if path.is_symlink()] if source.is_dir() else []
        for path in (source, *inside):
            real = Path(os.path.realpath(path))
            if not any(_same(above, folder) for folder in folders for above in (real, *real.parents)):
                continue
            if single_file or real.is_dir():
                kind = "name" if single_file else "output folder"
                raise SurgeryError(f"{target}: is where the model is read from; choose another {kind}")
            raise SurgeryError(f"{target}: holds {path}, which this run reads; choose another output folder")


def existing(*names: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    """Those of some names that are files or folders here; a dataset's may be of the hub."""
    return tuple(Path(name) for name in names if name is not None and os.path.exists(name))


def _same(one: Path, other: Path) -> bool:
    """True for two names of one thing, be it under another mount or in another case."""
    if one == other:
        return True
    with suppress(OSError):
        return os.path.samestat(os.stat(one), os.stat(other))
    return False


def check_existing(target: Path, overwrite: bool, single_file: bool) -> None:
    """Raise where OUT is there and may not be replaced."""
    if not os.path.lexists(target):
        return
    if single_file:
        _check_existing_file(target, overwrite)
        return
    if not target.is_dir():
        raise SurgeryError(f"{target}: exists and is not a folder; choose another output folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise SurgeryError(f"{target}: exists already; choose another output folder or pass --overwrite")
    found = strangers(target)
    if not found.manifest:
        raise SurgeryError(
            f"{target}: holds files and was not written by llmsurgeon (there is no checksums file of it), so it is not "
            "overwritten; delete it yourself"
        )
    if found.foreign:
        raise SurgeryError(
            f"{target}: holds {found.foreign[0]}, which llmsurgeon did not write, so it is not overwritten; move that "
            "away or choose another output folder"
        )
    if not os.access(target, os.W_OK | os.X_OK):
        raise SurgeryError(f"{target}: no permission to replace it; choose another output folder")


def _check_existing_file(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise SurgeryError(f"{target}: is a folder; choose another name")
    if not overwrite:
        raise SurgeryError(f"{target}: exists already; choose another name or pass --overwrite")
    if not target.is_symlink() and not stat.S_ISREG(os.lstat(target).st_mode):
        raise SurgeryError(f"{target}: is not a file that can be replaced; choose another name")
