"""bitnet: a plain checkpoint whose ternary linears are packed, 2 bits a weight, for transformers' own quantizer.

`X.weight` is uint8 [O / 4, I]: byte [r, c] holds rows r, r + R, r + 2 R, r + 3 R (R = O / 4), two bits each, lowest
first, code + 1. `X.weight_scale` [1] is the scale for `autobitlinear`, which multiplies by it, and 1 / scale for
`bitlinear`, which divides. Both round what a linear reads to int8, with a scale for each token (BitNet b1.58, arXiv
2402.17764, eq. 4).

    autobitlinear   unpacks once, when the model is loaded. It would multiply a bias by the scale: there may be none.
    bitlinear       keeps the packed weight in memory and unpacks at every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.transform import WeightTransform
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats import native
from llmsurgeon.formats.form import Body, CheckpointForm, Packs
from llmsurgeon.formats.native import NATIVE
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.model.ternary import grid_of, is_ternary, taken_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LinearClass = Literal["autobitlinear", "bitlinear"]
ROWS = 4  # of one byte
LOADS = (
    "It is a {model_type} checkpoint whose ternary linears are packed, two bits a weight: stock transformers loads it "
    "by its own bitnet quantizer (which needs accelerate). That rounds what these linears read to int8, so it "
    "computes something slightly different from the same model in plain numbers."
)


@dataclass(frozen=True)
class Packing:
    """Which linears are packed, which are kept as they are, and what reads them."""

    linears: tuple[str, ...]
    kept: tuple[str, ...]
    linear_class: LinearClass

    @property
    def transforms(self) -> tuple[WeightTransform, ...]:
        """The edits that pack."""
        return tuple(
            WeightTransform(
                (f"{name}.weight",),
                (f"{name}.weight", f"{name}.weight_scale"),
                partial(packed, f"{name}.weight", self.linear_class),
            )
            for name in self.linears
        )

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {
            "quant_method": "bitnet",
            "linear_class": self.linear_class,
            "quantization_mode": "offline",
            "modules_to_not_convert": list(self.kept),
        }

    def saved(self, meta: Mapping[str, Tensor]) -> int:
        """Bytes that packing saves."""
        weights = [meta[f"{name}.weight"] for name in self.linears]
        return sum(prod(w.shape) * w.dtype.itemsize - prod(w.shape) // ROWS for w in weights)


def packing_of(
    model: PreTrainedModel, meta: Mapping[str, Tensor], names: Iterable[str], linear_class: LinearClass | None = None
) -> Packing:
    """How the ternary weights `names` of a plain checkpoint are packed; `meta` are its tensors, without data.

    `model` is the empty model of its config.

    Without `linear_class` it is autobitlinear, or bitlinear where some linear has a bias.

    Raises:
        SurgeryError: a weight does not belong to a Linear, its rows do not fill bytes, or has a bias that the class
            would scale.
    """
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears = [name.removesuffix(".weight") for name in names]
    if not linears:
        raise SurgeryError("format bitnet packs ternary linears, and there are none; run `llmsurgeon ternary` first")
    for name in linears:
        if name not in modules:
            raise SurgeryError(
                f"format bitnet: {name} is not a Linear of {model.config.model_type}, and transformers packs no other; "
                "format native holds it as plain numbers"
            )
        rows = meta[f"{name}.weight"].shape[0]
        if rows % ROWS:
            raise SurgeryError(
                f"format bitnet: {name} has {rows} outputs, and four of them share a byte; leave it out of the ternary "
                "linears, or write format native"
            )
    biased = [name for name in linears if f"{name}.bias" in meta]
    if biased and linear_class == "autobitlinear":
        raise SurgeryError(
            f"format bitnet: {biased[0]} has a bias, which transformers' autobitlinear multiplies by the scale; "
            "take bitlinear"
        )
    kept = tuple(name for name in modules if name not in set(linears))
    return Packing(tuple(linears), kept, linear_class or ("bitlinear" if biased else "autobitlinear"))


def packed(name: str, linear_class: LinearClass, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(uint8 [O / 4, I], scale [1] in the weight's dtype).

    Raises:
        SurgeryError: the weight is not ternary with one scale.
    """
    outputs, inputs = weight_OI.shape
    if weight_OI.is_meta:
        made = torch.empty(outputs // ROWS, inputs, dtype=torch.uint8, device="meta")
        return made, torch.empty(1, dtype=weight_OI.dtype, device="meta")
    grid = grid_of(weight_OI)
    if not is_ternary(weight_OI) or grid.granularity != "tensor":
        found = f"a scale for each {grid.granularity}" if is_ternary(weight_OI) else "other numbers"
        raise one_scale(name, found)
    codes, scales = taken_apart(weight_OI, grid)
    parts = (codes + 1).to(torch.uint8).view(ROWS, outputs // ROWS, inputs)
    bits = parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6
    scale = scales[0, 0].reshape(1).clone()
    return bits, (scale if linear_class == "autobitlinear" else 1 / scale).to(weight_OI.dtype)


def one_scale(name: str, found: str) -> SurgeryError:
    """The error for a linear that has more than one scale."""
    return SurgeryError(
        f"format bitnet: one scale belongs to each linear, and {name} has {found}; make it ternary with granularity "
        "tensor, or write format native or GGUF"
    )


def ternary_linears(weights: Mapping[str, Tensor], model: PreTrainedModel) -> list[str]:
    """Names of the weights of the (empty) model's Linears that are ternary, by their values.

    Raises:
        SurgeryError: one of them has several scales.
    """
    modules = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [name for m in modules if (name := f"{m}.weight") in weights and is_ternary(weights[name])]
    for name in names:
        if (found := grid_of(weights[name]).granularity) != "tensor":
            raise one_scale(name, f"a scale for each {found}")
    return names


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of this config holds packed ternary linears."""
    return (config.get("quantization_config") or {}).get("quant_method") == "bitnet"


def describe(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> Body:
    """The model in this form before its linears are packed; `config` is the (cut) source's.

    Raises:
        SurgeryError: its blocks differ, so that zeros would stand beside what is packed.
    """
    plain = native.describe(spec, family, config)
    if plain.spec != spec:
        raise SurgeryError(
            f"format bitnet takes blocks of one shape: {native.odd(spec, family, config)}; native and surgeon hold it "
            "unpacked"
        )
    loads = LOADS.format(model_type=family.model_type)
    return replace(plain, loads=loads, why="ternary linears are packed as asked for")


BITNET = CheckpointForm(
    name="bitnet",
    misfit=native.misfit,
    describe=describe,
    plain=NATIVE,
    packs=Packs(ternary_linears, packing_of),
    recognises=is_packed,
    read=native.read,
    unread=(
        "holds packed ternary linears (bitnet), which transformers loads and this tool does not read back; take the "
        "plain checkpoint that it was exported from"
    ),
)
