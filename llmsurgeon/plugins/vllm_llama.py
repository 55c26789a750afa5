"""A Llama with blocks of differing shape in vLLM: vLLM's own attention and FFN, one of a shape of its own a layer.

What vLLM has for NVIDIA's DeciLM (blocks without attention by its HasNoOps interface, weights, tensor parallelism)
is taken over; that reads one number of heads for all layers and widths in steps of 256, this reads `block_configs`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.nemotron_nas import DeciLMAttention, DeciLMForCausalLM, DeciModel

# Of a part's entry in block_configs, what vLLM's own layers compute.
STOCK = (None, "dense")


def refuse(index: int, entry: Any) -> None:
    """Raise ValueError for a block that vLLM's layers cannot compute."""
    ways = {
        "runs blocks in parallel": entry.parallel,
        "has an attention of another kind": entry.attention.kind not in STOCK and entry.attention.kind,
        "has an FFN of another kind": entry.ffn.kind not in STOCK and entry.ffn.kind,
        "has norms before its output projections": entry.attention.sub_norm or entry.ffn.sub_norm,
    }
    for how, found in ways.items():
        if found:
            kind = f" ({found})" if isinstance(found, str) else ""
            raise ValueError(
                f"layer {index} of this surgeon_llama checkpoint {how}{kind}, which vLLM has no layers for; run it in "
                "transformers"
            )


class SurgeonLlamaDecoderLayer(nn.Module):
    """x + Attn(norm(x)), then x + FFN(norm(x)), either of which may be absent."""

    def __init__(
        self, config: Any, layer_idx: int, cache_config: Any = None, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__()
        entry = config.block_configs[layer_idx]
        refuse(layer_idx, entry)
        self._is_no_op_attention, self._is_no_op_ffn = entry.attention.no_op, entry.ffn.no_op
        if not self._is_no_op_attention:
            bias = getattr(config, "attention_bias", False)
            self.self_attn = DeciLMAttention(
                config=config,
                hidden_size=config.hidden_size,
                num_heads=entry.attention.num_attention_heads,
                num_kv_heads=entry.attention.num_key_value_heads,
                max_position_embeddings=config.max_position_embeddings,
                quant_config=quant_config,
                bias=bias,
                bias_o_proj=bias,
                cache_config=cache_config,
                prefix=f"{prefix}.self_attn",
            )
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not self._is_no_op_ffn:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=entry.ffn.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what the last part added, the stream before it); the stream itself and None before any part."""
        if not self._is_no_op_attention:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if not self._is_no_op_ffn:
            hidden_states, residual = _normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _normed(
    norm: RMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the stream, the stream): of what was added and the stream before it, or of the first stream."""
    if residual is None:
        return norm(hidden_states), hidden_states
    made: tuple[torch.Tensor, torch.Tensor] = norm(hidden_states, residual)
    return made


class SurgeonLlamaForCausalLM(DeciLMForCausalLM):
    """DeciLM's model with our layers."""

    def _init_model(self, vllm_config: Any, prefix: str = "") -> DeciModel:
        return DeciModel(vllm_config=vllm_config, prefix=prefix, layer_type=SurgeonLlamaDecoderLayer)
