"""Is the result still good? The student beside its parent on held-out text, and the recipe's gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.bits_per_byte import Score
from llmsurgeon.evaluation.decoders import Evaluation, evaluate_hidden
from llmsurgeon.evaluation.encoders import EncoderEvaluation, evaluate_states, masking_of
from llmsurgeon.evaluation.perplexity import token_losses
from llmsurgeon.model.families import Family
from llmsurgeon.recipe.recipe import Gate
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENCODER_KEYS = ("min_hidden_cosine", "min_pooled_cosine")
MASKED_KEYS = ("max_kl", "min_top1_agreement")


def prove(
    student: LayerRunner,
    parent: LayerRunner,
    tokens: Tensor,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    batch: int,
) -> Evaluation | EncoderEvaluation:
    """What an evaluation of both models on `tokens` [S, T] would say, their layers read one at a time."""

    def left(runner: LayerRunner, inputs: Tensor) -> Tensor:
        return walk(runner, inputs, [Variant()], batch=batch)[0]

    def by_row(output: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[int], Tensor]:
        return lambda row: output(hidden[row][student.real(hidden[row])].to(student.device))

    mine, theirs = left(student, tokens), left(parent, tokens)
    if not student.family.encoder:
        return evaluate_hidden(tokens, by_row(student.final, mine), by_row(parent.final, theirs))
    masking = masking_of(tokenizer(), tokens, student.family)
    logits = None
    if masking:
        masked = left(student, masking.inputs), left(parent, masking.inputs)
        logits = by_row(student.final, masked[0]), by_row(parent.final, masked[1])
    return evaluate_states(tokens, (by_row(student.states, mine), by_row(parent.states, theirs)), masking, logits)


def prove_whole(student: PreTrainedModel, parent: LayerRunner, tokens: Tensor, batch: int) -> Evaluation:
    """The same of a student that is no stack of layers, in memory as a whole."""
    theirs = walk(parent, tokens, [Variant()], batch=batch)[0]

    def mine(row: int) -> Tensor:
        with torch.no_grad():
            logits: Tensor = student(input_ids=tokens[row, None].to(student.device), use_cache=False).logits
        return logits[0]

    return evaluate_hidden(tokens, mine, lambda row: parent.final(theirs[row].to(parent.device)))


def walked(runner: LayerRunner, batch: int) -> Score:
    """Log losses of a model whose layers are read one at a time."""

    def score(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        longest = max(map(len, sequences))
        # What follows a sequence changes nothing before it: models that predict the next token look back alone.
        tokens = torch.tensor([[*ids, *([0] * (longest - len(ids)))] for ids in sequences])
        hidden = walk(runner, tokens, [Variant()], batch=batch)[0]
        losses = []
        for row, ids in enumerate(sequences):
            logits = runner.final(hidden[row, : len(ids) - 1].to(runner.device))
            losses.append(token_losses(logits, tokens[row, 1 : len(ids)].to(logits.device)).cpu())
        return losses

    return score


def check_gate(gate: Gate | None, family: Family) -> None:
    """Raise SurgeryError for a key that this family's evaluation has no figure for."""
    given = [key for key, value in gate if value is not None] if gate else []
    cosines = " and ".join(ENCODER_KEYS)
    for key in given:
        if not family.encoder and key in ENCODER_KEYS:
            raise SurgeryError(
                f"gate.{key}: {family.model_type} is judged by what it says next; use max_perplexity_ratio, max_kl or "
                "min_top1_agreement"
            )
        if family.encoder and key in ("max_perplexity_ratio", "max_bits_per_byte_ratio"):
            masked = f"; {' and '.join(MASKED_KEYS)} are taken at masked tokens" if family.head else ""
            raise SurgeryError(f"gate.{key}: {family.model_type} predicts no next token; use {cosines}{masked}")
        if family.encoder and key in MASKED_KEYS and not family.head:
            raise SurgeryError(f"gate.{key}: {family.model_class} has no masked-LM head; use {cosines}")


def missed(gate: Gate | None, evaluation: Evaluation | EncoderEvaluation | None) -> list[str]:
    """What the evaluation falls short of, one line each."""
    if gate is None or evaluation is None:
        return []
    if isinstance(evaluation, EncoderEvaluation):
        where, ratio, bits = " at masked tokens", None, None
        kl, top1 = evaluation.masked_kl, evaluation.masked_top1_agreement
        hidden, pooled = evaluation.hidden_cosine, evaluation.pooled_cosine
    else:
        where, ratio, kl, top1 = "", evaluation.perplexity_ratio, evaluation.kl, evaluation.top1_agreement
        hidden = pooled = None
        bits = evaluation.bits_ratio
    lines = [
        ("perplexity ratio", ratio, gate.max_perplexity_ratio, "most", ""),
        ("bits per byte ratio", bits, gate.max_bits_per_byte_ratio, "most", ""),
        ("KL", kl, gate.max_kl, "most", f" nats a token{where}"),
        ("top-1 agreement", top1, gate.min_top1_agreement, "least", where),
        ("hidden cosine", hidden, gate.min_hidden_cosine, "least", ""),
        ("pooled cosine", pooled, gate.min_pooled_cosine, "least", ""),
    ]
    short = []
    for name, value, bound, kind, unit in lines:
        if bound is None:
            continue
        if value is None:
            short.append(f"{name}{unit} could not be measured, at {kind} {bound} wanted")
        elif not (value <= bound if kind == "most" else value >= bound):
            short.append(f"{name} {value:.3f}{unit}, at {kind} {bound} wanted")
    return short
