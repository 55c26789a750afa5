"""The last part of every plan, of `run`, `export` and `heal`: the form that a model is written in, held against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.formats.bitnet import LinearClass
from llmsurgeon.formats.form import Packing, Written
from llmsurgeon.formats.models import check_shapes, empty_model, expected_shapes
from llmsurgeon.formats.names import WantedForm
from llmsurgeon.formats.write import packable, packing_for
from llmsurgeon.model.costs import Costs
from llmsurgeon.operations import Subject
from llmsurgeon.operations.base import all_kept, assemble
from llmsurgeon.planning.opened import DescribedModel, shapes_of


@dataclass(frozen=True)
class Student:
    """A model as it will be written: `weights` are its own, `meta` what will be written, on the meta device."""

    subject: Subject
    weights: Mapping[str, Tensor]
    meta: Mapping[str, Tensor]
    written: Written
    costs: Costs


def packed_by_value(student: Student, linear_class: LinearClass | None = None) -> Packing:
    """How the weights that the form can pack as they are will be packed, for transformers' `linear_class`."""
    return packing_for(student.written, student.meta, packable(student.written, student.weights), linear_class)


def student_of(
    parent: DescribedModel,
    subject: Subject,
    weights: Mapping[str, Tensor],
    form: WantedForm,
    packing: Callable[[Student], Packing] = packed_by_value,
    stored: DescribedModel | None = None,
) -> Student:
    """The model `subject` as it will be written: no empty layers, its form chosen, its shapes checked, its costs known.

    Args:
        weights: made of those of `stored`, a student's own checkpoint; by default of `parent`'s.
        packing: asked where the form packs.

    Raises:
        SurgeryError: the form cannot express it, or it is not the model that its config builds.
    """
    source, what = (parent, "the planned checkpoint") if stored is None else (stored, "the healed checkpoint")
    subject, weights = without_empty_layers(subject, weights)
    written = parent.form(subject.spec, form)
    meta = written.fit(source.on_meta(weights))
    shapes = shapes_of(meta)
    check_shapes(shapes, expected_shapes(empty_model(written.config)), what, parent.family, parent.beside)
    student = Student(subject, weights, meta, written, source.costs(written.spec, shapes))
    if written.form.packs is None:
        return student
    packed = packing(student)
    costs = replace(student.costs, disk_bytes=student.costs.disk_bytes - packed.saved(meta))
    return replace(student, written=replace(written, packing=packed), costs=costs)


def without_empty_layers(subject: Subject, weights: Mapping[str, Tensor]) -> tuple[Subject, Mapping[str, Tensor]]:
    """The model without layers that only pass their input on, as published Nemotron-NAS checkpoints have them."""
    if not any(layer.empty for layer in subject.spec.layers):
        return subject, weights
    made = assemble(subject, all_kept(subject))
    return subject.after(made), TransformedWeights(weights, made.transforms)
