"""In-memory surgery for tests: plan on a state dict, load the result into the class that the format writes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from conftest import FAMILY_NAMES
from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.families import family_of
from llmsurgeon.formats.models import canonical, check_shapes, empty_model, expected_shapes, fill, normalised
from llmsurgeon.formats.write import write_config
from llmsurgeon.operations import Step, Subject

# Every family, and the variants whose maths differs: (family, changes of its tiny config).
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in FAMILY_NAMES),
    ("llama", {"mlp_bias": True, "attention_bias": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
)


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


class Stage(torch.nn.Module):
    """Takes one layer's place in a copy of the parent and computes `fn(x, parts)` from the parent's own modules."""

    def __init__(self, parts: Any, fn: Any) -> None:
        super().__init__()
        object.__setattr__(self, "parts", parts)
        self.fn = fn

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.fn(hidden_states, self.parts.called_with(args, kwargs))


class Parts:
    """The parent's attention, FFN and whole layer by number, called the way the model calls its layers."""

    def __init__(self, layers: list[Any], family: Any, call: Any = ((), {})) -> None:
        self.layers, self.family, self.call = layers, family, call

    def called_with(self, args: Any, kwargs: Any) -> Parts:
        return Parts(self.layers, self.family, (args, kwargs))

    def attention(self, index: int, x: Tensor) -> Tensor:
        """Attn(norm(x))."""
        layer, (args, kwargs) = self.layers[index], self.call
        norm = getattr(layer, self.family.attention_norm)
        return getattr(layer, self.family.attention)(norm(x), *args, **kwargs)[0]

    def ffn(self, index: int, x: Tensor, norm: int | None = None) -> Tensor:
        """FFN(norm(x)), with the norm of layer `norm` if given."""
        normed = getattr(self.layers[index if norm is None else norm], self.family.ffn_norm)(x)
        return getattr(self.layers[index], self.family.ffn)(normed)

    def block(self, index: int, x: Tensor) -> Tensor:
        args, kwargs = self.call
        return self.layers[index](x, *args, **kwargs)


def naive(model: Any, stages: dict[int, Any]) -> Any:
    """A copy of the parent in which `stages[layer](x, parts)` computes that layer: the slow obvious version."""
    family = family_of(model.config.to_dict())
    copied = copy.deepcopy(model)
    layers = layers_of(copied, family)
    parts = Parts(list(layers), family)
    for index, fn in stages.items():
        layers[index] = Stage(parts, fn)
    return copied


def skip(x: Tensor, parts: Parts) -> Tensor:
    """A layer that is not there."""
    return x


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def cut_plan(spec: Any) -> list[tuple[int, ...]]:
    """The parents of each block."""
    return [block.parents for block in spec.blocks]
