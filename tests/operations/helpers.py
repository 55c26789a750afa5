"""In-memory surgery for tests: plan on a state dict, load the result into the class that the format writes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from conftest import FAMILY_NAMES, tiny_config
from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.models import check_shapes, empty_model, expected_shapes, fill
from llmsurgeon.formats.tensor_names import canonical
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.families import Family, family_of
from llmsurgeon.operations import OPERATIONS, Step, Subject

# Falcon 7B, Falcon RW and Falcon 2 11B; the tiny config is laid out as Falcon 40B.
FALCON_7B = {"new_decoder_architecture": False, "num_kv_heads": None, "bias": False}
FALCON_RW = {**FALCON_7B, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
FALCON_2 = {"num_ln_in_parallel_attn": 1, "bias": False}
# Every family, and the variants whose maths differs: (family, changes of its tiny config).
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in FAMILY_NAMES),
    ("llama", {"mlp_bias": True, "attention_bias": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("falcon", FALCON_7B),
    ("falcon", FALCON_RW),
    ("falcon", FALCON_2),
)


def taking(operation: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The variants of VARIANTS whose family does not decline `operation`."""
    step = OPERATIONS[operation]
    return tuple((name, changes) for name, changes in VARIANTS if step.declined(declared(name, changes)) is None)


def taken(model: Any, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps that the model's family does not decline."""
    family = family_of(normalised(model.config.to_dict()))
    return tuple(step for step in steps if step.declined(family) is None)


def declared(name: str, changes: dict[str, Any] | None = None) -> Family:
    """The declaration for a tiny model."""
    return family_of(normalised(tiny_config(name, **(changes or {}))))


def subject_of(model: Any, scores: dict[str, Any] | None = None) -> tuple[Subject, TransformedWeights, dict[str, Any]]:
    config = normalised(model.config.to_dict())
    family = family_of(config)
    spec = family.describe(config)
    weights = canonical(model.state_dict(), family, model.all_tied_weights_keys)
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
    student, weights = empty_model(written.config), written.fit(weights)
    check_shapes({n: tuple(t.shape) for n, t in weights.items()}, expected_shapes(student), "test")
    fill(student, weights, None, "cpu")
    return student, written, subject.spec


def some_tokens(batch: int = 2, length: int = 24, vocab: int = 64) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def layers_of(model: Any, family: Any) -> Any:
    return model.get_submodule(family.layers)


def norm_of_ffn(family: Any) -> str:
    """Name of the norm that the family's FFN reads through."""
    return family.attention_norm if family.shares_norm else family.ffn_norm


def through(layer: Any, norm: str, x: Tensor) -> Tensor:
    """x behind one of the layer's norms; as it is where the family has none."""
    return getattr(layer, norm)(x) if norm else x


def no_residual(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Zeros for modules that take the residual and add it themselves, as BLOOM's do."""
    return (torch.zeros_like(x),) if "residual" in inspect.signature(module.forward).parameters else ()


def multiplier(layer: Any, family: Any) -> float:
    """The factor on what attention and FFN add."""
    return getattr(layer, family.residual_multiplier_key) if family.residual_multiplier_key else 1.0


def stream_of(output: Any) -> Tensor:
    """The stream that left a layer; some return attention weights beside it."""
    return output[0] if isinstance(output, tuple) else output


class Loose(torch.nn.Module):
    """The FFN of an OPT layer, whose projections are the layer's own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.fc2(self.layer.activation_fn(self.layer.fc1(x)))


class Stage(torch.nn.Module):
    """Takes one layer's place in a copy of the parent and computes `fn(x, parts)` from the parent's own modules."""

    def __init__(self, parts: Any, fn: Any) -> None:
        super().__init__()
        object.__setattr__(self, "parts", parts)
        self.fn = fn

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.fn(hidden_states, self.parts.called_with(args, kwargs))
        # The layers of these return (stream, attention weights).
        return (output, None) if self.parts.family.model_type in ("falcon", "bloom") else output


class Parts:
    """The parent's attention, FFN and whole layer by number, called the way the model calls its layers."""

    def __init__(self, layers: list[Any], family: Any, call: Any = ((), {})) -> None:
        self.layers, self.family, self.call = layers, family, call

    def called_with(self, args: Any, kwargs: Any) -> Parts:
        return Parts(self.layers, self.family, (args, kwargs))

    def attention(self, index: int, x: Tensor) -> Tensor:
        """m * post_norm(Attn(norm(x))); most families have no post-norm and m = 1."""
        layer, family, (args, kwargs) = self.layers[index], self.family, self.call
        attention = getattr(layer, family.attention)
        normed = through(layer, family.attention_norm, x)
        output = attention(normed, *no_residual(attention, x), *args, **kwargs)[0]
        return through(layer, family.attention_post_norm, output) * multiplier(layer, family)

    def ffn(self, index: int, x: Tensor, norm: int | None = None) -> Tensor:
        """m * post_norm(FFN(norm(x))), with the norm of layer `norm` if given."""
        layer, family = self.layers[index], self.family
        normed = through(self.layers[index if norm is None else norm], norm_of_ffn(family), x)
        ffn = layer.get_submodule(family.ffn) if family.ffn else Loose(layer)
        output = ffn(normed, *no_residual(ffn, x))
        return through(layer, family.ffn_post_norm, output) * multiplier(layer, family)

    def block(self, index: int, x: Tensor) -> Tensor:
        args, kwargs = self.call
        return stream_of(self.layers[index](x, *args, **kwargs))


def naive(model: Any, stages: dict[int, Any]) -> Any:
    """A copy of the parent in which `stages[layer](x, parts)` computes that layer: the slow obvious version."""
    family = family_of(normalised(model.config.to_dict()))
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
    return [layer.parents for layer in spec.layers]
