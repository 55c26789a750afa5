"""From a ModelSpec to config.json, the files beside it, and what the form asks of the weights.

native          every block has one shape, or is given it with zeros: the family's own model_type, loads everywhere
bitnet          the same with ternary linears packed, for transformers' own quantizer
nemotron-nas    Llama-shaped blocks that differ: DeciLM's description, which several engines read
surgeon         anything else: own model_type, block_configs, modeling files in the checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmsurgeon.checkpoint.companions import without_code
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats import bitnet_model, native, nemotron_nas
from llmsurgeon.formats.bitnet import Packing
from llmsurgeon.formats.gguf import model as gguf_model
from llmsurgeon.formats.models import empty_model, expected_shapes, legacy, modeling_file, surgeon_classes
from llmsurgeon.formats.padding import fitted
from llmsurgeon.formats.spellings import old_spellings
from llmsurgeon.model.block_transformer import to_block_transformer
from llmsurgeon.model.families import FAMILIES, SURGEON_PREFIX, Family
from llmsurgeon.model.parts import MoESpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec, to_block_configs

if TYPE_CHECKING:
    from llmsurgeon.formats.towers import Tower

WrittenFormat = Literal["native", "bitnet", "nemotron-nas", "surgeon"]
FormatName = Literal["auto", "native", "bitnet", "nemotron-nas", "surgeon"]


@dataclass(frozen=True)
class Written:
    """A format's answer.

    config: config.json.
    code: files to ship beside it.
    why: why this format and none that more engines read.
    loads: where a checkpoint in this form loads, in a sentence or two.
    spec: what the checkpoint describes; padding included.
    student: the config under which the student's own tensors run, before `transforms`.
    transforms: what the form asks of the weights, so that they fit `config`.
    packing: how ternary linears are packed on top of that; of format bitnet, set once it is known which are ternary.
    """

    format: WrittenFormat
    config: dict[str, Any]
    code: tuple[Path, ...]
    why: str
    loads: str
    spec: ModelSpec
    student: dict[str, Any]
    transforms: tuple[WeightTransform, ...] = ()
    # The vision-language model that this is the text tower of.
    tower: Tower | None = None
    packing: Packing | None = None

    def fit(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The student's weights as `config` describes them, under the names of today's classes."""
        return TransformedWeights(weights, self.transforms) if self.transforms else weights

    def published(self, weights: Mapping[str, Tensor], family: Family) -> Mapping[str, Tensor]:
        """The same under the names that the file has."""
        made = legacy(self.fit(weights), family) if self.format == "native" else self.fit(weights)
        if self.packing:
            made = TransformedWeights(made, self.packing.transforms)
        return self.tower.outer(made) if self.tower else made

    @property
    def file_config(self) -> dict[str, Any]:
        """What config.json says."""
        if self.packing:
            return {**self.config, "quantization_config": self.packing.quantization_config}
        return self.tower.config_of(self) if self.tower else self.config


def write_config(spec: ModelSpec, family: Family, source: Mapping[str, Any], wanted: FormatName = "auto") -> Written:
    """The form of `spec`, made from the source's normalised config.

    Raises:
        SurgeryError: the format that is asked for cannot express some block; the message names it.
    """
    if wanted == "bitnet":
        plain = write_config(spec, family, source, "native")
        if plain.transforms:
            misfit = _first_odd(spec, family) or "these would be filled up with zeros"
            raise SurgeryError(
                f"format bitnet takes blocks of one shape: {misfit}; native and surgeon hold it unpacked"
            )
        why = "ternary linears are packed as asked for"
        return replace(plain, format="bitnet", why=why, loads=BITNET_LOADS.format(model_type=family.model_type))
    left_out = ("block_configs", "block_transformer", "_name_or_path")
    config = {k: v for k, v in without_code(dict(source)).items() if k not in left_out}
    _cut_layer_lists(config, spec, family)
    config[family.layers_key] = len(spec.layers)
    mixtures = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)]
    if family.experts and mixtures:
        config[family.experts.count_key] = mixtures[0].experts
        config[family.experts.per_token_key] = mixtures[0].per_token
    if family.experts and family.experts.published_count_key:
        config[family.experts.published_count_key] = config[family.experts.count_key]
    config |= old_spellings(config, family)
    odd = _first_odd(spec, family) or native.mixed_windows(config)
    surgeon, code = _surgeon(spec, family, config)
    if wanted in ("auto", "native") and bitnet_model.misfit(spec, family, config) is None:
        made, why = bitnet_model.config_of(spec, config), "every block is one of BitNet's"
        return Written("native", made, (), why, BITNET_MODEL_LOADS, spec, surgeon)
    chosen, why = _choose(spec, family, config, wanted, odd)
    if chosen == "surgeon":
        return Written(chosen, surgeon, code, why, SURGEON_LOADS, spec, surgeon)
    if chosen == "native":
        made, code, shaped = native.config_of(spec, family, config), (), native.uniform_spec(spec, family)
        loads = NATIVE_LOADS.format(model_type=family.model_type) + (PADDED if odd else "")
    else:
        shaped, code = nemotron_nas.padded_spec(spec), modeling_files(DECILM)
        made = nemotron_nas.config_of(shaped, family, config)
        loads = " ".join([NEMOTRON_NAS_LOADS, *nemotron_nas.caveats(spec, made)])
    if chosen == "native" and odd is None:
        return Written(chosen, made, code, why, loads, spec, made)
    student_shapes, shapes = expected_shapes(empty_model(surgeon)), expected_shapes(empty_model(made))
    transforms = () if student_shapes == shapes else fitted(student_shapes, shapes, family, spec)
    return Written(chosen, made, code, why, loads, shaped, surgeon, transforms)


def write_beside(stage: Stage, written: Written, checkpoint: Checkpoint) -> None:
    """config.json, the code, and what the source has of tokenizer, chat template and generation config."""
    config = {**written.file_config, "transformers_version": version("transformers")}
    stage.write_file("config.json", json.dumps(_plain(config), indent=2) + "\n")
    companions = checkpoint.companions.files
    for companion in companions:
        stage.write_file(companion.name, companion.read())
    settings = generation_settings(checkpoint.config, config)
    if settings and GENERATION not in {companion.name for companion in companions}:
        stage.write_file(GENERATION, json.dumps(settings, indent=2) + "\n")
    for path in written.code:
        stage.copy_file(path)


def generation_settings(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a source's config.json says of how to generate and what `config`, made by transformers 5, no longer says.

    transformers reads them from config.json where there is no generation_config.json, and its config classes drop them.
    """
    from transformers import GenerationConfig

    kind = str(raw.get("model_type", "")).removeprefix(SURGEON_PREFIX)
    if kind in FAMILIES and FAMILIES[kind].encoder:
        return {}
    known = GenerationConfig().to_dict().keys() - {"transformers_version", "_from_model_config"}
    text = raw.get("text_config")
    said = {**(text if isinstance(text, dict) else {}), **raw}
    lost = {key: said[key] for key in sorted(known) if said.get(key) is not None and key not in config}
    ids = {key: said[key] for key in SPECIAL_IDS if said.get(key) is not None}
    return {**ids, **lost} if lost else {}


GENERATION = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NATIVE_LOADS = (
    "It is a plain {model_type} checkpoint and loads wherever the original does: transformers, vLLM, llama.cpp's "
    "converter."
)
BITNET_LOADS = (
    "It is a {model_type} checkpoint whose ternary linears are packed, two bits a weight: stock transformers loads it "
    "by its own bitnet quantizer (which needs accelerate). That rounds what these linears read to int8, so it "
    "computes something slightly different from the same model in plain numbers."
)
BITNET_MODEL_LOADS = (
    "It is a BitNet checkpoint, a Llama with norms before its output projections, in plain numbers: stock transformers "
    "loads it."
)
PADDED = (
    " What was cut is there as zeros: it computes exactly what the cut model does, and is no smaller and no faster "
    "than a model whose blocks all have the largest shape."
)
NEMOTRON_NAS_LOADS = (
    "It is a DeciLM (Nemotron-NAS) checkpoint: vLLM, SGLang, TensorRT-LLM, mlx-lm and llama.cpp's converter read that "
    "form. For transformers its code ships in the checkpoint: read its .py files, then load with "
    "trust_remote_code=True. vLLM needs no trust_remote_code where llmsurgeon is installed."
)
SURGEON_LOADS = (
    "Its code ships in the checkpoint: read its .py files, then load with trust_remote_code=True in transformers. A "
    "load that does not run that code refuses."
)
# surgeon_blocks.py and what it imports.
BLOCKS = (
    *("surgeon_blocks.py", "surgeon_fff.py", "surgeon_fff_numba.py", "surgeon_fff_triton.py", "surgeon_mlgru.py"),
    "surgeon_versions.py",
)
HALVES = ("surgeon_block_transformer.py",)
DECILM = ("configuration_decilm.py", "modeling_decilm.py", "surgeon_versions.py")


Misfit = Callable[[ModelSpec, Family, Mapping[str, Any]], str | None]
# What keeps a form from holding a model, None where nothing does.
MISFITS: dict[str, Misfit] = {
    "native": lambda *of: bitnet_model.misfit(*of) and native.misfit(*of),
    "nemotron-nas": nemotron_nas.misfit,
    "surgeon": lambda spec, family, config: None,
    "gguf": gguf_model.misfit,
}


def formats_that_can(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> list[str]:
    """The forms that can hold a model."""
    return [name for name, misfit in MISFITS.items() if misfit(spec, family, config) is None]


def _choose(
    spec: ModelSpec, family: Family, config: Mapping[str, Any], wanted: FormatName, odd: str | None
) -> tuple[WrittenFormat, str]:
    """The format and the reason."""
    if wanted != "auto":
        if reason := MISFITS[wanted](spec, family, config):
            raise SurgeryError(
                f"format {wanted} cannot hold this model: {reason}; formats that can: "
                f"{', '.join(formats_that_can(spec, family, config))}"
            )
        return wanted, odd or "asked for"
    if odd is None:
        return "native", "every block has the family's own shape"
    against = nemotron_nas.misfit(spec, family, config) or nemotron_nas.waste(spec)
    return ("surgeon", f"{odd}; not nemotron-nas: {against}") if against else ("nemotron-nas", odd)


def _surgeon(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    halves = spec.block_transformer
    config_class, model_class = surgeon_classes(family, halves is not None)
    module = modeling_file(family, halves is not None)
    made = {
        **config,
        "model_type": SURGEON_PREFIX + family.model_type,
        "architectures": [model_class.__name__],
        "auto_map": {
            "AutoConfig": f"{module}.{config_class.__name__}",
            # An encoder's body serves several tasks: each Auto class finds its own, as with the stock model.
            **{auto: f"{module}.Surgeon{head}" for head, auto in family.heads},
            family.auto_class: f"{module}.{model_class.__name__}",
        },
        "block_configs": to_block_configs(spec),
        **({"block_transformer": to_block_transformer(halves)} if halves else {}),
    }
    made = config_class.spelled_for_file(made)  # type: ignore[attr-defined]
    return made, modeling_files((*BLOCKS, *(HALVES if halves else ()), f"{module}.py"))


def modeling_files(names: tuple[str, ...]) -> tuple[Path, ...]:
    """Files of modeling/ that ship inside checkpoints."""
    return tuple(Path(str(files("llmsurgeon"))) / "modeling" / name for name in names)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _first_odd(spec: ModelSpec, family: Family) -> str | None:
    """What keeps the model from being uniform, None where it is."""

    def shape(layer: LayerSpec) -> Any:
        return layer.attention and layer.attention.shape, layer.ffn

    if spec.block_transformer:
        return f"it is a {spec.block_transformer.sentence()}"
    usual = shape(max(spec.layers, key=lambda b: (b.attention is not None, b.ffn is not None, not b.branches)))
    for index, layer in enumerate(spec.layers):
        if layer.branches:
            return f"block {index} runs {len(layer.branches)} blocks in parallel"
        if layer.attention is None:
            return f"block {index} has no attention"
        if layer.ffn is None:
            return f"block {index} has no FFN"
        if layer.own_kind:
            return f"block {index} {layer.own_kind}"
        if layer.ffn.own_norm or layer.ffn.bias:
            return f"block {index} holds fused FFNs, with a norm or biases that {family.model_type} blocks do not have"
        if family.width_key is None and layer.ffn.width != 4 * spec.hidden:
            return (
                f"block {index} has an FFN of width {layer.ffn.width}; "
                f"{family.model_type} blocks always have {4 * spec.hidden}"
            )
        if shape(layer) != usual:
            first = spec.layers[0]
            return (
                f"block {index} (FFN {layer.ffn.width}, {layer.attention.kv_heads} KV heads) differs from block 0 "
                f"(FFN {first.ffn and first.ffn.width}, {first.attention and first.attention.kv_heads} KV heads)"
            )
    return None


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
