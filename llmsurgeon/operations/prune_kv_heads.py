"""Fewer key/value heads: each new head is the mean of those that it replaces (GQA, arXiv 2305.13245, section 2.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from llmsurgeon.layers import LayerList
from llmsurgeon.operations.base import Computed, NewBlock, Plan, Step, Subject, all_kept, assemble


def merge_heads(weight: Tensor, old_heads: int, new_heads: int) -> Tensor:
    """Mean of neighbouring heads: rows [old_heads * d, ...] -> [new_heads * d, ...], computed in float32.

    Works on weights [K, D] and biases [K]. Neighbours share a query group after the merge, so
    query heads keep their order.
    """
    grouped = weight.float().unflatten(0, (new_heads, old_heads // new_heads, -1))
    return grouped.mean(dim=1).flatten(0, 1).to(weight.dtype)


class PruneKVHeads(Step):
    """Merge the key/value heads of `layers` (all, when not given) down to `kv_heads`."""

    op: Literal["prune_kv_heads"] = "prune_kv_heads"
    kv_heads: Annotated[int, Field(ge=1)]
    layers: LayerList | None = None

    def plan(self, subject: Subject) -> Plan:
        if not subject.family.kv:
            raise subject.refuse(
                f"prune_kv_heads: {subject.family.model_type} stores queries, keys and values as one matrix "
                "with as many key/value heads as query heads; its classes cannot hold fewer"
            )
        blocks = all_kept(subject)
        if self.layers is None:
            indices = [i for i, block in enumerate(subject.spec.blocks) if block.attention is not None]
        else:
            indices = [subject.position(layer, "prune_kv_heads: layer") for layer in self.layers]
        for index in indices:
            blocks[index] = self._merged(subject, blocks[index])
        return assemble(subject, blocks)

    def _merged(self, subject: Subject, block: NewBlock) -> NewBlock:
        attention, layer = block.spec.attention, block.spec.parents[0]
        if attention is None:
            raise subject.refuse(f"prune_kv_heads: layer {layer} has no attention")
        if attention.kv_heads % self.kv_heads:
            raise subject.refuse(
                f"prune_kv_heads: layer {layer} has {attention.kv_heads} key/value heads, "
                f"which {self.kv_heads} does not divide"
            )

        def merge(weight: Tensor) -> Tensor:
            return merge_heads(weight, attention.kv_heads, self.kv_heads)

        merged = tuple(f"{subject.family.attention}.{name}." for name in subject.family.kv)
        tensors = {
            suffix: Computed((str(name),), merge) if suffix.startswith(merged) else name
            for suffix, name in block.tensors.items()
        }
        return NewBlock(replace(block.spec, attention=replace(attention, kv_heads=self.kv_heads)), tensors)
