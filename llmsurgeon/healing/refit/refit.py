"""Closed-form healing: after a cut, move projections of the student towards the parent's hidden states, by regression.

No gradients: parent and student walk side by side, layer by layer, over calibration text. At each layer of the student
the parent walks the span of layers whose work that layer does, and the closed-form updates below are tried in their
order. Ternary weights (llmsurgeon/model/ternary.py) stay as they are; they count as a change that the others make up
for. Inputs are always the student's own, so errors of earlier layers are corrected by later ones. Part of the
calibration sequences is held out: it chooses the ridge, and an update that does not lower its error there is not made.

Shapes: S sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmsurgeon.healing.batches import embedded, left, passes
from llmsurgeon.healing.refit.align import align_attention, align_ffn, attention_drifts, ffn_drifts
from llmsurgeon.healing.refit.attention import comes_back, refit_attention
from llmsurgeon.healing.refit.context import Context, LayerFit, Update
from llmsurgeon.healing.refit.join import can_take_over, take_over
from llmsurgeon.healing.refit.mixer import fit_mixer, is_new
from llmsurgeon.healing.refit.norm import ends_in_norm, fit_norm
from llmsurgeon.healing.refit.output import can_move, refit_output
from llmsurgeon.healing.refit.trees import align_trees, fit_trees, has_trees, trees_drift
from llmsurgeon.healing.spans import changed, holds_ternary, spans
from llmsurgeon.healing.store import Stored, layer_name, moved, on_copies
from llmsurgeon.model.parts import FFFSpec
from llmsurgeon.processes.exchange import send
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams, copied


@dataclass(frozen=True)
class ClosedForm:
    """One closed-form update: at which layers it is tried, and what it does there to the layer's weights."""

    applies: Callable[[LayerFit], bool]
    update: Callable[[LayerFit], None]
    before_span: bool = False


# In the order in which they are tried at each layer. Those before the span find the parent's stream where the layer's
# input is, the others where its output is to be.
UPDATES: dict[str, ClosedForm] = {
    "align attention": ClosedForm(attention_drifts, align_attention, before_span=True),
    "mixer": ClosedForm(is_new, fit_mixer),
    "join": ClosedForm(can_take_over, take_over),
    "attention": ClosedForm(comes_back, refit_attention),
    "align trees": ClosedForm(trees_drift, align_trees),
    "trees": ClosedForm(has_trees, fit_trees),
    "align ffn": ClosedForm(ffn_drifts, align_ffn),
    "norm": ClosedForm(ends_in_norm, fit_norm),
    "output": ClosedForm(can_move, refit_output),
}


@dataclass(frozen=True)
class Refitted:
    """What a refit found. files: name of every tensor that changed -> the safetensors file that holds it."""

    files: dict[str, Path]
    updates: tuple[Update, ...]


def refit(context: Context[LayerRunner]) -> Refitted:
    """Take both models through the text, and fit every layer that changed, or that reads something new.

    Raises:
        SurgeryError: a hidden state is not finite, or the disk fails.
    """
    student, batches, spec = context.student, context.batches, context.spec
    embedded(context.parent, batches)  # it learns how its layers are called
    x = embedded(student, batches)
    p = copied(x)
    summed = torch.empty_like(x) if context.family.post_norm else p
    files: dict[str, Path] = {}
    updates: list[Update] = []
    drifted = False
    todo = spans(spec, len(context.parent.layers))
    with torch.no_grad(), Progress("refit", len(todo), "blocks") as progress:
        for index, (layer, span) in enumerate(zip(spec.layers, todo, strict=True)):
            with student.loaded(index) as module:
                new = changed(layer, span, context.parent_spec) or holds_ternary(module, context.family.transposed)
                here = LayerFit(context, index, layer, span, module, new, drifted, x, p, summed)
                if new or drifted:
                    stored = fitted_layer(here)
                    files |= stored.files
                    updates += [Update.of_record(record) for record in stored.records]
                else:
                    walk_span(here)
                left(student, batches, index, x, here.attended, into=x)
            drifted = drifted or new
            progress.advance()
    return Refitted(files, tuple(updates))


def fitted_layer(here: LayerFit) -> Stored:
    """The loaded layer with every update that helps, or as an earlier run stored it."""
    store, name, prefix = here.context.store, layer_name(here.index), here.family.layer(here.index)
    stored = store.found(name)
    if stored is not None:
        walk_span(here)
        stored.load_into(here.module, prefix)
    else:
        before = on_copies(here.module)
        try_updates(here)
        send(0, list(here.module.state_dict().values()))
        stored = store.keep(name, moved(here.module, before, prefix), here.updates)
    # Where attention itself ends the layer, what is behind it moved with the output projection.
    whole = here.spec.branches or (here.changed and here.spec.ffn is None)
    here.attended = None if whole else here.behind_attention()
    return stored


def try_updates(here: LayerFit, over_span: Callable[[LayerFit], None] | None = None) -> None:
    """Every update that applies, and the parent's span in between. Layers in parallel branches stay as they are.

    over_span: takes the parent's stream over the span, where somebody knows it; `walk_span` else.
    """
    fitting = () if here.spec.branches else UPDATES.values()
    for each in fitting:
        if each.before_span and each.applies(here):
            each.update(here)
    (over_span or walk_span)(here)
    for each in fitting:
        if not each.before_span and each.applies(here):
            each.update(here)


def walk_span(here: LayerFit) -> None:
    """Take the parent's stream over the span, and keep what each of its FFNs reads on the way."""
    parent, p = here.context.parent, here.parent
    here.read = Streams(len(here.span), tuple(p.shape), p.dtype).data
    for place, number in enumerate(here.span):
        with parent.loaded(number) as module, _watched_sum(here.context, module) as summed:
            for part, layer in passes(parent, here.context.batches, number, p):
                here.read[place, part] = layer.ffn_input.cpu()
                p[part] = layer.left.cpu()
                if summed:
                    here.summed[part] = summed.pop().cpu()


@contextmanager
def _watched_sum(context: Context[LayerRunner], module: nn.Module) -> Iterator[list[Tensor]]:
    """What the norm behind a post-norm layer's FFN reads, call after call; nothing where no update needs it."""
    seen: list[Tensor] = []
    if not context.family.post_norm or not any(isinstance(layer.ffn, FFFSpec) for layer in context.spec.layers):
        yield seen
        return
    norm = module.get_submodule(context.family.ffn_norm)
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()
