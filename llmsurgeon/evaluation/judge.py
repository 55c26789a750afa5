"""A student beside its parent on held-out text, layers read one at a time. S sequences of T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsurgeon.evaluation.bits_per_byte import Score
from llmsurgeon.evaluation.decoders import Evaluation, evaluate_hidden
from llmsurgeon.evaluation.encoders import EncoderEvaluation, evaluate_states, masking_of
from llmsurgeon.evaluation.perplexity import token_losses
from llmsurgeon.processes.share import Share
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def judge(
    student: LayerRunner,
    parent: LayerRunner | None,
    text: Sequences,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    batch: int,
) -> Evaluation | EncoderEvaluation:
    """What an evaluation of both models on `text` would say, their layers read one at a time.

    A decoder may be without a parent.
    """
    tokens, kinds, share = text.tokens, text.kinds, Share.of(len(text.tokens))

    def left(runner: LayerRunner, inputs: Tensor) -> Tensor:
        return walk(runner, share.mine(inputs), [Variant()], batch=batch)[0]

    def by_row(output: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[int], Tensor]:
        def of(row: int) -> Tensor:
            state = hidden[share.place(row)]
            return output(state[student.real(state)].to(student.device))

        return of

    mine = left(student, tokens)
    if parent is None:
        return evaluate_hidden(tokens, by_row(student.final, mine), kinds=kinds)
    theirs = left(parent, tokens)
    if not student.family.encoder:
        return evaluate_hidden(tokens, by_row(student.final, mine), by_row(parent.final, theirs), kinds=kinds)
    masking = masking_of(tokenizer(), tokens, student.family, vocab=student.vocab)
    logits = None
    if masking:
        masked = left(student, masking.inputs), left(parent, masking.inputs)
        logits = by_row(student.final, masked[0]), by_row(parent.final, masked[1])
    return evaluate_states(
        tokens, (by_row(student.states, mine), by_row(parent.states, theirs)), masking, logits, kinds
    )


def judge_whole(student: PreTrainedModel, parent: LayerRunner, text: Sequences, batch: int) -> Evaluation:
    """As `judge`, of a student that is no stack of layers: in memory as a whole."""
    tokens = text.tokens
    theirs = walk(parent, tokens, [Variant()], batch=batch)[0]

    def mine(row: int) -> Tensor:
        with torch.no_grad():
            logits: Tensor = student(input_ids=tokens[row, None].to(student.device), use_cache=False).logits
        return logits[0]

    return evaluate_hidden(tokens, mine, lambda row: parent.final(theirs[row].to(parent.device)), kinds=text.kinds)


def walked(runner: LayerRunner, batch: int) -> Score:
    """Log losses of a model whose layers are read one at a time."""

    def score(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        longest = max(map(len, sequences))
        # What follows a sequence changes nothing before it: models that predict the next token look back alone.
        tokens = torch.tensor([[*ids, *([0] * (longest - len(ids)))] for ids in sequences])
        share = Share.of(len(tokens))
        hidden = walk(runner, share.mine(tokens), [Variant()], batch=batch)[0]
        losses = []
        for row in share.rows:
            length = len(sequences[row])
            logits = runner.final(hidden[share.place(row), : length - 1].to(runner.device))
            losses.append(token_losses(logits, tokens[row, 1:length].to(logits.device)).cpu())
        return share.every_one(losses)

    return score
