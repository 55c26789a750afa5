"""One pass over the text through a model and its parent: perplexity, KL and top-1 agreement with intervals.

S sequences, L tokens each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import check_token_ids
from llmsurgeon.checkpoint.finite import first_not_finite, is_finite
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.agreement import kl_divergence, top1_agreement
from llmsurgeon.evaluation.bits_per_byte import BitsPerByte
from llmsurgeon.evaluation.encoders import name_of
from llmsurgeon.evaluation.kinds import by_kind
from llmsurgeon.evaluation.perplexity import (
    CHUNK,
    Interval,
    mean_interval,
    perplexity,
    perplexity_interval,
    token_losses,
)
from llmsurgeon.processes.share import Share
from llmsurgeon.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_BYTES = 128 * 2**20  # of one batch's logits; a batch has at least one sequence


@dataclass(frozen=True)
class Evaluation:
    """What was measured. An `_interval` holds the 95 % confidence bounds; None where there is no parent
    (or, for intervals, only one sequence).

    Of a model whose vocabulary was trimmed these hold for its own tokens, which the parent reads, too, and predicts
    among those that stayed; `outside_mass` is the share of the parent's probability that lies on the others. `bits`
    compares the two on text, each with its own tokenizer.

    `tokens` counts predicted tokens (all but the first of each sequence); `kl` is KL(parent || model) in nats per
    token; `top1_agreement` a share from 0 to 1; `perplexity_ratio` is perplexity / parent_perplexity, its interval
    from the paired differences of log loss, which is much narrower than the two perplexities' own. `kinds` has the
    figures of each kind of text, where there are several.
    """

    perplexity: float
    perplexity_interval: Interval | None
    tokens: int
    sequences: int
    sequence_length: int
    parent_perplexity: float | None = None
    parent_perplexity_interval: Interval | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: Interval | None = None
    kl: float | None = None
    kl_interval: Interval | None = None
    top1_agreement: float | None = None
    top1_agreement_interval: Interval | None = None
    outside_mass: float | None = None
    bits: BitsPerByte | None = None
    kinds: Mapping[str, Evaluation] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields under their own names, intervals as [low, high]; the last three if they were measured."""
        made = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        extra = {"outside_mass": made.pop("outside_mass"), "bits": self.bits and self.bits.to_dict()}
        extra["kinds"] = {name: figures.to_dict() for name, figures in self.kinds.items()} or None
        del made["bits"], made["kinds"]
        return made | {name: value for name, value in extra.items() if value is not None}

    # Where its figures are taken; nothing to say of tokens of a text.
    where: ClassVar[str] = ""

    def figures(self) -> dict[str, float | None]:
        """Figures by the key of a recipe's gate that holds them to a bound."""
        return {
            "max_perplexity_ratio": self.perplexity_ratio,
            "max_bits_per_byte_ratio": self.bits_ratio,
            "max_kl": self.kl,
            "min_top1_agreement": self.top1_agreement,
        }

    @property
    def bits_ratio(self) -> float | None:
        """Bits per byte over the parent's; with one tokenizer the ratio of the log losses is just that."""
        if self.bits:
            return self.bits.ratio
        if not self.parent_perplexity or self.parent_perplexity == 1:
            return None
        return math.log(self.perplexity) / math.log(self.parent_perplexity)

    def sentence(self) -> str:
        """The comparison with the parent in one line."""
        if self.bits:
            return f"{self.bits.sentence()}; on the model's own tokens {self._sentence()}"
        return self._sentence()

    def _sentence(self) -> str:
        return (
            f"perplexity {self.parent_perplexity:.2f} -> {self.perplexity:.2f} (ratio {self.perplexity_ratio:.3f}), "
            f"KL {self.kl:.3f}, top-1 agreement {100 * (self.top1_agreement or 0):.1f} %"
        )


def evaluate_decoder(
    model: PreTrainedModel,
    tokens: Tensor,
    parent: PreTrainedModel | None = None,
    *,
    chunk: int = CHUNK,
    kinds: Sequence[str] = (),
) -> Evaluation:
    """Measure `model`, and against `parent` where given, on `tokens` (int64 [S, L], each row a text of its own).

    Logits exist for one batch at a time and are widened to float32 `chunk` rows at a time. Intervals are over
    sequences (see `mean_interval`). Both models are put in eval mode. `kinds` [S] says what kind of text each row is.
    Raises SurgeryError for tokens that do not fit the models, for differing vocabularies and for NaN logits.
    """
    _check(model, tokens)
    if parent is not None:
        check_same_vocabulary(model, parent)
        _check(parent, tokens)
    share = Share.of(len(tokens))
    pairs = _forward(model, parent, share.mine(tokens))
    return _by_kind(_sequence_means(tokens, share, pairs, chunk), tokens, kinds)


def evaluate_hidden(
    tokens: Tensor,
    model_logits: Callable[[int], Tensor],
    parent_logits: Callable[[int], Tensor] | None = None,
    *,
    chunk: int = CHUNK,
    kinds: Sequence[str] = (),
    share: Share | None = None,
) -> Evaluation:
    """As `evaluate_decoder`, from logits [L, V] of a sequence at a time: `model_logits(row)` for each row of `tokens`.

    For models whose hidden states are at hand, as after a layer-by-layer walk, but that are never in memory as a whole.
    share: of several processes this one's rows, by default an equal part.
    """
    share = share or Share.of(len(tokens))
    pairs = ((model_logits(row), parent_logits(row) if parent_logits else None) for row in share.rows)
    return _by_kind(_sequence_means(tokens, share, pairs, chunk), tokens, kinds)


def _forward(
    model: PreTrainedModel, parent: PreTrainedModel | None, tokens_SL: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits [L, V] of both models for each sequence, computed a batch at a time."""
    bytes_a_sequence = tokens_SL.shape[1] * model.config.vocab_size * model.dtype.itemsize
    for ids_BL in tokens_SL.split(max(1, LOGIT_BYTES // bytes_a_sequence)):
        logits = logits_of(model, ids_BL)
        yield from zip(logits, [None] * len(ids_BL) if parent is None else logits_of(parent, ids_BL), strict=True)


def logits_of(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """Logits [B, L, V].

    Raises:
        SurgeryError: they are not finite; what first was not is named.
    """
    inputs = {"input_ids": ids_BL.to(model.device), "use_cache": False}
    logits: Tensor = model.eval()(**inputs).logits
    if not is_finite(logits) and (error := first_not_finite(model, model.dtype, **inputs)):
        raise error
    return logits


@torch.no_grad()
def _sequence_means(
    tokens_SL: Tensor, share: Share, pairs: Iterable[tuple[Tensor, Tensor | None]], chunk: int
) -> dict[str, Tensor]:
    """Mean over each sequence of loss, and with a parent of parent_loss, kl and top1: float64 [S] each.

    pairs: logits of the sequences in the share.
    """
    means: dict[str, list[float]] = {}

    def note(name: str, values_T: Tensor, sequence: int) -> None:
        mean = values_T.double().mean().item()
        if not math.isfinite(mean):
            raise SurgeryError(
                f"{name} is {mean} on sequence {sequence}: the logits hold NaN or infinities; check the weights with "
                "`llmsurgeon verify`, or evaluate in another dtype (--dtype float32)"
            )
        means.setdefault(name, []).append(mean)

    with Progress("evaluate", share.mine(tokens_SL).numel(), "tokens") as progress:
        for row, (logits, parent_logits) in zip(share.rows, pairs, strict=True):
            ids = tokens_SL[row]
            # The last position predicts a token that is not in the text.
            scores, targets = logits[:-1], ids[1:].to(logits.device)
            note("loss", token_losses(scores, targets, chunk), row)
            if parent_logits is not None:
                parent_scores = parent_logits[:-1].to(scores.device)
                note("parent_loss", token_losses(parent_scores, targets, chunk), row)
                note("kl", kl_divergence(parent_scores, scores, chunk), row)
                note("top1", top1_agreement(parent_scores, scores), row)
            progress.advance(len(ids))
    return {name: share.every(torch.tensor(values, dtype=torch.float64)) for name, values in means.items()}


def _by_kind(means: dict[str, Tensor], tokens: Tensor, kinds: Sequence[str]) -> Evaluation:
    """The figures of all sequences, and of those of each kind."""
    of = by_kind(kinds, lambda mask: _summary({name: values[mask] for name, values in means.items()}, tokens[mask]))
    return replace(_summary(means, tokens), kinds=of)


def _summary(means: dict[str, Tensor], tokens: Tensor) -> Evaluation:
    return Evaluation(
        perplexity=perplexity(means["loss"].mean().item()),
        perplexity_interval=perplexity_interval(means["loss"]),
        **(_against_parent(means) if "parent_loss" in means else {}),
        tokens=tokens.shape[0] * (tokens.shape[1] - 1),
        sequences=tokens.shape[0],
        sequence_length=tokens.shape[1],
    )


def _against_parent(means: dict[str, Tensor]) -> dict[str, Any]:
    change_S = means["loss"] - means["parent_loss"]
    agreement, divergence = mean_interval(means["top1"]), mean_interval(means["kl"])
    return dict(
        parent_perplexity=perplexity(means["parent_loss"].mean().item()),
        parent_perplexity_interval=perplexity_interval(means["parent_loss"]),
        perplexity_ratio=perplexity(change_S.mean().item()),
        perplexity_ratio_interval=perplexity_interval(change_S),
        kl=means["kl"].mean().item(),
        kl_interval=divergence and (max(divergence[0], 0.0), divergence[1]),
        top1_agreement=means["top1"].mean().item(),
        top1_agreement_interval=agreement and (max(agreement[0], 0.0), min(agreement[1], 1.0)),
    )


def _check(model: PreTrainedModel, tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise SurgeryError(f"tokens of shape {list(tokens.shape)}: expected [sequences, length], at least 1 by 2")
    name = name_of(model)
    check_token_ids(int(tokens.min()), int(tokens.max()), model.config.vocab_size, name)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokens.shape[1] > limit:
        raise SurgeryError(f"{name}: sequences of {tokens.shape[1]} tokens, its limit is {limit}; lower --seq-len")


def check_same_vocabulary(model: PreTrainedModel, parent: PreTrainedModel) -> None:
    """Raise SurgeryError unless both models predict the same number of tokens."""
    size, parent_size = (m.config.vocab_size for m in (model, parent))
    if size != parent_size:
        raise SurgeryError(
            f"the model has a vocabulary of {size} tokens and its parent one of {parent_size}: "
            "KL and top-1 agreement need the same tokenizer; compare with the model it was cut from"
        )


def check_same_tokens(mine: Mapping[str, int], theirs: Mapping[str, int], model: str, against: str) -> None:
    """Raise SurgeryError where two tokenizers (token -> id) have as many tokens, but others."""
    alike = sum(mine.get(token) == number for token, number in theirs.items())
    # A file converted from another format may name a few special tokens otherwise.
    if alike < 0.9 * len(theirs):
        raise SurgeryError(
            f"{model}: {alike:,} of the {len(theirs):,} tokens of {against} have the same number in its tokenizer: "
            "KL and top-1 agreement need the same tokenizer; compare with the model it was cut from"
        )
