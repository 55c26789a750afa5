"""How much of sampled text is of each kind: by how likely the model itself finds its openers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from llmsurgeon.boundary.foreign import token_ids
from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.kinds import KINDS, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A share is proportional to the square root of how likely a word of this many bytes is in an opener of its kind.
WORD = 4
# Nats a byte beyond the likeliest opener's at which a share is nothing; farther, it would be no number either.
FARTHEST = 50.0
# Openers that a model is asked about together.
BATCH = 16


@dataclass(frozen=True)
class Part:
    """What some sequences are: a kind, one of its variants, and the token ids of their openers."""

    kind: str
    variant: str
    openers: tuple[tuple[int, ...], ...] = ()


def shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kinds: Sequence[str],
    length: int,
    start: int | None,
    chats: bool,
) -> dict[Part, float]:
    """The share of each part of the text: kinds by how likely the model finds their openers, variants likewise.

    With b nats a byte, a variant weighs sqrt(exp(-4 b)); a kind weighs as its variants do in the mean, the likelier
    ones counting for more, and conversations (where `chats`) as the likeliest kind. A language that the model does not
    speak so gets next to nothing, and no kind takes it all.

    Raises:
        SurgeryError: the tokenizer can spell no opener of these kinds in tokens of the model, and the model has no
            conversations.
    """
    rows = model.config.vocab_size
    nats: dict[Part, float] = {}
    for name in kinds:
        for variant in KINDS[name].variants:
            if spelled := spelled_by(tokenizer, KINDS[name], variant, length - 1, rows):
                nats[Part(name, variant, tuple(spelled))] = nats_a_byte(model, spelled, start)
    least = min(nats.values(), default=0.0)
    weights: dict[str, dict[Part, float]] = {}
    for part, b in nats.items():
        weights.setdefault(part.kind, {})[part] = math.sqrt(math.exp(-WORD * min(b - least, FARTHEST)))
    of_kinds = {name: sum(w * w for w in parts.values()) / sum(parts.values()) for name, parts in weights.items()}
    for name in (name for name in kinds if KINDS[name].chat and chats):
        of_kinds[name] = max(of_kinds.values(), default=1.0)
        weights[name] = {Part(name, ""): 1.0}
    if not weights:
        raise SurgeryError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: no text of the kind {', '.join(kinds)} can be "
            "sampled: it has no chat template whose turns end in special tokens, or spells none of the openers; ask "
            "for other kinds, or give --text FILE"
        )
    total = sum(of_kinds.values())
    return {
        part: of_kinds[name] / total * weight / sum(parts.values())
        for name, parts in weights.items()
        for part, weight in parts.items()
    }


def spelled_by(
    tokenizer: PreTrainedTokenizerBase, kind: Kind, variant: str, length: int, rows: int
) -> dict[tuple[int, ...], float]:
    """Token ids of a variant's openers, cut to `length` -> bytes of what each says; without those that the tokenizer
    cannot spell in the `rows` tokens of the model."""
    texts = kind.variants[variant]
    found = {}
    for text, says in zip(texts, kind.meaning or texts, strict=True):
        ids = token_ids(tokenizer, text, add_special_tokens=False)
        if ids and max(ids) < rows and not (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            found[tuple(ids[:length])] = len(says.encode()) * min(1.0, length / len(ids))
    return found


@torch.no_grad()
def nats_a_byte(model: PreTrainedModel, spelled: Mapping[tuple[int, ...], float], start: int | None) -> float:
    """How unlikely the model finds these openers behind the document start, in nats a byte of what they say.

    Without such a token their first tokens are not counted.
    """
    lead = () if start is None else (start,)
    rows = [(*lead, *ids) for ids in spelled if len(lead) + len(ids) > 1]
    nats = 0.0
    for place in range(0, len(rows), BATCH):
        part = rows[place : place + BATCH]
        longest = max(map(len, part))
        # What follows an opener changes nothing before it: these models look back alone.
        filled = torch.tensor([[*ids, *([ids[-1]] * (longest - len(ids)))] for ids in part])
        logits = model.eval()(input_ids=filled.to(model.device), use_cache=False).logits[:, :-1]
        targets = filled[:, 1:].flatten().to(logits.device)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none").view(len(part), -1)
        nats += sum(float(loss[: len(ids) - 1].sum()) for ids, loss in zip(part, losses, strict=True))
    # What is wrong with a model whose logits are no numbers is said when a token is drawn.
    return nats / sum(spelled.values()) if math.isfinite(nats) else 0.0
