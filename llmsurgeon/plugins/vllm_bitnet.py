"""transformers' `bitnet` quantization in vLLM: linears of ternary weights, packed two bits each.

Weights are unpacked when they are read, so in memory they are plain numbers; what a linear reads is rounded to int8
with a scale for each token, and its output is multiplied by the linear's scale, as transformers' classes do (BitNet
b1.58, arXiv 2402.17764, eq. 4). Byte [r, c] of a packed weight holds rows r, r + R, r + 2 R and r + 3 R of column c,
lowest bits first, each plus one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

ROWS = 4  # of one byte
# What transformers leaves alone where nobody says what is to be left.
KEPT = ("lm_head",)
SHARDS = {"q": 0, "k": 1, "v": 2}


@register_quantization_config("bitnet")
class BitNetConfig(QuantizationConfig):
    """`quantization_config` of config.json. kept: modules whose weights are plain; divided: scales divide."""

    def __init__(self, kept: Iterable[str], divided: bool) -> None:
        super().__init__()
        self.kept, self.divided = tuple(kept), divided

    @classmethod
    def get_name(cls) -> str:
        return "bitnet"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitNetConfig:
        """Raises ValueError for a variant that rounds weights while it computes, or norms what it reads."""
        if config.get("quantization_mode", "offline") != "offline" or config.get("use_rms_norm"):
            raise ValueError("bitnet: weights that are rounded while computing (online) and norms inside are not read")
        kept = config.get("modules_to_not_convert")
        return cls(KEPT if kept is None else kept, config.get("linear_class", "bitlinear") == "bitlinear")

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Raises ValueError where vLLM has in one linear what is packed and what is not."""
        if not isinstance(layer, LinearBase):
            return None
        *at, name = prefix.split(".")
        parts = [".".join([*at, part]) for part in self.packed_modules_mapping.get(name, [name])]
        plain = [part for part in parts if self._is_kept(part)]
        if not plain:
            return PackedTernary(self.divided)
        if len(plain) < len(parts):
            packed = next(part for part in parts if part not in plain)
            raise ValueError(
                f"bitnet: vLLM computes {', '.join(parts)} as one linear, and here {packed} is packed and {plain[0]} "
                "is not; serve the checkpoint in plain numbers (format native)"
            )
        return UnquantizedLinearMethod()

    def _is_kept(self, name: str) -> bool:
        dotted = f".{name}."
        return any(f".{each}." in dotted for each in self.kept)


class PackedTernary(LinearMethodBase):
    """A linear whose weights are -1, 0 and 1 times one scale, or one for each part that vLLM has stacked in it."""

    def __init__(self, divided: bool) -> None:
        self.divided = divided

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """`weight` [O, I] of codes, and `weight_scale` [parts].

        Raises ValueError where ranks share a linear's inputs: the scale of what it reads is over all of them.
        """
        if input_size_per_partition != input_size:
            raise ValueError("bitnet: packed ternary linears run on one rank; leave out --tensor-parallel-size")
        weight = Parameter(
            torch.empty(sum(output_partition_sizes), input_size, dtype=params_dtype), requires_grad=False
        )
        place: Callable[..., Any] = more["weight_loader"]

        def load(param: Parameter, packed: torch.Tensor, *shard: Any) -> None:
            place(param, unpacked(packed).to(params_dtype), *shard)

        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, "weight_loader": load})
        layer.register_parameter("weight", weight)
        scale = Parameter(torch.ones(len(output_partition_sizes), dtype=torch.float32), requires_grad=False)
        set_weight_attrs(scale, {"weight_loader": _one_of_several})
        layer.register_parameter("weight_scale", scale)
        layer.rows_of_parts = output_partition_sizes

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make of the scales one for each row, [O]."""
        scales = 1 / layer.weight_scale.data if self.divided else layer.weight_scale.data
        repeats = torch.tensor(layer.rows_of_parts, device=scales.device)
        layer.weight_scale = Parameter(scales.repeat_interleave(repeats), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[*, I] -> [*, O]."""
        wide = x.float()
        # In transformers' own order: what lies between two whole numbers falls to the same side.
        scale = 127 / wide.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        rounded = ((wide * scale).round().clamp(-128, 127) / scale).to(x.dtype)
        output = (F.linear(rounded, layer.weight) * layer.weight_scale).to(x.dtype)
        return output if bias is None else output + bias


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Codes of packed bytes: uint8 [O / 4, I] -> int8 [O, I] of -1, 0, 1."""
    return torch.cat([(packed >> 2 * place & 3).to(torch.int8) - 1 for place in range(ROWS)])


def _one_of_several(param: Parameter, scale: torch.Tensor, shard: Any = None) -> None:
    """A part's scale in its place; of a tensor that holds all parts, the scale of all."""
    if shard is None:
        param.data.fill_(scale.item())
    else:
        param.data[SHARDS.get(shard, shard)] = scale.item()
