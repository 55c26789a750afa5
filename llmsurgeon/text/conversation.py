"""Conversations by a chat template alone: the user's turn is drawn as well, then the answer (Magpie, arXiv 2406.08464).

B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words that stand for what is said, by which a rendered conversation is taken apart.
SAID = ("Userone", "Answerone", "Usertwo", "Answertwo")
# A user's turn longer than this share of the sequence is ended.
LONGEST_TURN = 4


@dataclass(frozen=True)
class Template:
    """Tokens between turns: `start` before the user's first, `answer` before an answer, `user` before another turn.

    The last two begin with the special token that ends the turn before.
    """

    start: tuple[int, ...]
    answer: tuple[int, ...]
    user: tuple[int, ...]

    @property
    def ids(self) -> set[int]:
        """All tokens of it."""
        return {*self.start, *self.answer, *self.user}


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """What a tokenizer's chat template puts between turns; None where it has none, or turns end in no special token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": said} for role, said in zip(roles, SAID, strict=True)]
    rendered = ""
    # A template is a stranger's program, which may fail in any way.
    with suppress(Exception):
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    pieces = []
    for said in SAID[:3]:
        before, found, rendered = rendered.partition(said)
        if not found:
            return None
        pieces.append(tuple(token_ids(tokenizer, before, add_special_tokens=False)))
    start, answer, user = pieces
    special = special_ids(tokenizer)
    if not (start and answer and user and answer[0] in special and user[0] in special):
        return None
    return Template(start, answer, user)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that stand for no text: those with a role, and those that were added as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}


class Turns:
    """Whose turn it is in each row of a batch, and what is put between turns once one has ended."""

    def __init__(self, template: Template, spoken: Sequence[bool], length: int) -> None:
        self.template, self.length = template, length
        # The first place of the turn, which is drawn; of rows that are no conversations, where none is ever reached.
        self.free = [len(template.start) if each else length for each in spoken]
        self.answering = [False] * len(spoken)

    def ends(self, place: int) -> Tensor:
        """The token by which the turn of each row may end at `place`, [B]; -1 where it has not begun."""
        found = [self._next(row)[0] if place > free else -1 for row, free in enumerate(self.free)]
        return torch.tensor(found)

    def heard(self, text_BL: Tensor, place: int) -> None:
        """Look at the token at `place` of each row: behind one that ends a turn write what comes before the next."""
        for row, token in enumerate(text_BL[:, place].tolist()):
            said, glue = place - self.free[row], self._next(row)
            if said < 0:
                continue
            too_long = not self.answering[row] and said >= self.length // LONGEST_TURN
            if token == glue[0] or too_long:
                room = text_BL[row, place : place + len(glue)]
                room.copy_(torch.tensor(glue[: len(room)]))
                self.free[row] = place + len(glue)
                self.answering[row] = not self.answering[row]

    def _next(self, row: int) -> tuple[int, ...]:
        return self.template.user if self.answering[row] else self.template.answer
