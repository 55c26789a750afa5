"""From a ModelSpec to config.json and the files beside it.

native     every block has one shape: the family's own model_type, loads everywhere
surgeon    anything else: own model_type, block_configs, modeling files in the checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from llmsurgeon.errors import SurgeryError
from llmsurgeon.families import SURGEON_PREFIX, Family
from llmsurgeon.formats.models import surgeon_classes
from llmsurgeon.spec import BlockSpec, ModelSpec, to_block_configs

FormatName = Literal["auto", "native", "surgeon"]


@dataclass(frozen=True)
class Written:
    """A format's answer: the config, the code files to ship, and why this format."""

    format: Literal["native", "surgeon"]
    config: dict[str, Any]
    code: tuple[Path, ...]
    why: str


def write_config(spec: ModelSpec, family: Family, source: Mapping[str, Any], wanted: FormatName = "auto") -> Written:
    """The config of `spec`, made from the source's normalised config.

    Raises:
        SurgeryError: `native` is asked for and some block does not have the uniform shape.
    """
    config = {k: v for k, v in source.items() if k not in ("auto_map", "block_configs", "_name_or_path")}
    _cut_layer_lists(config, spec, family)
    config[family.layers_key] = len(spec.blocks)
    odd = _first_odd(spec)
    if wanted == "native" and odd:
        raise SurgeryError(f"format native cannot hold this model: {odd}; use format: surgeon (or auto)")
    if odd is None and wanted != "surgeon":
        attention, ffn = spec.blocks[0].attention, spec.blocks[0].ffn
        assert attention and ffn
        config["model_type"] = family.model_type
        config["architectures"] = [family.model_class]
        config[family.width_key] = ffn.width
        if family.kv_heads_key:
            config[family.kv_heads_key] = attention.kv_heads
        return Written("native", config, (), "every block has the family's own shape")
    config_class, model_class = surgeon_classes(family)
    module = f"modeling_surgeon_{family.model_type}"
    config["model_type"] = SURGEON_PREFIX + family.model_type
    config["architectures"] = [model_class.__name__]
    config["auto_map"] = {
        "AutoConfig": f"{module}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }
    config["block_configs"] = to_block_configs(spec)
    here = Path(str(files("llmsurgeon"))) / "modeling"
    code = (here / "surgeon_blocks.py", here / f"{module}.py")
    return Written("surgeon", config, code, odd or "asked for")


def _first_odd(spec: ModelSpec) -> str | None:
    """What keeps the model from being uniform, None where it is."""

    def shape(block: BlockSpec) -> Any:
        return block.attention and replace(block.attention, window=None), block.ffn

    usual = shape(max(spec.blocks, key=lambda b: (b.attention is not None, b.ffn is not None, not b.branches)))
    for index, block in enumerate(spec.blocks):
        if block.branches:
            return f"block {index} runs {len(block.branches)} blocks in parallel"
        if block.attention is None:
            return f"block {index} has no attention"
        if block.ffn is None:
            return f"block {index} has no FFN"
        if shape(block) != usual:
            first = spec.blocks[0]
            return (
                f"block {index} (FFN {block.ffn.width}, {block.attention.kv_heads} KV heads) differs from block 0 "
                f"(FFN {first.ffn and first.ffn.width}, {first.attention and first.attention.kv_heads} KV heads)"
            )
    return None


def _cut_layer_lists(config: dict[str, Any], spec: ModelSpec, family: Family) -> None:
    """Per-layer lists follow the layers that stay."""
    layers = config[family.layers_key]
    for key, value in list(config.items()):
        if not isinstance(value, list) or len(value) != layers:
            continue
        if key in family.per_layer_lists:
            config[key] = [value[_attending_parent(block)] for block in spec.blocks]
        elif "layer" in key:
            raise SurgeryError(
                f"config.json: {key} looks like a list with one entry per layer, which {family.model_type} does not "
                "declare; add it to per_layer_lists in the family's file"
            )
    if config.get("max_window_layers") is not None and config.get("layer_types"):
        # Readers that do not know layer_types slide every layer from max_window_layers on.
        types = config["layer_types"]
        full = next((i for i, kind in enumerate(types) if kind == "sliding_attention"), len(types))
        config["max_window_layers"] = full
        if config.get("use_sliding_window") and "full_attention" in types[full:]:
            raise SurgeryError("config.json: layer_types mixes windows in a way that max_window_layers cannot express")


def _attending_parent(block: BlockSpec) -> int:
    """The parent layer whose attention, and so whose mask, the block has; its first parent where it has none."""
    branch = next((branch for branch in block.branches if branch.attention), block)
    return branch.parents[0]
