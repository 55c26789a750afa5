"""Edits on weights as data, and the one definition of what a list of edits means.

`TransformedWeights` is a mapping from tensor name to tensor. Asking for a name computes just that
tensor from just its sources, so the same object streams a checkpoint larger than memory and edits a
`state_dict()` in place of loops. Wrapping one in another composes operations.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError

# What is computed at a time when rows are made in blocks: a block and its sources stay in one core's cache.
BLOCK_NUMBERS = 2**19

TensorFunction = Callable[..., "Tensor | tuple[Tensor, ...] | Iterator[Tensor]"]


@dataclass(frozen=True)
class WeightTransform:
    """`targets = fn(*sources)`; names in, names out. `fn` is pure: tensors to a tensor, or to one per target.

    A `fn` with one target may be a generator of blocks that follow one another along dimension 0. They are
    written as they come, so that a tensor larger than memory can be made.
    Without `fn` the edit is a rename (one source, one target) or a removal (no target).
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    fn: TensorFunction | None = None

    @property
    def is_rename(self) -> bool:
        """True where bytes pass unchanged under another name."""
        return self.fn is None and len(self.targets) == 1


def rename(source: str, target: str) -> WeightTransform:
    """`source` is called `target` from here on."""
    return WeightTransform((source,), (target,))


def remove(*sources: str) -> WeightTransform:
    """`sources` leave the model."""
    return WeightTransform(sources, ())


class TransformedWeights(Mapping[str, Tensor]):
    """The weights of `base` after `transforms`.

    Names that no transform mentions pass through. A source may feed several transforms; a target is
    claimed once, and may not collide with a name that passes through.

    Raises:
        SurgeryError: a source is missing in `base`, or two edits claim one target.
    """

    def __init__(self, base: Mapping[str, Tensor], transforms: Sequence[WeightTransform]) -> None:
        self.base = base
        self.transforms = tuple(transforms)
        consumed: set[str] = set()
        self._maker: dict[str, WeightTransform] = {}
        for transform in self.transforms:
            for source in transform.sources:
                if source not in base:
                    raise SurgeryError(
                        f"tensor {source!r} is missing from the checkpoint; its config.json promises it. "
                        "Run `llmsurgeon verify` on the source"
                    )
                consumed.add(source)
            for target in transform.targets:
                if target in self._maker:
                    raise SurgeryError(f"two edits write tensor {target!r}")
                self._maker[target] = transform
        self._through = [name for name in base if name not in consumed]
        for name in self._through:
            if name in self._maker:
                raise SurgeryError(f"an edit writes tensor {name!r}, which the model already has and no edit consumes")
        self._last: tuple[WeightTransform, dict[str, Tensor]] | None = None

    def __iter__(self) -> Iterator[str]:
        yield from self._through
        yield from self._maker

    def __len__(self) -> int:
        return len(self._through) + len(self._maker)

    def __contains__(self, name: object) -> bool:
        return name in self._maker or (name in self.base and name in self._passing)

    @property
    def _passing(self) -> set[str]:
        if not hasattr(self, "_passing_set"):
            self._passing_set = set(self._through)
        return self._passing_set

    def __getitem__(self, name: str) -> Tensor:
        transform = self._maker.get(name)
        if transform is None:
            if name not in self._passing:
                raise KeyError(name)
            return self.base[name]
        if transform.fn is None:
            return self.base[transform.sources[0]]
        # Several targets of one transform are asked for one after the other: the last result is kept.
        if self._last is None or self._last[0] is not transform:
            made = self._make(transform)
            if isinstance(made, Iterator):
                made = (torch.cat(list(made)),)
            self._last = (transform, dict(zip(transform.targets, made, strict=True)))
        return self._last[1][name]

    def _make(self, transform: WeightTransform) -> tuple[Tensor, ...] | Iterator[Tensor]:
        assert transform.fn is not None
        made = transform.fn(*(self.base[source] for source in transform.sources))
        count = len(made) if isinstance(made, tuple) else 1
        if count != len(transform.targets):
            raise AssertionError(f"{transform.targets}: {count} tensors made")
        return (made,) if isinstance(made, Tensor) else made

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor `name` as blocks along dimension 0, one at a time where its edit makes it so."""
        transform = self._maker.get(name)
        if transform is not None and transform.fn is not None:
            made = None if self._last and self._last[0] is transform else self._make(transform)
            if isinstance(made, Iterator):
                with one_thread():
                    yield from made
                return
            if made is not None:
                self._last = (transform, dict(zip(transform.targets, made, strict=True)))
            yield self[name]
            return
        if transform is None and name not in self._passing:
            raise KeyError(name)
        yield from blocks(self.base, name if transform is None else transform.sources[0])

    def release(self) -> None:
        """Forget the tensors of the last edit, so that memory stays bounded by one edit."""
        self._last = None
        if isinstance(self.base, TransformedWeights):
            self.base.release()

    def origin(self, name: str) -> str | None:
        """The name in the innermost base whose bytes `name` is an exact copy of, or None where it is computed."""
        transform = self._maker.get(name)
        if transform is not None:
            if not transform.is_rename:
                return None
            name = transform.sources[0]
        return self.base.origin(name) if isinstance(self.base, TransformedWeights) else name

    @property
    def root(self) -> Mapping[str, Tensor]:
        """The innermost base: the checkpoint as it was read."""
        return self.base.root if isinstance(self.base, TransformedWeights) else self.base

    def maker(self, name: str) -> WeightTransform | None:
        """The edit that makes `name`, None where it passes through."""
        return self._maker.get(name)

    def group(self, name: str) -> tuple[str, ...]:
        """The names that are computed together with `name`, itself included."""
        transform = self._maker.get(name)
        if transform is not None:
            return transform.targets
        if isinstance(self.base, TransformedWeights):
            return tuple(other for other in self.base.group(name) if other in self._passing)
        return (name,)


def root_of(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The innermost base of edited weights: the checkpoint, where they come from one."""
    return weights.root if isinstance(weights, TransformedWeights) else weights


def rebase(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The edits of `weights` over another innermost base, e.g. meta tensors: names, shapes and dtypes for free."""
    if isinstance(weights, TransformedWeights):
        return TransformedWeights(rebase(weights.base, base), weights.transforms)
    return base


def blocks(weights: Mapping[str, Tensor], name: str) -> Generator[Tensor, None, None]:
    """`weights[name]` as blocks along dimension 0, in order: one block, unless an edit yields several."""
    if isinstance(weights, TransformedWeights):
        yield from weights.blocks(name)
    else:
        yield weights[name]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on this thread alone: sharing out a block costs more than it saves.

    Threads that wait for the next block do so in a loop, on cores that hashing needs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_blocks(tensor: Tensor, numbers: int = BLOCK_NUMBERS) -> Iterator[Tensor]:
    """Views of `tensor` along dimension 0, about `numbers` numbers each."""
    # Without data there is nothing to keep small.
    rows = len(tensor) if tensor.is_meta else max(1, numbers * len(tensor) // max(tensor.numel(), 1))
    yield from tensor.split(rows)
