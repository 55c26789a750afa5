"""Fewer key/value heads: each new head is the mean of those that it replaces (GQA, arXiv 2305.13245, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from llmsurgeon.model.families import Family
from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import AttentionSpec, Touch
from llmsurgeon.operations.base import Computed, NewLayer, Offer, Plan, Step, Subject, all_kept, assemble
from llmsurgeon.operations.ranked import with_part


def merge_heads(weight: Tensor, old_heads: int, new_heads: int) -> Tensor:
    """Mean of neighbouring heads: rows [old_heads * d, ...] -> [new_heads * d, ...], computed in float32.

    Works on weights [K, D] and biases [K]. Neighbours share a query group after the merge, so
    query heads keep their order.
    """
    grouped = weight.float().unflatten(0, (new_heads, old_heads // new_heads, -1))
    return grouped.mean(dim=1).flatten(0, 1).to(weight.dtype)


def merge_fused_heads(weight: Tensor, attention: AttentionSpec, new_heads: int, rows: str) -> Tensor:
    """`merge_heads` on one matrix [Q + 2 K, D] (or bias [Q + 2 K]) of queries, keys and values.

    Args:
        rows: "by kind" (all queries, all keys, all values) or "by head" (for each key/value head its queries, its key,
            its value).
    """
    heads, old_heads, width = attention.shape
    if rows == "by kind":
        queries, *others = weight.split([heads * width, old_heads * width, old_heads * width])
        return torch.cat([queries, *(merge_heads(other, old_heads, new_heads) for other in others)])
    by_head = weight.unflatten(0, (old_heads, heads // old_heads + 2, width))
    queries = by_head[:, :-2].flatten(0, 1).unflatten(0, (new_heads, heads // new_heads))
    merged = [
        merge_heads(by_head[:, place].flatten(0, 1), old_heads, new_heads).unflatten(0, (new_heads, 1, width))
        for place in (-2, -1)
    ]
    return torch.cat([queries, *merged], dim=1).flatten(0, 2)


class PruneKVHeads(Step):
    """Merge the key/value heads of `layers` (all, when not given) down to `kv_heads`."""

    op: Literal["prune_kv_heads"] = "prune_kv_heads"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_HEADS})
    kv_heads: Annotated[int, Field(ge=1)]
    layers: LayerList | None = None

    @staticmethod
    def misfit(family: Family) -> str | None:
        has_heads = family.kv or family.fused_qkv
        return None if has_heads else "its classes cannot hold another number of key/value heads"

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        offers = []
        for number in with_part(subject, "attention"):
            attention = subject.spec.layers[subject.position(number)].attention
            if isinstance(attention, AttentionSpec) and attention.looks_back:
                fewer = [count for count in range(1, attention.kv_heads) if attention.kv_heads % count == 0]
                offers += [
                    Offer((number,), "attention", f"{count} merged KV heads", (cls(kv_heads=count, layers=(number,)),))
                    for count in fewer[:-3:-1]
                ]
        return offers

    @classmethod
    def merged(cls, steps: Sequence[Self]) -> list[Step]:
        layers: dict[int, list[int]] = {}
        for step in steps:
            layers.setdefault(step.kv_heads, []).extend(step.layers or ())
        return [cls(kv_heads=count, layers=tuple(sorted(each))) for count, each in sorted(layers.items(), reverse=True)]

    def plan(self, subject: Subject) -> Plan:
        subject.check(self)
        layers = all_kept(subject)
        for index in subject.positions(self.layers, "attention", self.op):
            layers[index] = self._merged(subject, layers[index])
        return assemble(subject, layers)

    def _merged(self, subject: Subject, layer: NewLayer) -> NewLayer:
        family, attention, number = subject.family, layer.spec.attention, layer.spec.parents[0]
        if attention is None:
            raise subject.refuse(f"prune_kv_heads: layer {number} has no attention")
        if attention.kv_heads % self.kv_heads:
            raise subject.refuse(
                f"prune_kv_heads: layer {number} has {attention.kv_heads} key/value heads, "
                f"which {self.kv_heads} does not divide"
            )

        def merge(weight: Tensor) -> Tensor:
            if family.fused_qkv:
                return merge_fused_heads(weight, attention, self.kv_heads, family.fused_qkv[1])
            return merge_heads(weight, attention.kv_heads, self.kv_heads)

        modules = family.fused_qkv[:1] if family.fused_qkv else family.kv
        merged = tuple(f"{family.attention}.{name}." for name in modules)
        tensors = {
            suffix: Computed((str(name),), merge) if suffix.startswith(merged) else name
            for suffix, name in layer.tensors.items()
        }
        return NewLayer(replace(layer.spec, attention=replace(attention, kv_heads=self.kv_heads)), tensors)
