"""The kinds of text that a model is asked to write, and how each begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from llmsurgeon.text import openers

Openers = tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of text: the openers of each of its variants, such as languages.

    meaning: what the openers of every variant say, in English; None where they are what they say.
    chat: conversations by the chat template, in place of openers.
    """

    variants: Mapping[str, Openers]
    meaning: Openers | None = None
    chat: bool = False


KINDS: dict[str, Kind] = {
    "prose": Kind({"": openers.PROSE}),
    "encyclopaedia": Kind({"": openers.ENCYCLOPAEDIA}),
    "news": Kind({"": openers.NEWS}),
    "dialogue": Kind({"": openers.DIALOGUE}),
    "code": Kind(openers.CODE),
    "maths": Kind({"": openers.MATHS}),
    "lists": Kind({"": openers.LISTS}),
    "letters": Kind({"": openers.LETTERS}),
    "languages": Kind(openers.LANGUAGES, openers.MEANING),
    "chat": Kind({}, chat=True),
}
# What `self: all` stands for.
ALL = "all"


def kinds_of(names: Sequence[str]) -> tuple[str, ...]:
    """The names of kinds, `all` spelled out, each once."""
    return tuple(dict.fromkeys(kind for name in names for kind in (KINDS if name == ALL else [name])))


def one_kind(name: str) -> str:
    """The name of a kind, or `all`, as it is. Raises ValueError for another, so pydantic reports it at its line."""
    if name != ALL and name not in KINDS:
        raise ValueError(f"{name!r} is no kind of text that a model is asked for; expected {ALL}, {', '.join(KINDS)}")
    return name


# In a recipe: a kind of text that the model writes, or all of them.
OfItself = Annotated[str, AfterValidator(one_kind)]
