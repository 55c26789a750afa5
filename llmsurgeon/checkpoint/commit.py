"""The steps by which an output takes the place of the one before."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from llmsurgeon.checkpoint.atomic import exchange
from llmsurgeon.checkpoint.checksums import file_sha256
from llmsurgeon.checkpoint.manifest import own_manifest, strangers


def identity(path: Path, single_file: bool) -> str | None:
    """What tells one result from another; None where there is none."""
    if single_file:
        return "there" if os.path.lexists(path) else None
    manifest = own_manifest(path)
    return file_sha256(manifest) if manifest else None


def swap_folders(result: Path, out: Path, aside: Path) -> None:
    """Give the folder `result` the name `out`; one that is there, and not empty, becomes `result` or `aside`."""
    if not out.exists() or not any(out.iterdir()):
        os.rename(result, out)
    elif not exchange(result, out):
        os.rename(out, aside)
        try:
            os.rename(result, out)
        except BaseException:
            os.rename(aside, out)
            raise


def remove_written(folder: Path) -> bool:
    """Delete the files that a folder's manifest names, and the folder; False where others are in it, which stay."""
    found = strangers(folder)
    for name in found.ours:
        (folder / name).unlink(missing_ok=True)
    if found.manifest:
        found.manifest.unlink(missing_ok=True)
    for inside in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            inside.rmdir()
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def remove(path: Path) -> None:
    """Delete a file, a link or a folder of ours, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
