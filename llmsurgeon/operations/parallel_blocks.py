"""Full-block parallelisation (FFN Fusion, arXiv 2503.18908, section 5): the blocks of a window, attention included,
all read the window's input; their contributions add up.

    f_window(X) = X + sum_j (f_j(X) - X)
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmsurgeon.model.layers import RunList
from llmsurgeon.model.parts import Touch
from llmsurgeon.model.spec import LayerSpec
from llmsurgeon.operations.base import NewLayer, Plan, Step, Subject, all_kept, assemble
from llmsurgeon.operations.runs import choose_windows


class ParallelBlocks(Step):
    """Parallelise `windows`; `auto` takes the `count` windows of `size` blocks that depend least on one another."""

    op: Literal["parallel_blocks"] = "parallel_blocks"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.RECONNECTS_LAYERS})
    windows: RunList | Literal["auto"] = "auto"
    size: Annotated[int, Field(ge=2)] = 4
    count: Annotated[int, Field(ge=1)] = 1

    def needs(self) -> frozenset[str]:
        return frozenset({"block_dependency"} if self.windows == "auto" else ())

    def resolve(self, subject: Subject) -> ParallelBlocks:
        if self.windows != "auto":
            return self
        dependency = subject.score("block_dependency", "parallel_blocks with windows: auto")
        layers = [layer.parents[0] for layer in subject.spec.layers]
        windows = choose_windows(dependency, layers, self.size, self.count)
        if len(windows) < self.count:
            raise subject.refuse(
                f"parallel_blocks: only {len(windows)} windows of {self.size} fit into "
                f"{len(layers)} blocks, {self.count} asked for"
            )
        return self.model_copy(update={"windows": windows})

    def plan(self, subject: Subject) -> Plan:
        if self.windows == "auto":
            return self.resolve(subject).plan(subject)
        subject.check(self)
        layers = all_kept(subject)
        merged: dict[int, NewLayer] = {}
        gone: set[int] = set()
        for window in self.windows:
            indices = [subject.position(number, "parallel_blocks: layer") for number in window]
            if len(indices) < 2 or indices != list(range(indices[0], indices[-1] + 1)):
                raise subject.refuse(f"parallel_blocks: {list(window)} is not a window of neighbouring blocks")
            if gone & set(indices) or merged.keys() & set(indices):
                raise subject.refuse(f"parallel_blocks: {list(window)} overlaps another window")
            merged[indices[0]] = self._window(subject, [layers[i] for i in indices])
            gone.update(indices[1:])
        return assemble(subject, [merged.get(i, layer) for i, layer in enumerate(layers) if i not in gone])

    @staticmethod
    def _window(subject: Subject, layers: list[NewLayer]) -> NewLayer:
        if any(layer.spec.branches for layer in layers):
            raise subject.refuse("parallel_blocks: a block of the window is parallel already")
        attentions = [attention for layer in layers for attention in layer.spec.attentions]
        if len({attention.window for attention in attentions}) > 1:
            raise subject.refuse(
                "parallel_blocks: the window mixes full and sliding attention; one block has one attention mask"
            )
        if len({attention.rope for attention in attentions}) > 1:
            raise subject.refuse(
                "parallel_blocks: the window mixes attention with and without rotary positions; one block has one kind"
            )
        spec = LayerSpec(
            attention=None,
            ffn=None,
            parents=tuple(p for layer in layers for p in layer.spec.parents),
            branches=tuple(layer.spec for layer in layers),
        )
        tensors = {
            f"branches.{place}.{suffix}": name
            for place, layer in enumerate(layers)
            for suffix, name in layer.tensors.items()
        }
        return NewLayer(spec, tensors)
