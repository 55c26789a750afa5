"""How a family's weights and config become what llama.cpp reads, or why they cannot.

A family is one row of `ARCHITECTURES`, which reading goes by, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmsurgeon.checkpoint.gguf.architectures import (
    ARCHITECTURES,
    BITNET,
    NO_CAP,
    UNEVEN,
    UNEVEN_FAMILIES,
    Architecture,
    Key,
)
from llmsurgeon.checkpoint.gguf.file import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, Field
from llmsurgeon.checkpoint.transform import WeightTransform
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats import bitnet_model
from llmsurgeon.formats.form import Form
from llmsurgeon.formats.gguf.rope import any_attention, rope
from llmsurgeon.formats.gguf.tensors import transforms_of
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import LayerSpec, ModelSpec

Config = Mapping[str, Any]
# Why no GGUF is written of families that llama.cpp knows.
ENCODER = "makes one vector of a text with an encoder and has no masked-LM head; no GGUF of encoders is written yet"
NOT_RUN = dict.fromkeys(("bert", "roberta", "distilbert", "modernbert"), ENCODER)


@dataclass(frozen=True)
class Layout:
    """A model as llama.cpp wants it: its architecture, metadata, the edits that make its tensors, and remarks."""

    architecture: str
    fields: tuple[Field, ...]
    transforms: tuple[WeightTransform, ...]
    notes: tuple[str, ...]


def lay_out(config: Config, family: Family, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Layout:
    """How this model is written; `weights` are its tensors under canonical names, of which only names are read.

    Raises:
        SurgeryError: llama.cpp cannot run it; names the first block or setting that does not fit.
    """
    architecture, fields, factors, notes = _described(config, family, spec)
    transforms = transforms_of(architecture, config, family, spec, weights)
    transforms += [_constant(name, values) for name, values in factors.items()]
    prefixed = tuple(_field(f"{architecture.name}.{key}", value) for key, value in fields.items())
    return Layout(architecture.name, prefixed, tuple(transforms), tuple(notes))


def misfit(spec: ModelSpec, family: Family, config: Config) -> str | None:
    """Why llama.cpp cannot run this model, None where it can."""
    try:
        _described(config, family, spec)
    except SurgeryError as error:
        return str(error)
    return None


def why_not(model_type: str) -> str | None:
    """Why there is no GGUF of a family, None where there is."""
    if model_type in ARCHITECTURES:
        return None
    return f"llama.cpp {NOT_RUN.get(model_type, f'has no architecture for {model_type} models')}"


def _described(
    config: Config, family: Family, spec: ModelSpec
) -> tuple[Architecture, dict[str, Any], dict[str, Tensor], list[str]]:
    """Architecture, metadata, tensors of factors on rotary frequencies, and notes."""
    architecture = _choose(family, spec)
    _check_settings(architecture, config, spec)
    _check_parts(architecture, spec)
    notes: list[str] = []
    fields = _sizes(architecture, spec, config)
    fields |= _windows(architecture, spec, notes)
    turns, factors = rope(architecture, config, spec, notes)
    fields |= turns | {key.name: _value(key, config) for key in architecture.keys}
    return architecture, fields, factors, notes


def _value(key: Key, config: Config) -> Any:
    """A config value as metadata: no soft cap is one that no score reaches."""
    value = config[key.config]
    return NO_CAP if value is None else key.kind(value)


def _choose(family: Family, spec: ModelSpec) -> Architecture:
    """The architecture for these blocks."""
    if spec.block_transformer:
        raise SurgeryError("llama.cpp knows no block transformers")
    if family.model_type not in ARCHITECTURES:
        raise SurgeryError(why_not(family.model_type) or "")
    if any(layer.sub_normed for layer in spec.layers):
        return _bitnet(family, spec)
    for index, layer in enumerate(spec.layers):
        if layer.own_kind:
            raise SurgeryError(f"block {index} {layer.own_kind}, which llama.cpp has no code for")
    architecture = ARCHITECTURES[family.model_type]
    odd = _first_odd(spec)
    if odd is None:
        return architecture
    index, what = odd
    if family.model_type not in UNEVEN_FAMILIES:
        raise SurgeryError(f"block {index} {what}, and llama.cpp's {architecture.name} has one shape for all blocks")
    for index, layer in enumerate(spec.layers):
        reason = _not_deci(index, layer)
        if reason:
            raise SurgeryError(f"block {index} {reason}")
    return UNEVEN


def _bitnet(family: Family, spec: ModelSpec) -> Architecture:
    """The architecture of blocks with norms before their output projections."""
    if family.model_type not in bitnet_model.FAMILIES:
        raise SurgeryError(f"llama.cpp's {BITNET.name} is Llama with norms, not {family.model_type}")
    if not spec.tied:
        raise SurgeryError(f"llama.cpp's {BITNET.name} takes the embedding for the head, and here they are two tensors")
    for index, layer in enumerate(spec.layers):
        if layer.sub_normed != ("attention", "ffn"):
            raise SurgeryError(
                f"llama.cpp's {BITNET.name} has norms before both output projections of every block, block {index} not"
            )
    if odd := _first_odd(spec):
        raise SurgeryError(f"block {odd[0]} {odd[1]}, and llama.cpp's {BITNET.name} has one shape for all blocks")
    return BITNET


def _first_odd(spec: ModelSpec) -> tuple[int, str] | None:
    """The first block that keeps the model from being uniform, and how; None where it is uniform."""

    def shape(layer: LayerSpec) -> Any:
        return layer.attention and layer.attention.shape, layer.ffn

    usual = next((shape(b) for b in spec.layers if b.attention and b.ffn and not b.branches), None)
    for index, layer in enumerate(spec.layers):
        if layer.branches:
            return index, f"runs {len(layer.branches)} blocks in parallel"
        if layer.attention is None:
            return index, "has no attention"
        if layer.ffn is None:
            return index, "has no FFN"
        if shape(layer) != usual:
            return index, (
                f"(FFN {layer.ffn.width}, {layer.attention.heads} heads, {layer.attention.kv_heads} KV heads) differs "
                "from the first"
            )
    return None


def _not_deci(index: int, layer: LayerSpec) -> str | None:
    """Why llama.cpp's code for uneven models cannot run this block."""
    if layer.branches:
        return f"runs {len(layer.branches)} blocks in parallel, which llama.cpp has no word for"
    if layer.empty:
        return "is empty, which llama.cpp cannot run"
    if index == 0 and layer.attention is None:
        return "has no attention, and llama.cpp sizes its cache by the first block"
    if layer.ffn is None:
        return "has attention and no FFN, and llama.cpp leaves such attention out without a word"
    return None


def _check_settings(architecture: Architecture, config: Config, spec: ModelSpec) -> None:
    """Refuse settings under which llama.cpp would compute something else."""
    where = f"llama.cpp's {architecture.name}"
    for key, allowed in architecture.settings:
        if key in config and config[key] not in allowed:
            raise SurgeryError(f"{where} takes {key} {allowed[0]} for granted, config.json says {config[key]}")
    for key in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        if isinstance(config.get(key), str) and config[key] not in architecture.activations:
            known = " or ".join(architecture.activations)
            raise SurgeryError(f"{where} computes {known}, config.json says {key} {config[key]}")
    attention = any_attention(spec)
    if not architecture.free_heads and attention.heads * attention.head_dim != spec.hidden:
        raise SurgeryError(
            f"{where} wants heads that fill the model's width of {spec.hidden}, these are {attention.heads} of "
            f"{attention.head_dim}"
        )


def _check_parts(architecture: Architecture, spec: ModelSpec) -> None:
    """Refuse what a block may have here and llama.cpp has no place for."""
    where = f"llama.cpp's {architecture.name}"
    for index, layer in enumerate(spec.layers):
        turns = architecture.bare_every == 0 or (index + 1) % architecture.bare_every != 0
        if layer.attention and layer.attention.rope != turns:
            gives = "gives block" if turns else "leaves out of block"
            raise SurgeryError(f"{where} {gives} {index} the rotary positions, and this model does not")
        if layer.ffn and layer.ffn.own_norm:
            raise SurgeryError(f"{where} has one norm for attention and FFN, block {index} has two")
        if layer.ffn and layer.ffn.bias:
            raise SurgeryError(f"{where} has no place for the biases of block {index}'s FFN")


def _sizes(architecture: Architecture, spec: ModelSpec, config: Config) -> dict[str, Any]:
    attention = any_attention(spec)
    uneven = architecture is UNEVEN
    heads = [layer.attention.heads if layer.attention else 0 for layer in spec.layers]
    kv_heads = [layer.attention.kv_heads if layer.attention else 0 for layer in spec.layers]
    widths = [layer.ffn.width if layer.ffn else 0 for layer in spec.layers]
    eps_key = next(k for k in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") if config.get(k) is not None)
    sizes: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "block_count": len(spec.layers),
        "context_length": spec.max_positions or 2048,
        "embedding_length": spec.hidden,
        "feed_forward_length": widths if uneven else widths[0],
        "attention.head_count": heads if uneven else heads[0],
        "attention.head_count_kv": kv_heads if uneven else kv_heads[0],
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
    }
    kind = "layer_norm_rms_epsilon" if eps_key == "rms_norm_eps" else "layer_norm_epsilon"
    sizes[f"attention.{kind}"] = float(config[eps_key])
    return sizes


def _windows(architecture: Architecture, spec: ModelSpec, notes: list[str]) -> dict[str, Any]:
    """Sliding windows; where llama.cpp has none, the context ends where they would begin to bite."""
    windows = [layer.attention.window if layer.attention else None for layer in spec.layers]
    found = {window for window in windows if window is not None}
    if architecture.windows == "periodic":
        # With blocks of one kind only, llama.cpp aborts.
        for period in range(2, len(windows) + 1):
            if all((window is not None) == (i % period < period - 1) for i, window in enumerate(windows)):
                return {"attention.sliding_window": max(found), "attention.sliding_window_pattern": period}
        raise SurgeryError(
            f"in llama.cpp's {architecture.name} every nth block attends to everything, and the blocks that are left "
            "have no such pattern"
        )
    if not found or min(found) >= (spec.max_positions or 2048):
        return {}
    notes.append(
        f"llama.cpp's {architecture.name} has no sliding window: context_length is {min(found)}, up to which it "
        "computes the same"
    )
    return {"context_length": min(found)}


def _constant(name: str, values: Tensor) -> WeightTransform:
    return WeightTransform((), (name,), lambda: values)


def _field(key: str, value: Any) -> Field:
    """A metadata value in the GGUF type that llama.cpp reads it in."""
    if isinstance(value, bool):
        return Field(key, value, BOOL)
    if isinstance(value, list):
        return Field(key, value, ARRAY, INT32)
    if isinstance(value, str):
        return Field(key, value, STRING)
    return Field(key, value, FLOAT32 if isinstance(value, float) else UINT32)


def _limit(family: Family) -> tuple[str, bool] | None:
    if reason := why_not(family.model_type):
        return reason, True
    if family.model_type in UNEVEN_FAMILIES:
        return None
    return "llama.cpp gives all blocks of this architecture one shape; others: native first", False


GGUF = Form(name="gguf", misfit=misfit, limit=_limit)
