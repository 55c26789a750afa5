"""The student in memory, and which of its parameters move."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.models import empty_model, fill
from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.latent import install
from llmsurgeon.healing.distill.lora import adapt
from llmsurgeon.healing.distill.losses import needs_of, weights_of
from llmsurgeon.healing.spans import spans

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill


def build_student(case: Case, settings: Distill, dtype: torch.dtype) -> Any:
    """The student in memory, without dropout (the parent answered without), with adapters where asked for."""
    still = {key: 0.0 for key, value in case.config.items() if _is_dropout(key) and isinstance(value, float)}
    model = empty_model({**case.config, **still})
    fill(model, case.weights, dtype, "cpu")
    for parameter in model.parameters():
        # Tensors of a checkpoint are views of its files, which the parent may share.
        parameter.data = parameter.data.clone()
    model.train()
    if settings.trees:
        for module in model.modules():
            if hasattr(module, "region_leak"):
                module.temperature, module.region_leak = settings.trees.temperature, settings.trees.region_leak
    if settings.gradient_checkpointing:
        # The name is new in transformers 5; the older one warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    moving = trainable(model, case, settings)
    if settings.lora is None:
        moving = install(
            model, moving, case.dense, lambda name: case.weights[name].dtype, case.parent.family.transposed
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in moving)
    if settings.lora is not None:
        adapt(model, settings.lora, moving, settings.seed)
    return model


def _is_dropout(key: str) -> bool:
    return "dropout" in key or key.endswith("pdrop")


def trainable(model: Any, case: Case, settings: Distill) -> set[str]:
    """Names of the parameters that move.

    Raises:
        SurgeryError: a pattern fits no name, or nothing would move.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    family = case.parent.family
    if isinstance(settings.train, tuple):
        for pattern in settings.train:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SurgeryError(
                    f"distill.train: no tensor fits {pattern!r}; names look like {names[len(names) // 2]}"
                )
        chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in settings.train)}
    elif settings.train == "all":
        chosen = set(names)
    else:
        layers = zip(case.spec.layers, spans(case.spec, len(case.parent_spec.layers)), strict=True)
        wanted = [
            family.layer(index)
            for index, (_, span) in enumerate(layers)
            if settings.train == "blocks" or case.changed(index, span)
        ]
        chosen = {name for name in names if name.startswith(tuple(wanted))}
    if family.encoder:
        # Pooler and heads say nothing that is trained on.
        base = dict(model.base_model.named_parameters())
        read = {id(parameter) for name, parameter in base.items() if not name.startswith("pooler.")}
        chosen &= {name for name, parameter in model.named_parameters() if id(parameter) in read}
    if settings.trees and not settings.trees.temperature:
        # Hard decisions have no gradient.
        chosen = {name for name in chosen if name.rpartition(".")[2] not in ("router_weight", "router_bias")}
    if "last states" not in needs_of(weights_of(settings, family.encoder)):
        # Nothing behind the last layer is read: it would never get a gradient.
        behind = (f"{family.final_norm}.", *(() if case.spec.tied else (f"{family.head}.",)))
        chosen = {name for name in chosen if not name.startswith(behind)}
    if not chosen:
        raise SurgeryError(f"distill.train: {settings.train} names no tensor of this student")
    return chosen
