"""Low-rank adapters in place of the weights themselves (arXiv 2106.09685), merged in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.ternary import is_ternary

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Lora


def adapt(model: Any, lora: Lora, moving: set[str], seed: int) -> None:
    """Put low-rank adapters on the linear layers whose weights were to move; only those train."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SurgeryError("distill.lora needs peft: pip install 'llmsurgeon[peft]'") from error
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    linear = {name for name in linear if f"{name}.weight" in moving}
    if lora.targets != "all-linear":
        linear = {name for name in linear if name.rpartition(".")[2] in lora.targets}
    if not linear:
        raise SurgeryError(f"distill.lora: none of the linear layers that train is called {', '.join(lora.targets)}")
    transposed = isinstance(model.get_submodule(min(linear)), Conv1D)
    for name in sorted(linear):
        weight: Any = model.get_submodule(name).weight
        if is_ternary(weight.T if transposed else weight):
            raise SurgeryError(
                f"distill.lora: {name} is ternary, and an adapter merged into it would not leave it so; name other "
                "targets, or train without lora"
            )
        if model.get_submodule(name)._forward_pre_hooks:
            raise SurgeryError(
                f"distill.lora: {name} reads through a norm of its own, which an adapter beside it would not; name "
                "other targets, or train without lora"
            )
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=sorted(linear),
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, model)


def merged(model: Any) -> dict[str, Tensor]:
    """The weights of every layer with an adapter, the adapter merged into them: name -> tensor."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            found[f"{name}.weight"] = module.get_base_layer().weight.detach()  # type: ignore[operator]
    return found
