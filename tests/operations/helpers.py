"""In-memory surgery for tests: plan on a state dict, load the result into the class that the format writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.families import family_of
from llmsurgeon.formats.models import canonical, check_shapes, empty_model, expected_shapes, fill, normalised
from llmsurgeon.formats.write import write_config
from llmsurgeon.operations import Step, Subject


def subject_of(model: Any, scores: dict[str, Any] | None = None) -> tuple[Subject, TransformedWeights, dict[str, Any]]:
    config = normalised(model.config.to_dict())
    family = family_of(config)
    spec = family.describe(config)
    weights = canonical({n: t for n, t in model.state_dict().items()}, family, spec.tied)
    subject = Subject(spec, family, frozenset(weights), scores or {})
    return subject, weights, config


def operate(model: Any, *steps: Step, scores: dict[str, Any] | None = None, format: Any = "auto") -> Any:
    """The operated model, its config and its spec."""
    subject, weights, config = subject_of(model, scores)
    for step in steps:
        plan = step.resolve(subject).plan(subject)
        weights = TransformedWeights(weights, plan.transforms)
        subject = subject.after(plan)
    written = write_config(subject.spec, subject.family, config, format)
    student = empty_model(written.config)
    check_shapes({n: tuple(t.shape) for n, t in weights.items()}, expected_shapes(student), "test")
    fill(student, weights, None, "cpu")
    return student, written, subject.spec


def some_tokens(batch: int = 2, length: int = 24, vocab: int = 64) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def layers_of(model: Any, family: Any) -> Any:
    return model.get_submodule(family.layers)
