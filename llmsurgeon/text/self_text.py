"""Calibration text that needs no data: sampled from the model itself.

S sequences, L tokens each, B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from llmsurgeon.boundary.foreign import check_token_ids, token_ids
from llmsurgeon.checkpoint.finite import first_not_finite, is_finite
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.progress import Progress
from llmsurgeon.text.openers import OPENERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE_BYTES = 2 * 2**30  # of the KV cache of one batch


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer in buffers of full length. Growing them by concatenation copies the whole
    cache at every token, which took as long as everything else together."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens [B, heads, T, head width]; returns those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [t.new_empty(*t.shape[:2], self.length, t.shape[3]) for t in (key_states, value_states)]
        end = self.filled + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.filled : end] = new
        self.filled = end
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


def _empty_cache(model: PreTrainedModel, length: int) -> DynamicCache | None:
    """The model's own kind of cache, full attention layers with room for `length` tokens."""
    if getattr(model.config, "block_transformer", None):
        return None  # it makes one of its own kind
    cache = DynamicCache(config=model.config)
    # Sliding windows and other kinds keep transformers' own layers.
    cache.layers = [RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass(frozen=True)
class Sampling:
    """How text is drawn: a sequence is the document start, an opener, and what the model makes of it.

    `plain`: every so many-th sequence has no opener (0: none). A token is drawn from softmax(logits / temperature)
    among the `top_k` likeliest that are at least `min_p` times as likely as the first of them.
    """

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 64
    plain: int = 0
    openers: tuple[str, ...] = OPENERS


@dataclass(frozen=True)
class SelfText:
    """Which text is wanted: about `tokens` tokens in sequences of `sequence_length`, `batch` of them at a time."""

    tokens: int
    sequence_length: int
    seed: int = 0
    batch: int = 128
    sampling: Sampling = Sampling()


def sample_self_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: SelfText) -> Tensor:
    """Text from the model, int64 [S, L]; the same call gives the same text.

    Special tokens are never drawn, so every sequence runs to its full length. Raises SurgeryError for NaN logits and
    for sequences longer than the model's positions.
    """
    length, limit = wanted.sequence_length, getattr(model.config, "max_position_embeddings", None)
    if limit and length > limit:
        raise SurgeryError(f"sequences of {length} tokens, the model's limit is {limit}; lower --seq-len")
    generator = torch.Generator(model.device).manual_seed(wanted.seed)
    count = max(1, wanted.tokens // length)
    forced_SL = _prompts(tokenizer, model.config.vocab_size, count, length, wanted.sampling, wanted.seed)
    banned = _never_drawn(tokenizer, model.config.vocab_size)
    batch = max(1, min(wanted.batch, CACHE_BYTES // (length * _cache_bytes_per_token(model))))
    with Progress("sample calibration text", count * length, "tokens") as progress:
        parts = [
            _continue(model, forced_BL, banned, wanted.sampling, generator, progress.advance)
            for forced_BL in forced_SL.split(batch)
        ]
    return torch.cat(parts)


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    forced_BL: Tensor,
    banned: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> Tensor:
    """Fill every -1 of `forced_BL` with a drawn token, left to right. Prompts of differing length need no padding."""
    model.eval()
    text_BL = forced_BL.to(model.device)
    banned = banned.to(model.device)
    cache = _empty_cache(model, text_BL.shape[1])
    for step in range(text_BL.shape[1] - 1):
        output, cache = cached_call(model, cache, input_ids=text_BL[:, step : step + 1])
        if not is_finite(output.logits):
            raise first_not_finite(model, model.dtype, input_ids=text_BL[:, : step + 1]) or SurgeryError(
                f"the model's logits hold NaN or infinity at token {step}: text cannot be sampled from it"
            )
        drawn_B = _draw(output.logits[:, -1].index_fill(1, banned, -torch.inf), sampling, generator)
        text_BL[:, step + 1] = torch.where(text_BL[:, step + 1] < 0, drawn_B, text_BL[:, step + 1])
        advance(len(text_BL))
    advance(len(text_BL))
    return text_BL.cpu()


def _draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token a row, by temperature, top-k and min-p (arXiv 2407.01082)."""
    likeliest_BK, ids_BK = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1]))
    likelihood = (likeliest_BK.float() / sampling.temperature).softmax(-1)
    if not torch.isfinite(likelihood).all():
        raise SurgeryError(
            "the model's logits hold NaN: text cannot be sampled from it; check it with `llmsurgeon verify`"
        )
    likelihood[likelihood < sampling.min_p * likelihood[:, :1]] = 0
    return ids_BK.gather(1, torch.multinomial(likelihood, 1, generator=generator))[:, 0]


def _prompts(
    tokenizer: PreTrainedTokenizerBase, vocab: int, count: int, length: int, sampling: Sampling, seed: int
) -> Tensor:
    """The given tokens of each sequence, -1 where one is to be drawn: int64 [count, length]."""
    forced = torch.full((count, length), -1)
    start = document_start(tokenizer)
    if start is None:
        forced[:, 0] = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed))
    else:
        forced[:, 0] = start
    openers = [token_ids(tokenizer, text, add_special_tokens=False) for text in sampling.openers]
    opened = [row for row in range(count) if openers and (not sampling.plain or row % sampling.plain)]
    for number, row in enumerate(opened):
        ids = openers[number % len(openers)][: length - 1]
        forced[row, 1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.long)
    check_token_ids(0, int(forced.max()), vocab, str(tokenizer.name_or_path))
    return forced


def document_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that texts began with in pretraining, as far as a tokenizer tells; None where it has no such token."""
    # Where a tokenizer knows <|endoftext|>, it parts the documents, even if chat tokens took over the bos role.
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    for token in (separator, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return None


def _never_drawn(tokenizer: PreTrainedTokenizerBase, vocab: int) -> Tensor:
    """Ids of special tokens, and of rows that pad the head beyond the tokenizer's vocabulary."""
    known = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    banned = [index for index in range(vocab) if index not in known]
    return torch.tensor(banned if len(banned) < vocab else [], dtype=torch.long)


@torch.no_grad()
def _cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Measured on one token, so that any architecture's cache counts."""
    _, cache = cached_call(model, input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    held = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return max(1, sum(t.numel() * t.element_size() for t in held if t is not None))
