"""The config of a cut model: counts and lists with an entry per layer follow the layers that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsurgeon.checkpoint.companions import without_code
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.spellings import old_spellings
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import LayerSpec, ModelSpec


def cut_config(spec: ModelSpec, family: Family, source: Mapping[str, Any]) -> dict[str, Any]:
    """The source's (normalised) config for the layers of `spec`, which a form's own is made from.

    Raises:
        SurgeryError: a list in it seems to have an entry per layer, and the family does not declare it.
    """
    left_out = ("block_configs", "block_transformer", "_name_or_path")
    config = {k: v for k, v in without_code(dict(source)).items() if k not in left_out}
    _cut_layer_lists(config, spec, family)
    config[family.layers_key] = len(spec.layers)
    mixtures = [layer.ffn for layer in spec.layers if layer.ffn and layer.ffn.experts]
    if family.experts and mixtures:
        config[family.experts.count_key] = mixtures[0].experts
        config[family.experts.per_token_key] = mixtures[0].per_token
    if family.experts and family.experts.published_count_key:
        config[family.experts.published_count_key] = config[family.experts.count_key]
    return config | old_spellings(config, family)


def _cut_layer_lists(config: dict[str, Any], spec: ModelSpec, family: Family) -> None:
    """Per-layer lists follow the layers that stay."""
    layers = config[family.layers_key]
    if len(spec.layers) != layers:
        for key in family.layer_rules:
            config.pop(key, None)
    for key, value in list(config.items()):
        if not isinstance(value, list):
            continue
        if key in family.per_layer_lists:
            if len(value) < layers:
                raise SurgeryError(f"config.json: {key} has {len(value)} entries, {family.layers_key} says {layers}")
            config[key] = [value[_attending_parent(layer)] for layer in spec.layers]
        elif "layer" in key and len(value) == layers:
            raise SurgeryError(
                f"config.json: {key} looks like a list with one entry per layer, which {family.model_type} does not "
                "declare; add it to per_layer_lists in the family's file"
            )
    if config.get("max_window_layers") is not None and config.get("layer_types"):
        # Readers that do not know layer_types slide every layer from max_window_layers on.
        types = config["layer_types"]
        full = next((i for i, kind in enumerate(types) if kind == "sliding_attention"), len(types))
        config["max_window_layers"] = full


def _attending_parent(layer: LayerSpec) -> int:
    """The parent layer whose attention, and so whose mask, the block has; its first parent where it has none."""
    branch = next((branch for branch in layer.branches if branch.attention), layer)
    return branch.parents[0]
