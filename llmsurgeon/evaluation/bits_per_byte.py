"""Models with different tokenizers, compared on the same bytes.

Perplexity counts tokens, so between two tokenizers it means nothing. Bits per byte does not care how text is cut:

    -sum log2 p(token | tokens before it) / number of bytes that those tokens spell

Both models read the same passages, each through its own tokenizer, and are scored on the same bytes: from the first
place behind each one's first token where both cut. S passages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.perplexity import Interval, t_quantile, token_losses
from llmsurgeon.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Log losses [T - 1] of the tokens behind the first, for each sequence of ids.
Score = Callable[[Sequence[Sequence[int]]], Sequence[Tensor]]


@dataclass(frozen=True)
class BitsPerByte:
    """How well a model and its parent predict the same bytes. An `_interval` holds 95 % confidence bounds over
    passages, None where there is only one.

    `ratio` is the model's bits per byte over the parent's, from paired passages. `word_perplexity` is per word between
    white space. `more_tokens` is how many more tokens the model's tokenizer makes of the text, as a share (0.02: 2 %).
    """

    bits_per_byte: float
    bits_per_byte_interval: Interval | None
    parent_bits_per_byte: float
    parent_bits_per_byte_interval: Interval | None
    ratio: float
    ratio_interval: Interval | None
    word_perplexity: float
    parent_word_perplexity: float
    more_tokens: float
    bytes: int
    passages: int

    def to_dict(self) -> dict[str, Any]:
        """The fields under their own names, intervals as [low, high]."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def sentence(self) -> str:
        """The comparison in one line."""
        low_high = f" ({self.ratio_interval[0]:.3f} to {self.ratio_interval[1]:.3f})" if self.ratio_interval else ""
        return (
            f"bits per byte {self.parent_bits_per_byte:.4f} -> {self.bits_per_byte:.4f} "
            f"(ratio {self.ratio:.3f}{low_high}), {100 * self.more_tokens:+.1f} % tokens"
        )


@dataclass(frozen=True)
class Passage:
    """The text that is scored, all ids that each tokenizer makes of the passage, and where each has the text begin."""

    text: str
    mine: tuple[int, ...]
    theirs: tuple[int, ...]
    my_first: int
    their_first: int


def passage(
    text: str,
    mine: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    my_start: list[int],
    their_start: list[int],
) -> Passage | None:
    """The passage as both tokenizers cut it, behind the ids that each puts in front; None where they share no cut."""
    cuts = [cut(text, tokenizer) for tokenizer in (mine, theirs)]
    (my_ids, my_begins), (their_ids, their_begins) = cuts
    # With something in front of it even the first token is predicted.
    skipped = 0 if my_start and their_start else 1
    common = sorted(set(my_begins[skipped:]) & set(their_begins[skipped:]))
    if not common:
        return None
    at = common[0]
    return Passage(
        text[at:],
        (*my_start, *my_ids),
        (*their_start, *their_ids),
        len(my_start) + my_begins.index(at),
        len(their_start) + their_begins.index(at),
    )


def cut(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids, and the character at which each token begins; of tokens that share a character the first alone begins it."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins: list[int] = []
    last = -1
    for begin, end in made["offset_mapping"]:
        # A token that is only a part of a character, or a space put before the text, begins nothing new.
        begins.append(begin if begin > last and end > begin else -1)
        last = max(last, begin)
    return made["input_ids"], begins


def texts_of(windows_SL: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What windows of tokens say; they may begin or end inside a character, of which nothing is left."""
    return [
        tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip("\ufffd")
        for row in windows_SL.tolist()
    ]


def passages(
    texts: Sequence[str],
    mine: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    my_start: list[int],
    their_start: list[int],
    limit: int | None = None,
) -> list[Passage]:
    """The texts as both tokenizers cut them, shortened to at most `limit` tokens of either.

    Raises:
        SurgeryError: in no text there is a place where both cut.
    """
    found = []
    for text in texts:
        made = passage(text, mine, theirs, my_start, their_start)
        while made and limit and (longest := max(len(made.mine), len(made.theirs))) > limit:
            text = text[: min(len(text) - 1, len(text) * limit // longest)]
            made = passage(text, mine, theirs, my_start, their_start)
        if made:
            found.append(made)
    if not found:
        raise SurgeryError("no passage of the text is cut at a common place by both tokenizers; give other text")
    return found


def scored_by(model: PreTrainedModel) -> Score:
    """Log losses of a model that is in memory as a whole, a sequence at a time."""

    @torch.no_grad()
    def score(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        losses = []
        with Progress("bits per byte", sum(map(len, sequences)), "tokens") as progress:
            for ids in sequences:
                row = torch.tensor([ids], device=model.device)
                logits = model.eval()(input_ids=row, use_cache=False).logits[0]
                losses.append(token_losses(logits[:-1], row[0, 1:]).cpu())
                progress.advance(len(ids))
        return losses

    return score


def bits_per_byte(found: Sequence[Passage], my_score: Score, their_score: Score) -> BitsPerByte:
    """Score both models on the passages.

    Args:
        my_score: log losses [T - 1] in nats of each of the model's sequences; `their_score` likewise of the parent's.
    """
    return bits_of(found, my_score([each.mine for each in found]), their_score([each.theirs for each in found]))


def bits_of(found: Sequence[Passage], mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> BitsPerByte:
    """The comparison on the passages, from log losses [T - 1] in nats of each of the two models' sequences."""
    # Token t is predicted at place t - 1.
    my_nats = _sums([losses[each.my_first - 1 :] for each, losses in zip(found, mine, strict=True)])
    their_nats = _sums([losses[each.their_first - 1 :] for each, losses in zip(found, theirs, strict=True)])
    sizes = torch.tensor([len(each.text.encode()) for each in found], dtype=torch.float64)
    words = sum(len(each.text.split()) for each in found)
    tokens = sum(len(each.mine) - each.my_first for each in found)
    parents = sum(len(each.theirs) - each.their_first for each in found)
    bits, bits_interval = _ratio(my_nats / math.log(2), sizes)
    parent, parent_interval = _ratio(their_nats / math.log(2), sizes)
    ratio, ratio_interval = _ratio(my_nats, their_nats)
    return BitsPerByte(
        bits_per_byte=bits,
        bits_per_byte_interval=bits_interval,
        parent_bits_per_byte=parent,
        parent_bits_per_byte_interval=parent_interval,
        ratio=ratio,
        ratio_interval=ratio_interval,
        word_perplexity=_word_perplexity(my_nats, words),
        parent_word_perplexity=_word_perplexity(their_nats, words),
        more_tokens=tokens / parents - 1,
        bytes=int(sizes.sum()),
        passages=len(found),
    )


def _sums(losses: Sequence[Tensor]) -> Tensor:
    return torch.tensor([each.double().sum().item() for each in losses], dtype=torch.float64)


def _word_perplexity(nats_S: Tensor, words: int) -> float:
    return math.exp(min(nats_S.sum().item() / max(words, 1), 700.0))


def _ratio(above_S: Tensor, below_S: Tensor) -> tuple[float, Interval | None]:
    """sum(above) / sum(below), and its 95 % confidence interval over passages (linearised ratio estimator)."""
    ratio = (above_S.sum() / below_S.sum()).item()
    count = len(above_S)
    if count < 2:
        return ratio, None
    residuals = (above_S - ratio * below_S) / below_S.mean()
    half = t_quantile(count - 1) * residuals.std().item() / math.sqrt(count)
    return ratio, (ratio - half, ratio + half)
