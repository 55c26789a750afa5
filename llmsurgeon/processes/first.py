"""What the first process does alone, and the others hear of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from llmsurgeon.errors import SurgeryError
from llmsurgeon.processes.exchange import send, things
from llmsurgeon.processes.world import count, first, reaching_others

if TYPE_CHECKING:
    from torch import Tensor

Made = TypeVar("Made")


class Closable(Protocol):
    """What is held until it is closed."""

    def close(self) -> None:
        """Let go of it."""


def from_first(work: Callable[[], Made]) -> Made:
    """What `work` gives in the first process, in all of them. A SurgeryError there is one everywhere."""
    if count() == 1:
        return work()
    import torch.distributed as dist

    made, error = None, None
    if first():
        try:
            made = work()
        except SurgeryError as refused:
            error = refused
    told: list[Any] = [made, error and str(error)]
    with reaching_others():
        dist.broadcast_object_list(told)
    if told[1] is not None:
        raise error or SurgeryError(told[1])
    found: Made = told[0]
    return found


def tensor_of_first(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The first process's tensor, or its None, in all of them; on the device of `like`."""
    known = from_first(lambda: None if tensor is None else (tensor.shape, tensor.dtype))
    if known is None:
        return None
    found = tensor if first() and tensor is not None else like.new_empty(known[0], dtype=known[1])
    send(0, [found])
    return found


@contextmanager
def only_first(open_: Callable[[], Closable]) -> Iterator[Any]:
    """What `open_` gives, held by the first process, and None in the others. What refuses there refuses in all."""
    held: list[Closable] = []
    from_first(lambda: held.append(open_()))
    try:
        yield held[0] if held else None
    finally:
        for each in held:
            each.close()


def seen_by_all(folder: Callable[[], Path]) -> Path:
    """A folder that the first process names, and all must see.

    Raises:
        SurgeryError: one of them does not.
    """
    path = from_first(folder)
    unseen = sum(things(not path.is_dir()))
    if unseen:
        raise SurgeryError(
            f"{path}: {unseen} of {count()} processes do not see this folder; name an output on a file system that all "
            "machines share"
        )
    return path
