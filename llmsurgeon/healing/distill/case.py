"""A student beside its parent, with what is needed to heal it by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsurgeon.healing.distill.data import Corpus, Rows, without_overlap, without_sentences
from llmsurgeon.healing.distill.latent import ternary_layer
from llmsurgeon.healing.spans import changed
from llmsurgeon.model.spec import ModelSpec
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class Case:
    """A student beside its parent, with what is needed to heal it.

    parent, parent_config, parent_spec: the parent layer by layer, its normalised config and description.
    fingerprint: names the parent as it computes: weights, dtype, kind of device, libraries.
    config, spec, weights: the student's; its layers name those of the parent that they stand for.
    text: what to train on; held_out: sequences [S, T] that only judge.
    folder: where checkpoints and results of this job are kept, through kills.
    logs: where trackers write.
    """

    parent: LayerRunner
    parent_config: dict[str, Any]
    parent_spec: ModelSpec
    fingerprint: str
    config: dict[str, Any]
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    text: list[Rows]
    held_out: Tensor
    folder: Path
    logs: Path
    device: str = "cpu"
    batch: int = 8
    say: Callable[[str], None] = lambda line: None

    def changed(self, index: int, span: tuple[int, ...]) -> bool:
        """True where layer `index`, which does the work of the parent's layers `span`, is not simply one of them."""
        family = self.parent.family
        shape = changed(self.spec.layers[index], span, self.parent_spec)
        return shape or ternary_layer(self.weights, family.layer(index), family.transposed)

    def dense(self, name: str) -> Tensor | None:
        """The parent's tensor where the student has `name`, None where it has none of this shape."""
        family, wanted = self.parent.family, self.weights[name].shape
        if name.startswith(f"{family.layers}."):
            number, _, inside = name.removeprefix(f"{family.layers}.").partition(".")
            parents = self.spec.layers[int(number)].parents
            name = family.layer(parents[0]) + inside if len(parents) == 1 else ""
        found = self.parent.weights.get(name)
        return found if found is not None and found.shape == wanted else None

    def corpus(self, seed: int) -> Corpus:
        """The training text in its order from the beginning, rows that share text with the held-out sequences left out.

        Raises:
            SurgeryError: nothing is left of a source.
        """
        # Padding would be text that all sentences share.
        clean = without_overlap if self.parent.padding is None else without_sentences
        return Corpus(self.text, [clean(rows, self.held_out) for rows in self.text], seed)
