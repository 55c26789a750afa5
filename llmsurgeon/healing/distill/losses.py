"""What distillation minimises: LOSSES, one entry a loss, and the formula of each.

A new loss is a function here, a line in LOSSES, and its weight as a field of `operations.distill.Distill`.

B sequences, L tokens, D model width, V vocabulary, E layer ends that carry a hidden-state loss.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llmsurgeon.healing.distill.divergence import NextTokens, Target, chunked_kl, cosine_distance
from llmsurgeon.healing.distill.tapped import TappedModel
from llmsurgeon.healing.distill.targets import Targets, distribution

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill

# What a loss may read: both models' hidden states at layer ends; the student's last hidden states, final norm included;
# the parent's; the parent's next-token distributions; the decisions that the student's trees took.
Need = Literal["layer ends", "last states", "parent's last states", "parent's distributions", "decisions"]


@dataclass(frozen=True)
class Seen:
    """One batch as the losses see it.

    ids: [B, L]. ends: the student's hidden states at layer ends, [B, L, D] each. states: its last ones, [B, L, D].
    answers: the parent's, as `targets` gives them. real: which places hold tokens, bool [B, L]; None: all of them.
    positions: those that carry the KL; None: all of them.
    """

    student: TappedModel
    targets: Targets
    ids: Tensor
    ends: list[Tensor]
    states: Tensor
    answers: dict[str, Tensor] = field(default_factory=dict)
    real: Tensor | None = None
    positions: Tensor | None = None

    def tokens(self, values: Tensor) -> Tensor:
        """Values [B, L, D] without those of padding."""
        return values if self.real is None else values[self.real]

    def divergence(self, states_BLD: Tensor, target: Callable[[slice], Target]) -> Tensor:
        """Mean KL of what the student's head makes of its last hidden states from a target."""
        head = list(self.student.model.get_output_embeddings().parameters())
        return chunked_kl(states_BLD.flatten(0, 1), self.student.logits, head, target)


@dataclass(frozen=True)
class Loss:
    """One term of what is minimised; it stands in the log under its name in LOSSES.

    weight: in a step's settings, the same through the run; a loss of weight 0 is neither computed nor asked for.
    needs: what it reads: what the parent is asked, and what of the student trains, follow from it.
    formula: the batch -> the loss, a mean over tokens or sequences.
    label: of its curve in the report; None: no curve is drawn.
    models: the kinds of model that can learn from it.
    """

    weight: Callable[[Distill], float]
    needs: frozenset[Need]
    formula: Callable[[Seen], Tensor]
    label: str | None = None
    models: tuple[Literal["decoder", "encoder"], ...] = ("decoder", "encoder")


def hidden(seen: Seen) -> Tensor:
    """1 - cos of hidden states at layer ends, mean over tokens and ends (arXiv 2411.19146, section 5)."""
    theirs = seen.answers["hidden"]
    distances = [
        cosine_distance(seen.tokens(end), seen.tokens(theirs[:, place])) for place, end in enumerate(seen.ends)
    ]
    return torch.stack(distances).mean()


def pooled(seen: Seen) -> Tensor:
    """1 - cos of the means of each sequence's last hidden states, mean over sequences."""
    assert seen.real is not None
    theirs = mean_pooled(seen.targets.states(seen.answers["last"]), seen.real)
    return cosine_distance(mean_pooled(seen.states, seen.real), theirs)


def cross_entropy(seen: Seen) -> Tensor:
    """Cross-entropy of the text's own next token, nats a token."""
    return seen.divergence(seen.states[:, :-1], next_tokens(seen.ids))


def kl(seen: Seen) -> Tensor:
    """KL(parent || student) of the next token, nats a token: over all of the vocabulary, or over the parent's likeliest
    tokens and one cell for all others."""
    states_BLD = seen.states
    says = {name: values for name, values in seen.answers.items() if name != "hidden"}
    if seen.positions is not None:
        states_BLD = states_BLD[:, seen.positions]
        says = {name: values[:, seen.positions] for name, values in says.items()}
    return seen.divergence(states_BLD, distribution(says, seen.targets.logits))


def hardening(seen: Seen) -> Tensor:
    """Entropy of the decisions that the student's trees took, summed over nodes (arXiv 2308.14711, section 3)."""
    # Modeling files are for checkpoints: reached by path, as formats/models.py does.
    loss: Tensor = importlib.import_module("llmsurgeon.modeling.surgeon_fff").hardening_loss(seen.student)
    return loss


# Their sum is taken, and the log written, in this order.
LOSSES: dict[str, Loss] = {
    "hidden": Loss(lambda step: step.hidden, frozenset({"layer ends"}), hidden, "1 - cos of hidden states"),
    "pooled": Loss(
        lambda step: step.pooled,
        frozenset({"last states", "parent's last states"}),
        pooled,
        "1 - cos of pooled states",
        models=("encoder",),
    ),
    "cross_entropy": Loss(
        lambda step: step.cross_entropy, frozenset({"last states"}), cross_entropy, models=("decoder",)
    ),
    "kl": Loss(
        lambda step: step.kl,
        frozenset({"last states", "parent's distributions"}),
        kl,
        "KL to the parent, training text",
        models=("decoder",),
    ),
    "hardening": Loss(
        lambda step: step.trees.hardening if step.trees else 0.0,
        frozenset({"decisions"}),
        hardening,
        "Entropy of the trees' decisions",
    ),
}


def weights_of(settings: Distill, encoder: bool) -> dict[str, float]:
    """Name -> weight of the losses that count for a student of this kind."""
    kind: Literal["decoder", "encoder"] = "encoder" if encoder else "decoder"
    found = {name: loss.weight(settings) for name, loss in LOSSES.items() if kind in loss.models}
    return {name: weight for name, weight in found.items() if weight}


def needs_of(weights: Mapping[str, float]) -> frozenset[Need]:
    """What the losses with these weights read, together."""
    return frozenset(need for name in weights for need in LOSSES[name].needs)


def weighted(losses: dict[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses, and their weighted sum under `loss`."""
    return {**losses, "loss": torch.stack([weights[name] * value for name, value in losses.items()]).sum()}


def next_tokens(ids_BL: Tensor) -> Callable[[slice], Target]:
    """Rows of the flattened batch, the last column left out -> the tokens that follow there."""
    following = ids_BL[:, 1:].flatten()
    return lambda rows: NextTokens(following[rows])


def mean_pooled(states_BLD: Tensor, real_BL: Tensor) -> Tensor:
    """Mean over each sequence's tokens [B, D], in float32."""
    weights = real_BL[..., None].float()
    return (states_BLD.float() * weights).sum(1) / weights.sum(1)
