"""Names of files and folders in what is written and may be published: where a disk has them is nobody's business.

What has to be found again is named relative to the folder of the file that names it; all else, and what lies far away
from what is published, by its last part.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# An absolute path's folders: /a/b/ or ~/a/ or C:\\a\\, not the slashes of an address or of owner/name.
FOLDERS = re.compile(r"(?<![\w./:~-])(?:~?/|[A-Za-z]:\\)(?:[^\s/\\\"'`,;:()]+[/\\])+")


def without_folders(text: str, *known: str | None) -> str:
    """A text in which paths are cut to their last part: absolute ones, and those `known` that lead out of here."""
    for path in known:
        if path and path.startswith(("/", "~", ".")):
            text = text.replace(path, Path(path).name)
    return FOLDERS.sub("", text)


def everywhere(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    if isinstance(value, dict):
        return {key: everywhere(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [everywhere(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def relative(name: str, folder: Path) -> str:
    """A file or folder of this disk as `folder` reaches it, `./x` or `../x`; hub ids and what is not there stay."""
    if not os.path.exists(os.path.expanduser(name)):
        return name
    real = os.path.realpath(os.path.expanduser(name))
    made = os.path.relpath(real, os.path.realpath(folder))
    return made if made.startswith("..") else f"./{made}"


def published(name: str, folder: Path) -> str:
    """As `relative`, for what may be passed on: what lies beside `folder`, or below that; all else by its last part."""
    made = relative(name, folder)
    return Path(made).name if made.startswith("../../") or os.path.isabs(made) or made.startswith("~") else made


def found(name: str, folder: Path) -> str:
    """The inverse, for a name in a file in `folder`: `./x` and `../x` that are there; all else unchanged."""
    if not name.startswith(("./", "../")):
        return name
    beside = folder / name
    return os.path.relpath(beside) if beside.exists() else name
