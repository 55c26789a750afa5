"""How well an encoder agrees with its parent: hidden states, pooled states and, with a masked-LM head, masked tokens.

S sequences, L tokens each, D model width, V vocabulary, M masked tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from llmsurgeon.boundary.foreign import check_token_ids
from llmsurgeon.checkpoint.finite import first_not_finite, is_finite
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.agreement import kl_divergence, top1_agreement
from llmsurgeon.evaluation.kinds import by_kind
from llmsurgeon.evaluation.perplexity import Interval, mean_interval, perplexity, perplexity_interval, token_losses
from llmsurgeon.model.families import ENCODERS, Family
from llmsurgeon.processes.share import Share
from llmsurgeon.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Share of the tokens that are masked, as in BERT's training (arXiv 1810.04805, section 3.1).
MASKED_SHARE = 0.15

# One sequence's last hidden states [L, D], or logits [L, V], by its number.
ByRow = Callable[[int], Tensor]


@dataclass(frozen=True)
class EncoderEvaluation:
    """What was measured. An `_interval` holds the 95 % confidence bounds over sequences.

    hidden_cosine: mean over tokens of cos(parent's last hidden state, the model's).
    pooled_cosine: cos of the means over each sequence's tokens, which sentence embeddings are mostly made of.
    masked_*: at the `masked_tokens` positions that were masked, None without a masked-LM head: KL(parent || model) in
        nats, share of equal most likely tokens, exp of the mean log loss (a perplexity of masked tokens, not of text).
    kinds: the figures of each kind of text, where there are several.
    """

    tokens: int
    sequences: int
    sequence_length: int
    hidden_cosine: float | None = None
    hidden_cosine_interval: Interval | None = None
    pooled_cosine: float | None = None
    pooled_cosine_interval: Interval | None = None
    masked_tokens: int | None = None
    masked_perplexity: float | None = None
    masked_perplexity_interval: Interval | None = None
    parent_masked_perplexity: float | None = None
    parent_masked_perplexity_interval: Interval | None = None
    masked_perplexity_ratio: float | None = None
    masked_perplexity_ratio_interval: Interval | None = None
    masked_kl: float | None = None
    masked_kl_interval: Interval | None = None
    masked_top1_agreement: float | None = None
    masked_top1_agreement_interval: Interval | None = None
    kinds: Mapping[str, EncoderEvaluation] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields under their own names, intervals as [low, high]; `kinds` if there are several."""
        made = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        del made["kinds"]
        of = {name: figures.to_dict() for name, figures in self.kinds.items()}
        return made | ({"kinds": of} if of else {})

    # Where KL and agreement are taken.
    where: ClassVar[str] = " at masked tokens"

    def figures(self) -> dict[str, float | None]:
        """Figures by the key of a recipe's gate that holds them to a bound."""
        return {
            "max_kl": self.masked_kl,
            "min_top1_agreement": self.masked_top1_agreement,
            "min_hidden_cosine": self.hidden_cosine,
            "min_pooled_cosine": self.pooled_cosine,
        }

    def sentence(self) -> str:
        """The figures in one line."""
        line = f"cosine to the parent {self.hidden_cosine:.4f} a token, {self.pooled_cosine:.4f} pooled"
        if self.masked_kl is not None:
            same = 100 * (self.masked_top1_agreement or 0)
            line += f"; masked tokens: KL {self.masked_kl:.3f}, top-1 agreement {same:.1f} %"
        return line


@dataclass(frozen=True)
class Masking:
    """Which tokens of [S, L] are masked: `inputs` has the mask token there, `masked` is True there."""

    inputs: Tensor
    masked: Tensor


def mask_tokens(tokens: Tensor, mask_id: int, special: Collection[int], seed: int = 0) -> Masking:
    """Mask 15 % of each sequence's ordinary tokens, at least one; the same arguments give the same choice.

    Raises:
        SurgeryError: a sequence holds special tokens only.
    """
    ordinary = ~torch.isin(tokens, torch.tensor(sorted(special), dtype=tokens.dtype))
    if not ordinary.any(1).all():
        raise SurgeryError("a sequence holds special tokens only: nothing in it can be masked; raise --seq-len")
    draw = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~ordinary, 2.0)
    count = (ordinary.sum(1) * MASKED_SHARE).round().clamp_min(1).long()
    rank = draw.argsort(1).argsort(1)
    masked = rank < count[:, None]
    return Masking(tokens.masked_fill(masked, mask_id), masked)


def masking_of(
    tokenizer: PreTrainedTokenizerBase, tokens: Tensor, *models: PreTrainedModel | Family | None, vocab: int
) -> Masking | None:
    """The masking to evaluate with; None where a model has no masked-LM head or the tokenizer no mask token.

    vocab: rows of the models' embeddings.

    Raises:
        SurgeryError: the mask token has no row there.
    """
    families = [each if isinstance(each, Family) else encoder_family(each) for each in models if each is not None]
    if tokenizer.mask_token_id is None or not all(family and family.head for family in families):
        return None
    mask, name = tokenizer.mask_token_id, getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    check_token_ids(mask, mask, vocab, f"{name}: its mask token {tokenizer.mask_token!r}")
    return mask_tokens(tokens, tokenizer.mask_token_id, tokenizer.all_special_ids)


def encoder_family(model: PreTrainedModel) -> Family | None:
    """The family of an encoder as its own class has it, None for a decoder."""
    name = type(model).__name__.removeprefix("Surgeon")
    return next((family.with_head([name]) for family in ENCODERS if name in dict(family.heads)), None)


def name_of(model: PreTrainedModel) -> str:
    """What the user calls the model: the folder, file or hub id that it was loaded from; its class where it was not."""
    return str(getattr(model, "name_or_path", "") or model.config.name_or_path or type(model).__name__)


def positions_of(model: PreTrainedModel) -> int | None:
    """How long a sequence the model takes, None where it sets no limit."""
    if family := encoder_family(model):
        return family.describe(model.config.to_dict()).max_positions
    return getattr(model.config, "max_position_embeddings", None)


def evaluate_encoder(
    model: PreTrainedModel,
    tokens: Tensor,
    parent: PreTrainedModel | None = None,
    masking: Masking | None = None,
    kinds: Sequence[str] = (),
) -> EncoderEvaluation:
    """Measure `model` on `tokens` (int64 [S, L]): against `parent` where given, at masked tokens with a `masking`.

    kinds: what kind of text each sequence is.

    Raises:
        SurgeryError: neither parent nor masking, tokens or models that do not fit, states that are not finite.
    """
    if parent is None and masking is None:
        raise SurgeryError(
            "an encoder without a masked-LM head is measured by its agreement with a parent: give --against PARENT"
        )
    for each in (model, parent):
        if each is not None:
            _check(each, tokens)
    if parent is not None and parent.config.hidden_size != model.config.hidden_size:
        raise SurgeryError(
            f"hidden states of {model.config.hidden_size} and {parent.config.hidden_size} numbers cannot be compared; "
            "compare with the model it was cut from"
        )

    def states(of: PreTrainedModel) -> ByRow:
        body = of.eval().base_model
        return lambda row: _finite(body, tokens[row, None], lambda ids: body(input_ids=ids).last_hidden_state)[0]

    def logits(of: PreTrainedModel, masking: Masking) -> ByRow:
        return lambda row: _finite(of, masking.inputs[row, None], lambda ids: _logits(of.eval()(input_ids=ids)))[0]

    return evaluate_states(
        tokens,
        (states(model), states(parent)) if parent is not None else None,
        masking,
        (logits(model, masking), logits(parent, masking) if parent is not None else None) if masking else None,
        kinds,
    )


@torch.no_grad()
def evaluate_states(
    tokens: Tensor,
    states: tuple[ByRow, ByRow] | None,
    masking: Masking | None = None,
    logits: tuple[ByRow, ByRow | None] | None = None,
    kinds: Sequence[str] = (),
    share: Share | None = None,
) -> EncoderEvaluation:
    """As `evaluate_encoder`, from the model's and the parent's `states` on `tokens` and their `logits` on masked ones.

    For models whose hidden states are at hand, as after a layer-by-layer walk, but that are never in memory as a whole.
    share: of several processes this one's rows, by default an equal part.
    """
    means: dict[str, list[float]] = {}

    def note(name: str, values: Tensor, row: int) -> None:
        mean = values.double().mean().item()
        if not math.isfinite(mean):
            raise SurgeryError(
                f"{name} is {mean} on sequence {row}: the hidden states hold NaN or infinities; check the weights with "
                "`llmsurgeon verify`, or evaluate in another dtype (--dtype float32)"
            )
        means.setdefault(name, []).append(mean)

    share = share or Share.of(len(tokens))
    with Progress("evaluate", share.mine(tokens).numel(), "tokens") as progress:
        for row in share.rows:
            if states:
                mine, theirs = (of(row).float() for of in states)
                note("hidden_cosine", F.cosine_similarity(mine, theirs.to(mine.device), dim=-1), row)
                pooled = F.cosine_similarity(mine.mean(0), theirs.mean(0).to(mine.device), dim=-1)
                note("pooled_cosine", pooled, row)
            if masking and logits:
                _note_masked(note, tokens[row], row, masking, logits)
            progress.advance(tokens.shape[1])
    found = {name: share.every(torch.tensor(values, dtype=torch.float64)) for name, values in means.items()}

    def of(mask: Tensor) -> EncoderEvaluation:
        chosen = {name: values[mask] for name, values in found.items()}
        return _summary(chosen, tokens[mask], masking and Masking(masking.inputs[mask], masking.masked[mask]))

    return replace(_summary(found, tokens, masking), kinds=by_kind(kinds, of))


def _note_masked(
    note: Callable[[str, Tensor, int], None],
    ids: Tensor,
    row: int,
    masking: Masking,
    logits: tuple[ByRow, ByRow | None],
) -> None:
    """Loss, KL and agreement at the masked tokens of one sequence."""
    chosen = masking.masked[row].nonzero().flatten()
    mine = logits[0](row)[chosen]
    targets = ids[chosen].to(mine.device)
    note("loss", token_losses(mine, targets), row)
    if logits[1] is not None:
        theirs = logits[1](row)[chosen].to(mine.device)
        note("parent_loss", token_losses(theirs, targets), row)
        note("kl", kl_divergence(theirs, mine), row)
        note("top1", top1_agreement(theirs, mine), row)


def _summary(means: dict[str, Tensor], tokens: Tensor, masking: Masking | None) -> EncoderEvaluation:
    figures: dict[str, Any] = {}
    for name in ("hidden_cosine", "pooled_cosine"):
        if name in means:
            figures[name] = means[name].mean().item()
            figures[f"{name}_interval"] = _within(mean_interval(means[name]), -1.0, 1.0)
    if masking is not None:
        figures["masked_tokens"] = int(masking.masked.sum())
        losses = {"masked_perplexity": means["loss"]}
        if "parent_loss" in means:
            losses["parent_masked_perplexity"] = means["parent_loss"]
            losses["masked_perplexity_ratio"] = means["loss"] - means["parent_loss"]
            figures["masked_kl"], figures["masked_kl_interval"] = means["kl"].mean().item(), mean_interval(means["kl"])
            figures["masked_top1_agreement"] = means["top1"].mean().item()
            figures["masked_top1_agreement_interval"] = _within(mean_interval(means["top1"]), 0.0, 1.0)
        for name, values in losses.items():
            figures[name] = perplexity(values.mean().item())
            figures[f"{name}_interval"] = perplexity_interval(values)
    return EncoderEvaluation(tokens.numel(), tokens.shape[0], tokens.shape[1], **figures)


def _within(interval: Interval | None, low: float, high: float) -> Interval | None:
    return interval and (max(interval[0], low), min(interval[1], high))


def _finite(model: Any, ids: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What the model or its body makes of `ids`, which must be finite."""
    ids = ids.to(model.device)
    made = compute(ids)
    if not is_finite(made) and (error := first_not_finite(model, model.dtype, input_ids=ids)):
        raise error
    return made


def _logits(output: Any) -> Tensor:
    logits: Tensor = output["logits" if "logits" in output else "prediction_logits"]
    return logits


def _check(model: PreTrainedModel, tokens: Tensor) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise SurgeryError(f"tokens of shape {list(tokens.shape)}: expected [sequences, length], at least 1 by 1")
    family = encoder_family(model)
    name = name_of(model)
    if family is None:
        raise SurgeryError(f"{name} is a decoder; an encoder can be compared with an encoder only")
    spec = family.describe(model.config.to_dict())
    check_token_ids(int(tokens.min()), int(tokens.max()), spec.vocab, name)
    if spec.max_positions and tokens.shape[1] > spec.max_positions:
        raise SurgeryError(
            f"{name}: sequences of {tokens.shape[1]} tokens, its limit is {spec.max_positions}; lower --seq-len"
        )
