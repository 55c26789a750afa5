"""Weight edits that fit a student into larger shapes without changing what it computes: zeros for what is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from llmsurgeon.checkpoint.transform import BLOCK_NUMBERS, WeightTransform, rename, row_blocks
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]
Rows = Callable[[Tensor], Iterator[Tensor]]


def fitted(student: Shapes, target: Shapes, family: Family, spec: ModelSpec) -> tuple[WeightTransform, ...]:
    """Edits that give the tensors of `student` (described by `spec`) the names and shapes of `target`.

    FFN channels are appended as zeros, key/value heads repeated in place for the queries that share them, and tensors
    that the student lacks made of zeros, gains of norms of ones: as long as one of an absent part's projections is
    zero, the part adds nothing. Every edit gives its rows a block at a time.
    """
    edits: dict[str, Rows] = {}
    for index, layer in enumerate(spec.layers):
        prefix = family.layer(index)
        heads = tuple(prefix + f"{family.attention}.{projection}." for projection in family.kv)
        for name in (name for name in target if name.startswith(prefix) and name in student):
            if target[name] == student[name]:
                continue
            if layer.attention and heads and name.startswith(heads):
                edits[name] = repeated(target[name][0] // student[name][0], layer.attention.head_dim)
            else:
                stacked = family.ffn_stacked if name.startswith(_readers(family, prefix)) else 1
                edits[name] = padded(target[name], stacked)
    made = [WeightTransform((name,), (name,), edit) for name, edit in edits.items()]
    missing = [name for name in target if name not in student]
    if missing:
        # Something small that lends its dtype and its device.
        lender = min((name for name in student if name not in edits), key=lambda name: prod(student[name]))
        made += [WeightTransform((lender,), (name,), filled(target[name], _is_gain(name, target))) for name in missing]
        made.append(rename(lender, lender))
    return tuple(made)


def padded(shape: tuple[int, ...], stacked: int = 1) -> Rows:
    """Zeros after the rows, and after the columns, up to `shape`; `stacked` matrices of one size are padded each."""

    def made(tensor: Tensor) -> Iterator[Tensor]:
        for part in tensor.chunk(stacked):
            for layer in row_blocks(part):
                yield layer if tensor.dim() == 1 else torch.nn.functional.pad(layer, (0, shape[1] - tensor.shape[1]))
            yield from _blocks(tensor, (shape[0] // stacked - len(part), *shape[1:]), 0.0)

    return made


def repeated(times: int, head_dim: int) -> Rows:
    """Each key/value head `times` times in a row: the queries that shared it now have a copy for each smaller group."""

    def made(tensor: Tensor) -> Iterator[Tensor]:
        for head in tensor.split(head_dim):
            for _ in range(times):
                yield head

    return made


def filled(shape: tuple[int, ...], value: float) -> Rows:
    """A tensor of one value, of the dtype and on the device of the tensor that it is given."""

    def made(lender: Tensor) -> Iterator[Tensor]:
        yield from _blocks(lender, shape, value)

    return made


def _blocks(like: Tensor, shape: tuple[int, ...], value: float) -> Iterator[Tensor]:
    # Without data there is nothing to keep small.
    step = shape[0] if like.is_meta else max(1, BLOCK_NUMBERS // prod(shape[1:]))
    for start in range(0, shape[0], max(1, step)):
        yield like.new_full((min(step, shape[0] - start), *shape[1:]), value)


def _readers(family: Family, prefix: str) -> tuple[str, ...]:
    return tuple(prefix + family.ffn_tensor(projection, "") for projection in family.ffn_in)


def _is_gain(name: str, shapes: Shapes) -> bool:
    return name.endswith(".weight") and len(shapes[name]) == 1
