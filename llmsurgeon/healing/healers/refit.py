"""`refit`: closed-form updates, of a stack of layers or of a block transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon.formats.models import filled_model
from llmsurgeon.healing.batches import Batches
from llmsurgeon.healing.healers.base import HealingContext
from llmsurgeon.healing.refit.block_transformer import refit_block_transformer
from llmsurgeon.healing.refit.context import Context, RefitOptions, Update
from llmsurgeon.healing.refit.refit import refit
from llmsurgeon.healing.store import LayerStore
from llmsurgeon.operations.refit import Refit
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class Refitted:
    """The updates that were tried, made or not."""

    files: Mapping[str, Path]
    updates: tuple[Update, ...]

    def behind(self, earlier: Refitted) -> Refitted:
        """With the updates of an earlier refit."""
        return Refitted(self.files, (*earlier.updates, *self.updates))

    def record(self) -> list[dict[str, Any]]:
        """An entry for each update."""
        return [update.to_dict() for update in self.updates]

    def notes(self) -> list[str]:
        """One line, where anything was tried."""
        if not self.updates:
            return []
        made = sum(update.accepted for update in self.updates)
        refused = len(self.updates) - made
        note = f"Refit: {made} closed-form updates made"
        return [note + (f", {refused} refused because they did not lower the held-out error." if refused else ".")]

    def lines(self) -> list[str]:
        """As on the card."""
        return self.notes()

    def pages(self, name: str) -> Mapping[str, str]:
        """None."""
        return {}


def refitted(context: HealingContext, step: Refit) -> Refitted:
    """The student's projections moved towards the parent's hidden states."""
    parent = context.parent
    batches = Batches.of(context.windows, context.held_out, context.batch, parent.padding, context.kinds)
    options = RefitOptions(step.ridges, step.align, step.align_ridge, step.join, step.join_ridge)
    shared = (context.parent_spec, context.spec, batches, options, LayerStore(context.folder))
    if context.spec.block_transformer:
        whole = filled_model(context.config, context.weights, parent.dtype, context.device)
        for parameter in whole.parameters():
            # Tensors of a checkpoint are views of its files, and two modules may hold the same one.
            parameter.data = parameter.data.clone()
        made = refit_block_transformer(Context(parent, whole, *shared))
    else:
        student = LayerRunner(context.config, context.weights, parent.dtype, context.device, parent.padding)
        made = refit(Context(parent, student, *shared))
    return Refitted(made.files, made.updates)
