"""Empty models: what transformers would build from a config.json, without weights; and filling them.

The names and shapes of a model on the meta device are the contract that every written checkpoint is held against.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmsurgeon.boundary.foreign import foreign
from llmsurgeon.checkpoint.finite import is_finite, not_finite
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.configs import CORRECT, load_config, normalised
from llmsurgeon.formats.experts import class_form, file_shapes
from llmsurgeon.formats.forms import readable
from llmsurgeon.formats.surgeon import classes_for, is_surgeon
from llmsurgeon.model.families import FAMILIES, SURGEON_PREFIX, Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def empty_model(raw: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a config with parameters on the meta device and real buffers (rotary frequencies)."""
    import transformers
    from transformers.initialization import no_init_weights

    raw = readable(raw)
    config = load_config(raw)
    family = family_of(raw)
    model_class = classes_for(raw, family)[1] if is_surgeon(raw) else getattr(transformers, family.model_class)
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


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens the model has an embedding of."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


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
