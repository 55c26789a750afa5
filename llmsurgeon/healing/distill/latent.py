"""Latent weights: what trains where a linear is ternary. The model sees W + lambda (W' - W), W' ternary, lambda to 1.

Gradients pass straight through the rounding to W; the scale of W' trains, too. Where the parent's weight W_p is there,
W starts as the number nearest to W_p that rounds to the code which the student has: training begins at the dense parent
while lambda is small, and the codes that the student came with are not lost. When the model is judged, and in the end,
lambda is 1. Compare BitNet b1.58 (arXiv 2402.17764); the schedule is that of fine-tuned Llama 3 (HF1BitLLM).

Shapes: O outputs, I inputs, G scales in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmsurgeon.checkpoint.kept import keep
from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.distill.schedule import Latent
from llmsurgeon.healing.distill.training import Training
from llmsurgeon.model.ternary import grid_of, is_ternary, nearest, put_in_place, storable, taken_apart, values

SCALE = "ternary_scale"
PACKED = "ternary.safetensors"
# How far beyond the edge between two codes a latent weight starts, as a share of half the scale.
MARGIN = 1e-3


class LatentLinear(Latent):
    """A linear whose weight trains in full precision and is used as ternary, to the share `share`.

    Takes the place of a Linear, or of GPT-2's Conv1D (`transposed`), whose parameters it keeps under their names.

    Args:
        ternary_OI: the student's weight.
        dense_OI: the parent's, None where there is none of this shape.
        stored: what the weight will be stored in.
    """

    def __init__(
        self, linear: Any, ternary_OI: Tensor, dense_OI: Tensor | None, transposed: bool, stored: torch.dtype
    ) -> None:
        super().__init__()
        self.transposed, self.stored = transposed, stored
        codes, scale = taken_apart(ternary_OI, grid := grid_of(ternary_OI))
        latent = ternary_OI.float() if dense_OI is None else started(codes, scale, dense_OI.float())
        self.weight = nn.Parameter((latent.T if transposed else latent).contiguous())
        self.bias = linear.bias
        single = scale[0] if grid.granularity == "tensor" else scale.flatten()
        self.ternary_scale = nn.Parameter(single.clone().to(latent))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(x, self.seen(), self.bias)

    def seen(self) -> Tensor:
        """The weight that the model sees, [O, I]."""
        w = self.weight.T if self.transposed else self.weight
        share = self.share if self.training else 1.0
        made = ternary_of(w.detach(), self.ternary_scale, self.stored)
        # The last term is zero, and carries the gradient.
        return share * made + (1 - share) * w.detach() + (w - w.detach())


def started(codes_OI: Tensor, scale_OG: Tensor, dense_OI: Tensor) -> Tensor:
    """The numbers nearest to `dense` that round to these codes under this scale, [O, I]."""
    half = values(torch.ones_like(codes_OI), scale_OG) / 2
    inside = dense_OI.clamp(-half * (1 - MARGIN), half * (1 - MARGIN))
    outside = codes_OI * torch.maximum(codes_OI * dense_OI, half * (1 + MARGIN))
    return torch.where(codes_OI == 0, inside, outside)


def ternary_of(latent_OI: Tensor, scale: Tensor, stored: torch.dtype) -> Tensor:
    """The ternary weight of a latent one, [O, I]; gradients reach the scale (one, [O], or [O * G])."""
    spread = scale.expand(len(latent_OI)) if scale.numel() == 1 else scale
    spread = spread.view(len(latent_OI), -1)
    spread = spread + (storable(spread.detach(), stored) - spread.detach())
    return values(nearest(latent_OI, spread.detach()), spread)


def install(
    model: nn.Module,
    moving: set[str],
    dense: Callable[[str], Tensor | None],
    stored: Callable[[str], torch.dtype],
    transposed: bool,
) -> set[str]:
    """Give the ternary linears among `moving` (names of parameters) latent weights. Returns what moves then.

    Ternary tensors that belong to no linear, as an embedding's, stay as they are.

    Args:
        dense: the parent's weight of a name, oriented as the model's, or None.
        stored: what the weight of a name will be stored in.
    """
    found = set(moving)
    for name, parameter in list(model.named_parameters()):
        weight = parameter.detach()
        if name not in moving or weight.dim() != 2:
            continue
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path.rpartition(".")[0]) if path == name else model.get_submodule(path)
        flipped = transposed and type(linear).__name__ == "Conv1D"
        ternary = weight.T if flipped else weight
        if not is_ternary(ternary):
            continue
        if not (isinstance(linear, nn.Linear) or flipped):
            found.discard(name)
            continue
        theirs = dense(name)
        theirs = theirs.T if theirs is not None and flipped else theirs
        put_in_place(model, path, LatentLinear(linear, ternary, theirs, flipped, stored(name)))
        found.add(f"{path}.{SCALE}")
    if not found:
        raise SurgeryError("distill.train: what it names is ternary and belongs to no linear; nothing would move")
    return found


def ternary_layer(weights: Mapping[str, Tensor], prefix: str, transposed: bool) -> bool:
    """True where a layer (its tensors' names begin with `prefix`) holds ternary linears."""
    tensors = (weights[name] for name in weights if name.startswith(prefix) and name.endswith(".weight"))
    return any(is_ternary(t.T if transposed and t.dim() == 2 else t) for t in tensors)


def packed(training: Training, stored: Callable[[str], torch.dtype], transposed: bool, write: bool = True) -> Training:
    """The training with a file whose linears are ternary again, in place of latent weights and scales.

    `write` is False where another process writes that file.
    """
    from safetensors.torch import load_file, save_file

    if training.file is None:
        return training
    tensors = load_file(training.file)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(f".{SCALE}")}
    if not scales:
        return training
    file = Path(training.folder) / PACKED
    if not write:
        return replace(training, file=str(file))
    for name, scale in scales.items():
        key = name.removesuffix(SCALE) + "weight"
        latent = tensors[key].T if transposed else tensors[key]
        made = ternary_of(latent, scale, stored(key))
        tensors[key] = (made.T if transposed else made).contiguous()
    keep(file, lambda path: save_file(tensors, path))
    return replace(training, file=str(file))
