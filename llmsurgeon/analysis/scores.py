"""The scores that a recipe's steps ask for, computed by the analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from llmsurgeon.analysis.channels import eliminate_channels
from llmsurgeon.analysis.experts import weigh_experts
from llmsurgeon.analysis.fff import route_ffns
from llmsurgeon.analysis.measure import ffn_dependency, measure
from llmsurgeon.analysis.search import SEARCH_TOKENS, few, order_of, search_attentions, search_blocks
from llmsurgeon.analysis.ternary import input_sizes, stored_bytes, ternary_costs
from llmsurgeon.model.parts import MoESpec
from llmsurgeon.operations import Step, Subject
from llmsurgeon.operations.fff import FFF
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.walk.runner import LayerRunner

MEASURE_TOKENS = 8192
TERNARY_TOKENS = 2048
BY_MEASURE = frozenset(
    f"{part}_{score}" for part in ("attention", "ffn", "block") for score in ("kl", "similarity")
) | {"block_influence", "angular_distance", "block_dependency", "ffn_channel"}


EXPERT_SCORES = frozenset({"expert_reap", "expert_loss"})


def compute_scores(
    needed: frozenset[str],
    runner: LayerRunner,
    tokens: Tensor,
    steps: Sequence[Step],
    subject: Callable[[Mapping[str, Any]], Subject],
    batch: int = 4,
) -> Mapping[str, Any]:
    """Score name -> values by layer, for the names in `needed`.

    Args:
        subject: the parent as a subject that knows the given scores.
        tokens: [S, T]; a few thousand of them are used.
    """
    scores: dict[str, Any] = {}
    # Before anything slow: shapes that do not fit are refused here.
    trees = [(step, step.wanted(subject({}))) for step in steps if isinstance(step, FFF)]
    prunes = [step for step in steps if isinstance(step, PruneAttention)]
    if needed & BY_MEASURE:
        scores.update(measure(runner, few(tokens, MEASURE_TOKENS), batch).for_recipes())
    if "attention_order" in needed:
        count = max(step.count or 0 for step in prunes)
        fused = [step.max_run for step in steps if isinstance(step, FuseFFN)]
        sample = few(tokens, SEARCH_TOKENS)
        choices = search_attentions(runner, sample, count, max(fused or [0]), fuse=bool(fused), batch=batch)
        scores["attention_order"] = order_of(choices)
    if "block_order" in needed:
        count = max(step.count or 0 for step in steps if isinstance(step, PruneBlocks) and step.score == "rescored")
        scores["block_order"] = order_of(search_blocks(runner, few(tokens, SEARCH_TOKENS), count, batch=batch))
    if "ffn_dependency" in needed:
        dropped = frozenset(layer for step in prunes for layer in step.resolve(subject(scores)).layers or ())
        scores["ffn_dependency"] = ffn_dependency(runner, few(tokens, SEARCH_TOKENS), dropped, batch)
    if "ffn_elimination" in needed:
        parent = subject({})
        widths = [step for step in steps if isinstance(step, PruneWidth) and "ffn_elimination" in step.needs()]
        layers = {layer for step in widths for i in step.affected(parent) for layer in parent.spec.layers[i].parents}
        orders = eliminate_channels(runner, few(tokens, MEASURE_TOKENS), layers, batch)
        scores["ffn_elimination"] = {layer: each.order for layer, each in orders.items()}
        scores["ffn_elimination_loss"] = {layer: each.loss for layer, each in orders.items()}
    if needed & EXPERT_SCORES:
        parent = subject({})
        layers = {b.parents[0] for b in parent.spec.layers if isinstance(b.ffn, MoESpec)}
        worths = weigh_experts(runner, few(tokens, MEASURE_TOKENS), layers, "expert_loss" in needed, batch)
        scores["expert_reap"] = {layer: worth.reap for layer, worth in worths.items()}
        if "expert_loss" in needed:
            scores["expert_loss"] = {layer: worth.loss for layer, worth in worths.items()}
    if "fff" in needed:
        scores["fff"] = {}
        for step, wanted in trees:
            scores["fff"] |= route_ffns(runner, tokens, wanted, step.assign, step.min_tokens, batch)
    if "ternary" in needed:
        scores["ternary"], scores["ternary_bytes"] = {}, stored_bytes(runner.weights)
        for budget in (step for step in steps if isinstance(step, Ternary) and "ternary" in step.needs()):
            linears, sample = budget.chosen(subject({})), few(tokens, TERNARY_TOKENS)
            for layer, found in ternary_costs(runner, sample, linears, budget.grid, batch).items():
                scores["ternary"].setdefault(layer, {}).update(found)
    if "ternary_inputs" in needed:
        parent = subject({})
        writers = {index: paths for s in steps if isinstance(s, Ternary) for index, paths in s.normed(parent).items()}
        scores["ternary_inputs"] = input_sizes(runner, few(tokens, TERNARY_TOKENS), writers, batch)
    return scores
