"""Configs and empty models: what transformers would build from a config.json, without weights.

The names and shapes of a model on the meta device are the contract that every written checkpoint is held against.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmsurgeon.boundary.foreign import foreign
from llmsurgeon.checkpoint.companions import without_code
from llmsurgeon.checkpoint.finite import is_finite, not_finite
from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform, remove, rename
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats import bitnet_model, nemotron_nas
from llmsurgeon.formats.experts import class_form, file_form, file_shapes
from llmsurgeon.formats.unheeded import refuse_unheeded, unheeded
from llmsurgeon.model.families import FAMILIES, SURGEON_PREFIX, Family, family_of
from llmsurgeon.model.spec import to_block_configs

CORRECT = "correct the config, or take the one that the model was published with"

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def is_surgeon(config: Mapping[str, Any]) -> bool:
    """True for the config of a checkpoint in the surgeon format."""
    return str(config.get("model_type", "")).startswith(SURGEON_PREFIX)


def ships_code(config: Mapping[str, Any]) -> bool:
    """True where transformers alone does not know the model_type, and this package does."""
    return is_surgeon(config) or nemotron_nas.is_nemotron_nas(config)


def readable(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config that `family_of` knows: of a nemotron-nas or BitNet checkpoint, its Llama in the surgeon format."""
    if bitnet_model.is_bitnet(config):
        return bitnet_model.read(config)
    return nemotron_nas.read(config) if nemotron_nas.is_nemotron_nas(config) else config


def as_surgeon(config: Mapping[str, Any]) -> dict[str, Any]:
    """The (normalised) config of the same model in the surgeon format, each block spelled out."""
    if is_surgeon(config):
        return dict(config)
    family = family_of(config)
    blocks = to_block_configs(family.describe(config))
    return {**config, "model_type": SURGEON_PREFIX + family.model_type, "block_configs": blocks}


def modeling_file(family: Family, halves: bool = False) -> str:
    """Name of the modeling file of `family` that ships inside checkpoints; `halves`: of block transformers."""
    return f"modeling_{'block' if halves else 'surgeon'}_{family.model_type}"


def surgeon_module(family: Family, halves: bool = False) -> Any:
    """That file, imported from this package."""
    return importlib.import_module(f"llmsurgeon.modeling.{modeling_file(family, halves)}")


def surgeon_classes(family: Family, halves: bool = False) -> tuple[type, type]:
    """(config class, model class) of the surgeon format for `family`; `halves`: of block transformers."""
    module = surgeon_module(family, halves)
    config_class = next(
        c for c in vars(module).values() if isinstance(c, type) and getattr(c, "model_type", "").startswith("surgeon_")
    )
    if family.heads:
        return config_class, getattr(module, f"Surgeon{family.model_class}")
    model_class = next(c for c in vars(module).values() if getattr(c, "config_class", None) is config_class)
    return config_class, model_class


def load_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config object of a config.json's contents. No remote code runs.

    Raises:
        SurgeryError: the family is not supported, transformers finds the values impossible, or a key that it does not
            know asks for another model.
    """
    from transformers import AutoConfig

    raw = readable(raw)
    family = family_of(raw)
    # Copies, which this makes: config classes fill in what is missing in place.
    values = {k: v for k, v in without_code(dict(raw)).items() if k not in ("model_type", "transformers_version")}
    with foreign("config.json", f"does not describe a {raw['model_type']} model", CORRECT):
        if is_surgeon(raw):
            return surgeon_classes(family, _halves(raw, family))[0].from_dict(values)  # type: ignore[attr-defined]
        made = AutoConfig.for_model(raw["model_type"], **values)
        refuse_unheeded(raw, made, raw.get(family.layers_key))
        return made


def config_notes(raw: Mapping[str, Any], text: Mapping[str, Any] | None = None) -> list[str]:
    """What a config.json asks for that is not done: code of its own, keys that nobody reads. `text`: of its tower."""
    own = raw if text is None else {**text, "auto_map": raw.get("auto_map")}
    return [] if ships_code(raw) or ships_code(own) else unheeded(own, load_config(own))


def _halves(raw: Mapping[str, Any], family: Family) -> bool:
    """True for the config of a block transformer."""
    if not raw.get("block_transformer"):
        return False
    if reason := family.refusal("block"):
        raise SurgeryError(f"config.json: block_transformer in a {family.model_type} model: {reason}")
    return True


def normalised(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every default filled in and per-layer lists expanded."""
    raw = readable(raw)
    config = load_config(raw)
    with foreign("config.json", f"does not describe a {raw['model_type']} model", CORRECT):
        values = config.to_dict()
    values["model_type"] = raw["model_type"]
    return values


def empty_model(raw: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a config with parameters on the meta device and real buffers (rotary frequencies)."""
    import transformers
    from transformers.initialization import no_init_weights

    raw = readable(raw)
    config = load_config(raw)
    family = family_of(raw)
    if is_surgeon(raw):
        model_class = surgeon_classes(family, _halves(raw, family))[1]
    else:
        model_class = getattr(transformers, family.model_class)
    with foreign("config.json", f"transformers cannot build this {raw['model_type']} model", CORRECT):
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = model_class(config).eval()
        for name, module in list(model.named_modules()):
            _make_buffers_real(model, name, module)
    for name, buffer in model.named_buffers():
        # A base of zero, say, would make NaN of every attention, and weights alone never show it.
        if name.endswith("inv_freq") and not buffer.isfinite().all():
            raise SurgeryError(
                "config.json: its rotary frequencies are not finite numbers; correct rope_parameters (rope_theta, "
                "factors), in a GGUF file rope.freq_base, or take the file that the model was published with"
            )
    return model


def _make_buffers_real(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds, as rotary frequencies and position numbers are."""
    missing = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
    if not missing:
        return
    if hasattr(module, "config") and not list(module.parameters()):
        holder, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(holder), attribute, type(module)(module.config))
        return
    for key, buffer in missing.items():
        setattr(module, key, torch.empty_like(buffer, device="cpu"))
    model._init_weights(module)


def expected_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of `model` holds; tied copies are left out."""
    shapes = {name: tuple(t.shape) for name, t in _own_tensors(model).items()}
    family = _family_in(model)
    return file_shapes(shapes, family) if family else shapes


def _own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _family_in(model: PreTrainedModel) -> Family | None:
    return FAMILIES.get(str(model.config.model_type).removeprefix(SURGEON_PREFIX))


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    family: Family | None = None,
    beside: Collection[str] = (),
    hint: str = "",
) -> None:
    """Hold names and shapes against what the config promises.

    An encoder's file may hold heads that its class does not have (a pooler beside a masked-LM head): given the
    `family`, they are no problem, and go along. So does what lies `beside` a text tower. `hint` ends the message.

    Raises:
        CheckpointError: listing missing, unexpected and misshapen tensors.
    """
    problems = [f"{name} is missing (expected shape {list(expected[name])})" for name in expected if name not in found]
    strict: tuple[str, ...] = ("",)
    if family and family.encoder:
        strict = (f"{family.layers}.", family.embedding.rpartition(".")[0] + ".")
    problems += [
        f"{name} is not part of the model"
        for name in found
        if name not in expected and name not in beside and name.startswith(strict)
    ]
    problems += [
        f"{name} has shape {list(found[name])}, the config asks for {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"{where}: tensors and config.json disagree: " + "; ".join(problems[:4]) + more + hint)


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

    On a CPU float16 becomes bfloat16, which does not overflow and is several times as fast.
    """
    chosen = asked or plain
    return torch.bfloat16 if asked is None and chosen == torch.float16 and device == "cpu" else chosen


def canonical(weights: Mapping[str, Tensor], family: Family, repeated: Collection[str] = ()) -> TransformedWeights:
    """The weights under the names of today's classes: old buffers dropped, old prefixes and names mended.

    repeated: names of today's that only repeat others, as a tied head does; they are dropped.
    """
    transforms: list[WeightTransform] = []
    legacy = dict(family.legacy_names)
    weights = file_form(weights, family)
    prefix = _missing_prefix(weights, family)
    for name in weights:
        target = legacy.get(name, name)
        for pattern, replacement in family.old_names:
            target = re.sub(pattern, replacement, target)
        if prefix and not target.startswith(f"{family.head}."):
            target = prefix + target
        if family.heads:
            target = _with_prefix(target, family)
        if any(re.search(pattern, name) for pattern in family.ignored) or target in repeated:
            transforms.append(remove(name))
        elif target != name:
            transforms.append(rename(name, target))
    return TransformedWeights(weights, transforms)


def _missing_prefix(weights: Mapping[str, Tensor], family: Family) -> str:
    """The prefix that a decoder's class puts before its body's names, where a file of the body alone has none."""
    prefix = family.layers.partition(".")[0] + "."
    if family.heads or any(name.startswith(prefix) for name in weights):
        return ""
    inside = {path.removeprefix(prefix).partition(".")[0] for path in (family.layers, family.embedding)}
    return prefix if any(name.partition(".")[0] in inside for name in weights) else ""


def _with_prefix(name: str, family: Family) -> str:
    """The name with or without the encoder's prefix, as the checkpoint's class has it: files come in either form."""
    bare = name.removeprefix(family.prefix)
    if not family.layers.startswith(family.prefix):
        return bare
    own = {path.removeprefix(family.prefix).partition(".")[0] for path in (family.layers, family.embedding)}
    return family.prefix + bare if bare.partition(".")[0] in own | {"pooler"} else name


def legacy(weights: Mapping[str, Tensor], family: Family) -> TransformedWeights:
    """Today's names back to the published ones, for formats that other engines read."""
    published = {today: old for old, today in family.legacy_names}
    return TransformedWeights(weights, [rename(name, published[name]) for name in weights if name in published])


def fill(model: PreTrainedModel, weights: Mapping[str, Tensor], dtype: torch.dtype | None, device: str) -> None:
    """Give every parameter of an empty model its tensor from `weights`, cast to `dtype`, on `device`."""
    family = _family_in(model)
    stacked = class_form(weights, family) if family else weights
    state = {name: stacked[name].to(device=device, dtype=dtype) for name in _own_tensors(model)}
    if dtype == torch.float16:
        for name, tensor in state.items():
            if stacked[name].dtype != dtype and not is_finite(tensor):
                raise not_finite("loading", dtype, {name: stacked[name]})
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.to(device)
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise CheckpointError(f"no tensor for {', '.join(left[:4])}; the checkpoint is incomplete")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def filled_model(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype | None, device: str
) -> PreTrainedModel:
    """The model of this config with these weights, whole in memory."""
    model = empty_model(normalised(config))
    fill(model, weights, dtype, device)
    return model
