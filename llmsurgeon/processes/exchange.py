"""What processes tell each other. Each function is called by all of them at the same point of their work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from llmsurgeon.processes.world import count, reaching_others

if TYPE_CHECKING:
    from torch import Tensor

Thing = TypeVar("Thing")


def add_up(*sums: Tensor) -> None:
    """Add to these sums those of all other processes, in place."""
    if count() == 1:
        return
    import torch.distributed as dist

    for each in sums:
        if each.numel():
            with reaching_others():
                dist.all_reduce(each)


def total(mine: float) -> float:
    """A number of this process added to those of all others."""
    return sum(things(mine)) if count() > 1 else mine


def send(sender: int, tensors: Sequence[Tensor]) -> None:
    """Make these tensors what they are in process `sender`, in place."""
    if count() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        whole = tensor.contiguous()
        with reaching_others():
            dist.broadcast(whole, sender)
        if whole is not tensor:
            tensor.copy_(whole)


def things(mine: Thing) -> list[Thing]:
    """A thing of each process, by its number. Not for what is large."""
    if count() == 1:
        return [mine]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    with reaching_others():
        dist.all_gather_object(found, mine)
    return found
