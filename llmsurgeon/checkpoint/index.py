"""Which files of a folder hold its weights: the names that are looked for, and the index of shards."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from llmsurgeon.boundary.foreign import local_path, read_json
from llmsurgeon.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_index(folder: Path) -> dict[str, str]:
    """`weight_map` of the index: tensor name -> shard, checked to be files of this very folder.

    Raises:
        CheckpointError: malformed, a shard is missing, or a shard lies outside the folder.
    """
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    for shard in sorted(set(weight_map.values())):
        if shard in ("", ".", "..") or {PurePosixPath(shard).name, PureWindowsPath(shard).name} != {shard}:
            raise CheckpointError(f"{path}: shard {shard!r} points outside the folder; refused")
        there = local_path(folder / shard).exists()  # first: it refuses names that no file can have
        refuse_dead_link(folder / shard)
        if not there:
            needs = sum(1 for s in weight_map.values() if s == shard)
            raise CheckpointError(f"{folder}: shard {shard} is missing ({needs} tensors); download it again")
        if not _inside(folder, folder / shard):
            target = (folder / shard).readlink()
            raise CheckpointError(
                f"{path}: shard {shard!r} is a link to {target}, which leads outside the folder; refused. Put the file "
                "itself here (cp --dereference), or give the folder that the files lie in"
            )
    return weight_map


def refuse_dead_link(file: Path) -> None:
    """Raise CheckpointError for a link to a file that is not there."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(f"{file}: a link to {file.readlink()}, which is not there; put the file itself here")


def _inside(folder: Path, file: Path) -> bool:
    """True where `file`, links followed, stays in `folder` or in the blobs of the hub cache that `folder` is in."""
    real, root = file.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return True
    return root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
