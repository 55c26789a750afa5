"""This process's share of the sequences, and sums and lists over all of them from those over the share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llmsurgeon.errors import SurgeryError
from llmsurgeon.processes.exchange import add_up, send, things
from llmsurgeon.processes.first import from_first
from llmsurgeon.processes.world import count, rank

if TYPE_CHECKING:
    from torch import Tensor

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Share:
    """This process's part of `total` sequences: every step-th one from `start` on, so that of the first n it has its
    part, too, and as its first ones.

    Where there are fewer sequences than processes, each has all of them, and the first process's numbers count.
    """

    total: int
    start: int = 0
    step: int = 1

    @classmethod
    def of(cls, total: int) -> Share:
        """Its part of so many."""
        return cls(total) if total < count() else cls(total, rank(), count())

    @property
    def rows(self) -> range:
        """Numbers of the sequences in it."""
        return range(self.start, self.total, self.step)

    def of_first(self, number: int) -> int:
        """How many of the first `number` sequences are in it."""
        return len(range(self.start, number, self.step))

    def place(self, row: int) -> int:
        """Where sequence `row` is in it."""
        return (row - self.start) // self.step

    def mine(self, values: Tensor) -> Tensor:
        """Its part [s, *] of what has an entry a sequence, [S, *]."""
        return values[self.start :: self.step]

    def add_up(self, *sums: Tensor) -> None:
        """Make of sums over it those over all sequences, in place."""
        if self.step > 1:
            add_up(*sums)
        else:
            send(0, sums)

    def number(self, value: float) -> float:
        """The sum over all sequences, from that over it."""
        import torch

        total = torch.tensor(value, dtype=torch.float64)
        self.add_up(total)
        return total.item()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of numbers of all sequences, from those of its own."""
        if count() == 1:
            return values.mean()
        import torch

        total = torch.stack([values.double().sum().cpu(), torch.tensor(float(values.numel()), dtype=torch.float64)])
        self.add_up(total)
        return total[0] / total[1]

    def every(self, values: Tensor, dim: int = 0) -> Tensor:
        """Entries of all sequences along a dimension, from those of its own."""
        if count() == 1:
            return values
        whole = values.new_zeros([*values.shape[:dim], self.total, *values.shape[dim + 1 :]])
        whole.movedim(dim, 0)[self.start :: self.step] = values.movedim(dim, 0)
        self.add_up(whole)
        return whole

    def every_one(self, mine: Sequence[Thing]) -> list[Thing]:
        """As `every`, of things of any kind."""
        if self.step == 1:
            return from_first(lambda: list(mine))
        parts = things(list(mine))
        return [parts[row % self.step][row // self.step] for row in range(self.total)]


def dealt(rows: Tensor, needed_for: str = "") -> Tensor:
    """Every count-th of some sequences' numbers [n], of which a process may get none.

    Raises:
        SurgeryError: a process gets none, where `needed_for` says what each needs one for.
    """
    if needed_for and len(rows) < count():
        raise SurgeryError(
            f"{needed_for}: {len(rows)} calibration sequences are fewer than the {count()} processes that share them; "
            "raise calibration tokens, or start fewer processes"
        )
    return rows[rank() :: count()]


def gather_rows(room: Tensor, filled: int) -> int:
    """Fill `room` [n, *], of which this process has the first `filled` rows, with those of all; how many there are."""
    if count() == 1:
        return filled
    own, end = room[:filled].clone(), 0
    for sender, rows in enumerate(things(filled)):
        part = room[end : end + rows]
        if sender == rank():
            part.copy_(own)
        if rows:
            send(sender, [part])
        end += rows
    return end
