"""The scores that steps can ask for, by name, and how those that a recipe needs are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmsurgeon.analysis.attention_order import ATTENTION_ORDER
from llmsurgeon.analysis.block_order import BLOCK_ORDER
from llmsurgeon.analysis.channels import ELIMINATION
from llmsurgeon.analysis.experts import EXPERTS
from llmsurgeon.analysis.fff import ROUTINGS
from llmsurgeon.analysis.ffn_dependency import FFN_DEPENDENCY
from llmsurgeon.analysis.heads import HEADS
from llmsurgeon.analysis.measure import MEASURED
from llmsurgeon.analysis.score import Scene, Score, few
from llmsurgeon.analysis.ternary import TERNARY
from llmsurgeon.analysis.ternary_inputs import INPUTS
from llmsurgeon.operations import Step, Subject
from llmsurgeon.walk.runner import LayerRunner

# In the order in which they are measured: each may read those before it. Names of one score are measured together.
SCORES: dict[str, Score] = {
    "attention_kl": MEASURED,
    "attention_similarity": MEASURED,
    "ffn_kl": MEASURED,
    "ffn_similarity": MEASURED,
    "ffn_channel": MEASURED,
    "block_kl": MEASURED,
    "block_influence": MEASURED,
    "block_dependency": MEASURED,
    "angular_distance": MEASURED,
    "attention_order": ATTENTION_ORDER,
    "block_order": BLOCK_ORDER,
    "ffn_dependency": FFN_DEPENDENCY,
    "ffn_elimination": ELIMINATION,
    "ffn_elimination_loss": ELIMINATION,
    "group_elimination": HEADS,
    "group_elimination_loss": HEADS,
    "head_elimination": HEADS,
    "head_elimination_loss": HEADS,
    "expert_reap": EXPERTS,
    "expert_loss": EXPERTS,
    "fff": ROUTINGS,
    "ternary": TERNARY,
    "ternary_bytes": TERNARY,
    "ternary_inputs": INPUTS,
}


def compute_scores(
    steps: Sequence[Step], runner: LayerRunner, tokens: Tensor, parent: Subject, batch: int = 4
) -> Mapping[str, Any]:
    """Score name -> values by layer, for all that the steps need.

    Args:
        tokens: [S, T]; most scores use a few thousand of them.

    Raises:
        SurgeryError: a step does not fit the model, before anything is measured, or a score cannot be measured.
    """
    needed = {name for step in steps for name in step.needs()}
    requests = [request for step in steps for request in step.requests(parent)]
    scores: dict[str, Any] = {}
    for score in dict.fromkeys(SCORES.values()):
        names = {name for name, each in SCORES.items() if each is score}
        if needed & names:
            sample = tokens if score.tokens is None else few(tokens, score.tokens)
            scene = Scene(runner, sample, replace(parent, scores=scores), batch)
            scores.update(score.measure(scene, [request for request in requests if request.score in names]))
    return scores


def unpadded() -> frozenset[str]:
    """Names of the scores that leave out the padding of padded sentences."""
    return frozenset(name for name, score in SCORES.items() if score.sentences)
