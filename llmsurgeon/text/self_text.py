"""Calibration text that needs no data: sampled from the model itself.

S sequences, L tokens each, B batch, V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from llmsurgeon.boundary.foreign import check_token_ids
from llmsurgeon.checkpoint.finite import first_not_finite, is_finite
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.progress import Progress
from llmsurgeon.text.conversation import Template, Turns, special_ids, template_of
from llmsurgeon.text.kinds import KINDS
from llmsurgeon.text.sequences import Sequences, spread
from llmsurgeon.text.shares import Part, shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 128  # sequences that are sampled together
CACHE_BYTES = 2 * 2**30  # of the KV cache of one batch
# A card draws a token of many sequences in the time that one takes: this many times the batch, and of its memory the
# share that their KV cache and logits may take. An H100 waits for the CPU with 1,024 sequences of a small model.
CARD_BATCH, CARD_SHARE = 32, 1 / 3
# Logits, what is allowed of them, and the likeliest are there at once.
LOGITS = 4


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
    """How text is drawn: a token from softmax(logits / temperature) among the `top_k` likeliest that are at least
    `min_p` times as likely as the first of them."""

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 64


@dataclass(frozen=True)
class SelfText:
    """Which text is wanted: about `tokens` tokens of `kinds` in sequences of `sequence_length`, `batch` at a time."""

    tokens: int
    sequence_length: int
    seed: int = 0
    batch: int = BATCH
    sampling: Sampling = Sampling()
    kinds: tuple[str, ...] = tuple(KINDS)


def sample_self_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: SelfText) -> Sequences:
    """Text from the model [S, L], kinds by the shares that `shares` gives them; the same call gives the same text.

    A sequence is the document start, an opener of its kind, and what the model makes of it; a conversation is the chat
    template with all turns drawn. No other special tokens are drawn, so every sequence runs to its full length.

    Raises:
        SurgeryError: NaN logits, sequences longer than the model's positions, no kind that can be sampled.
    """
    length, limit = wanted.sequence_length, getattr(model.config, "max_position_embeddings", None)
    if limit and length > limit:
        raise SurgeryError(f"sequences of {length} tokens, the model's limit is {limit}; lower --seq-len")
    start, template = document_start(tokenizer, model.config.vocab_size), template_of(tokenizer)
    if template and (len(template.start) >= length or max(template.ids) >= model.config.vocab_size):
        template = None
    each = shares(model, tokenizer, wanted.kinds, length, start, template is not None)
    parts = spread(each, max(1, wanted.tokens // length))
    texts = _prompts(tokenizer, model.config.vocab_size, parts, template, wanted)
    rows = _cache_rows(model, wanted)
    draw = Draw(wanted.sampling, _never_drawn(tokenizer, model.config.vocab_size), wanted.seed, model.device)
    with Progress("sample calibration text", texts.numel(), "tokens") as progress:
        for place in range(0, len(parts), rows):
            spoken = [KINDS[part.kind].chat for part in parts[place : place + rows]]
            turns = Turns(template, spoken, length) if template and any(spoken) else None
            texts[place : place + rows] = _continue(model, texts[place : place + rows], draw, turns, progress.advance)
    return Sequences(texts, tuple(part.kind for part in parts))


@dataclass
class Draw:
    """How the next token of each row is drawn: never one that is `banned`, with a generator of its own."""

    sampling: Sampling
    banned: Tensor
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.banned = self.banned.to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def __call__(self, logits_BV: Tensor, ends_B: Tensor | None) -> Tensor:
        """One token a row; `ends_B` may be drawn although it is banned, where it is not -1."""
        allowed_BV = logits_BV.index_fill(1, self.banned, -torch.inf)
        if ends_B is not None:
            rows = torch.nonzero(ends_B >= 0).flatten().to(self.device)
            ends = ends_B.to(self.device)[rows]
            allowed_BV[rows, ends] = logits_BV[rows, ends]
        return _draw(allowed_BV, self.sampling, self.generator)


@torch.no_grad()
def _continue(
    model: PreTrainedModel, forced_BL: Tensor, draw: Draw, turns: Turns | None, advance: Callable[[int], None]
) -> Tensor:
    """Fill every -1 of `forced_BL` with a drawn token, left to right. Prompts of differing length need no padding."""
    model.eval()
    text_BL = forced_BL.to(model.device)
    cache = _empty_cache(model, text_BL.shape[1])
    for step in range(text_BL.shape[1] - 1):
        output, cache = cached_call(model, cache, input_ids=text_BL[:, step : step + 1])
        if not is_finite(output.logits):
            raise first_not_finite(model, model.dtype, input_ids=text_BL[:, : step + 1]) or SurgeryError(
                f"the model's logits hold NaN or infinity at token {step}: text cannot be sampled from it"
            )
        drawn_B = draw(output.logits[:, -1], turns.ends(step + 1) if turns else None)
        text_BL[:, step + 1] = torch.where(text_BL[:, step + 1] < 0, drawn_B, text_BL[:, step + 1])
        if turns:
            turns.heard(text_BL, step + 1)
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
    tokenizer: PreTrainedTokenizerBase, vocab: int, parts: Sequence[Part], template: Template | None, wanted: SelfText
) -> Tensor:
    """The given tokens of each sequence, -1 where one is to be drawn: int64 [S, L]."""
    count, length = len(parts), wanted.sequence_length
    forced = torch.full((count, length), -1)
    start = document_start(tokenizer, vocab)
    if start is None:
        forced[:, 0] = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(wanted.seed))
    else:
        forced[:, 0] = start
    used = Counter[Part]()
    for row, part in enumerate(parts):
        if KINDS[part.kind].chat:
            assert template is not None
            forced[row, : len(template.start)] = torch.tensor(template.start)
            continue
        # Another seed begins with other openers.
        order = random.Random(f"{wanted.seed} {part.kind} {part.variant}").sample(part.openers, len(part.openers))
        ids = order[used[part] % len(order)][: length - 1]
        forced[row, 1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.long)
        used[part] += 1
    check_token_ids(0, int(forced.max()), vocab, str(tokenizer.name_or_path))
    return forced


def document_start(tokenizer: PreTrainedTokenizerBase, vocab: int | None = None) -> int | None:
    """The token that texts began with in pretraining, as far as a tokenizer tells; None where it has no such token.

    vocab: tokens of the model; those beyond were added to the tokenizer alone, and are passed over.
    """
    # Where a tokenizer knows <|endoftext|>, it parts the documents, even if chat tokens took over the bos role.
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    for token in (separator, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None and (vocab is None or token < vocab):
            return token
    return None


def _never_drawn(tokenizer: PreTrainedTokenizerBase, vocab: int) -> Tensor:
    """Ids of special tokens, and of rows that pad the head beyond the tokenizer's vocabulary."""
    known = set(tokenizer.get_vocab().values()) - special_ids(tokenizer)
    banned = [index for index in range(vocab) if index not in known]
    return torch.tensor(banned if len(banned) < vocab else [], dtype=torch.long)


def _cache_rows(model: PreTrainedModel, wanted: SelfText) -> int:
    """How many sequences go together: `wanted.batch`, on a card more, or as many as the cache may hold."""
    most, room, each = wanted.batch, CACHE_BYTES, wanted.sequence_length * _cache_bytes_per_token(model)
    if model.device.type == "cuda":
        # Of all its memory, not of what is free: the text hangs on how many are drawn together.
        all_of_it = torch.cuda.get_device_properties(model.device).total_memory
        most, room = CARD_BATCH * most, max(room, int(CARD_SHARE * all_of_it))
        each += LOGITS * model.config.get_text_config().vocab_size * model.dtype.itemsize
    return max(1, min(most, room // each))


@torch.no_grad()
def _cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Measured on one token, so that any architecture's cache counts."""
    _, cache = cached_call(model, input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    held = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return max(1, sum(t.numel() * t.element_size() for t in held if t is not None))
