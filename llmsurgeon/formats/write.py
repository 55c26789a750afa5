"""A model in the form that it fits into, or that is asked for: chosen, described, and what it asks of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.form import CheckpointForm, Config, Form, Packing, Written
from llmsurgeon.formats.forms import CHECKPOINTS, forms_that_can
from llmsurgeon.formats.layer_lists import cut_config
from llmsurgeon.formats.models import empty_model, expected_shapes
from llmsurgeon.formats.names import WantedForm
from llmsurgeon.formats.native import odd
from llmsurgeon.formats.padding import fitted
from llmsurgeon.formats.surgeon import SURGEON
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec


def write_config(spec: ModelSpec, family: Family, source: Config, wanted: WantedForm = "auto") -> Written:
    """The form of `spec`, made from the source's normalised config.

    Raises:
        SurgeryError: the form that is asked for cannot express some block; the message names it.
    """
    config = cut_config(spec, family, source)
    if wanted == "auto":
        form, why = _first_wanted(spec, family, config)
    else:
        form, why = CHECKPOINTS[wanted], odd(spec, family, config) or "asked for"
        _refuse_misfit(form, spec, family, config)
    body = form.describe(spec, family, config)
    made = Written(
        form, body.config, body.code, body.why or why, body.loads, body.spec, student=body.config, parts=body.parts
    )
    if body.alone:
        return made
    student = SURGEON.describe(spec, family, config).config
    own, shapes = expected_shapes(empty_model(student)), expected_shapes(empty_model(body.config))
    return replace(made, student=student, transforms=() if own == shapes else fitted(own, shapes, family, spec))


def packable(written: Written, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that the form would pack, by their values; none where it packs nothing.

    Raises:
        SurgeryError: one of them it can hold only unpacked.
    """
    packs = written.form.packs
    return packs.names(weights, empty_model(written.config)) if packs else []


def packing_for(written: Written, meta: Mapping[str, Tensor], names: Iterable[str], reader: Any = None) -> Packing:
    """How the form packs the weights `names`, to be read by the class `reader`; of a form that packs.

    `meta` are the fitted tensors, without data.

    Raises:
        SurgeryError: one of them cannot be packed.
    """
    assert written.form.packs
    return written.form.packs.pack(empty_model(written.config), meta, names, reader)


def _first_wanted(spec: ModelSpec, family: Family, config: Config) -> tuple[CheckpointForm, str]:
    """The first form that nothing stands against, and what stands against those before it."""
    against: list[str] = []
    for form in CHECKPOINTS.values():
        if form.unwanted is None:
            continue
        reason = form.unwanted(spec, family, config)
        if reason is None:
            return form, "; ".join(against) or "every block has the family's own shape"
        against.append(f"not {form.name}: {reason}" if against else reason)
    raise AssertionError("the surgeon form holds every model")


def _refuse_misfit(form: Form, spec: ModelSpec, family: Family, config: Config) -> None:
    asked = form.plain or form
    if reason := asked.misfit(spec, family, config):
        raise SurgeryError(
            f"format {asked.name} cannot hold this model: {reason}; formats that can: "
            f"{', '.join(forms_that_can(spec, family, config))}"
        )
