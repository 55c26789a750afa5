"""Which tensors go into which weight file, in which order, and the index over the files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor

from llmsurgeon.checkpoint.index import WEIGHTS
from llmsurgeon.checkpoint.safetensors_file import encode_header
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.transform import TransformedWeights, rebase, root_of
from llmsurgeon.errors import SurgeryError


@dataclass(frozen=True)
class Shard:
    """One weight file to be: its tensors in file order, its header, its whole size in bytes."""

    file: str
    names: tuple[str, ...]
    header: bytes
    size: int

    @property
    def key(self) -> str:
        """Tells a finished file of this plan from one of another plan."""
        return sha256(self.header).hexdigest()


def meta_weights(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names, shapes and dtypes of `weights`, found without reading or computing any."""
    root = root_of(weights)
    meta = root.meta() if isinstance(root, Checkpoint) else {name: tensor.to("meta") for name, tensor in root.items()}
    made = rebase(weights, meta)
    return {name: made[name] for name in made}


def plan_shards(weights: Mapping[str, Tensor], meta: Mapping[str, Tensor], max_shard_bytes: int) -> list[Shard]:
    """Which tensors go into which file: layers in order, files of about one size, at most `max_shard_bytes` of tensors.

    A single tensor larger than the limit gets a file of its own.
    """
    sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in meta.items()}
    total = sum(sizes.values())
    # Files of one size finish together, and hashing one can overlap with writing the next.
    aim = total / max(1, -(-total // max_shard_bytes))
    contents: list[list[str]] = [[]]
    filled = 0
    placed = 0
    for name in file_order(weights):
        full = filled + sizes[name] > max_shard_bytes or placed + sizes[name] / 2 > aim * len(contents)
        if contents[-1] and full:
            contents.append([])
            filled = 0
        contents[-1].append(name)
        filled += sizes[name]
        placed += sizes[name]
    shards = []
    for number, names in enumerate(contents, start=1):
        file = WEIGHTS if len(contents) == 1 else f"model-{number:05}-of-{len(contents):05}.safetensors"
        # Wide dtypes first keeps every tensor aligned, whatever its number of elements.
        names.sort(key=lambda name: -meta[name].dtype.itemsize)
        header = encode_header([(n, meta[n].dtype, tuple(meta[n].shape)) for n in names], {"format": "pt"})
        shards.append(Shard(file, tuple(names), header, len(header) + sum(sizes[n] for n in names)))
    return shards


def file_order(weights: Mapping[str, Tensor]) -> list[str]:
    """Layers in numeric order, and names that one edit computes side by side."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    ordered: dict[str, None] = {}
    for name in sorted(weights, key=natural):
        group = weights.group(name) if isinstance(weights, TransformedWeights) else (name,)
        ordered.update(dict.fromkeys((name, *group)))
    return list(ordered)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number.

    Raises:
        SurgeryError: not a size.
    """
    # No file is larger than 2^63 bytes, which has 19 digits.
    match = re.fullmatch(r"(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?)(I?)B?", str(size).strip().upper())
    if match:
        number, prefix, binary = match.groups()
        made = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
        if made > 0:
            return made
    raise SurgeryError(f"{size!r} is not a file size; write it like 5GB, 500MB or 2GiB")


def index_json(shards: list[Shard], meta: Mapping[str, Tensor]) -> str:
    """model.safetensors.index.json: totals, and the file of each tensor."""
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in meta.values())
    index = {
        "metadata": {"total_parameters": sum(tensor.numel() for tensor in meta.values()), "total_size": total},
        "weight_map": dict(sorted((name, shard.file) for shard in shards for name in shard.names)),
    }
    return json.dumps(index, indent=2) + "\n"
