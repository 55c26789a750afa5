"""NaN and infinity: told apart from numbers at the first place where they appear, and traced to what made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.errors import SurgeryError

# What to do where finite weights overflow in a dtype.
WIDER = {torch.float16: "use --dtype bfloat16 or --dtype float32", torch.bfloat16: "use --dtype float32"}
NO_WIDER = "they are out of all proportion: the checkpoint is damaged, or was edited wrongly"


def is_finite(tensor: Tensor) -> bool:
    """True where a tensor holds no NaN and no infinity; of whole numbers always."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # A sum passes NaN and infinity on in half the time that looking for them takes; it may overflow on its own account.
    if torch.isfinite(wide.sum()):
        return True
    low, high = wide.aminmax()  # passes NaN on
    return bool(torch.isfinite(low) and torch.isfinite(high))


def not_finite(where: str, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> SurgeryError:
    """The error for a state at `where` that is not finite, computed in `dtype` with these stored `weights`."""
    kind, advice = str(dtype).removeprefix("torch."), WIDER.get(dtype, NO_WIDER)
    for name in weights:
        stored = weights[name]
        if not is_finite(stored):
            return SurgeryError(f"{where}: tensor {name} holds NaN or infinity; the weights are damaged, get them anew")
        if not is_finite(stored.to(dtype)):
            largest = torch.finfo(dtype).max
            return SurgeryError(
                f"{where}: tensor {name} has numbers beyond {kind}, which ends at {largest:g}; {advice}"
            )
    return SurgeryError(f"{where}: finite weights give NaN or infinity in {kind}; {advice}")


@torch.no_grad()
def first_not_finite(model: nn.Module, dtype: torch.dtype, **inputs: Any) -> SurgeryError | None:
    """The error that names the first module of `model` whose output is not finite on these inputs; None without one.

    Runs the model once with a look at what each module gives; of nested modules the inner one is named.
    """
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        given = output if isinstance(output, (tuple, list)) else (output,)
        if not found and not all(is_finite(each) for each in given if isinstance(each, Tensor)):
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        return None
    own = model.get_submodule(found[0]).named_parameters(recurse=False)
    name = getattr(model, "name_or_path", "")
    where = f"{name}: {found[0]}" if name else found[0]
    return not_finite(where, dtype, {f"{found[0]}.{name}": parameter.detach() for name, parameter in own})
