"""In which dtype a checkpoint's numbers are stored, and in which they are computed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.errors import CheckpointError
from llmsurgeon.progress import remark


def stored_dtype(meta: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype most numbers are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in meta.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def plain_dtype(meta: Mapping[str, Tensor], config: Mapping[str, Any]) -> torch.dtype:
    """What a model with these tensors is computed in, whatever the device: the dtype most of its numbers have.

    Numbers of 8 bits without scales are computed in what the config says, as transformers does, or in bfloat16.

    Raises:
        CheckpointError: most of the numbers are whole ones.
    """
    stored = stored_dtype(meta)
    if not stored.is_floating_point:
        kind = str(stored).removeprefix("torch.")
        raise CheckpointError(
            f"most of its numbers are {kind}, packed by a quantiser that config.json does not name; "
            "take the checkpoint that it was made from"
        )
    if stored.itemsize > 1:
        return stored
    said = getattr(torch, str(config.get("dtype") or "bfloat16").removeprefix("torch."), None)
    if isinstance(said, torch.dtype) and said.is_floating_point and said.itemsize > 1:
        return said
    return torch.bfloat16


def computed_in(plain: torch.dtype, asked: torch.dtype | None, device: str) -> torch.dtype:
    """The dtype that every command computes in: the one asked for, else `plain_dtype`.

    On a CPU float16 becomes bfloat16, which does not overflow and is several times as fast; and both become float32
    where the processor has no instructions for bfloat16.
    """
    if asked is not None or plain not in (torch.bfloat16, torch.float16) or torch.device(device).type != "cpu":
        return asked or plain
    if multiplies_bfloat16():
        return torch.bfloat16
    remark(
        "computing in float32: this processor has no instructions for bfloat16, in which torch would be some hundred "
        "times slower; --dtype bfloat16 asks for it"
    )
    return torch.float32


@cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's processor multiplies matrices of bfloat16 at least as fast as those of float32.

    That is what oneDNN says, which torch multiplies by: AVX-512, AMX, or bfloat16 of Arm. Elsewhere torch takes number
    by number: 0.4 in place of 114 GFLOP/s on two cores of Zen 3.
    """
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is not None and bool(asked())
