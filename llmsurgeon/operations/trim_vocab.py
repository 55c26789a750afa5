"""A smaller vocabulary: the rows of embedding and head whose tokens nobody asked for go, and so do those tokens.

Small models are mostly their table: of Gemma 3 270M's 268 million parameters 168 million are 262,144 rows, and
decoding reads the head for every token. The tokenizer goes along: text whose tokens all stayed is cut exactly as
before, any other text into smaller pieces (`llmsurgeon.vocabulary.closure`).

The rows are chosen when the checkpoint is opened, from the tokenizer's files, and every later step fits and measures a
model that never had the others; so the step comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import Offer, Plan, Step, Subject, shares_of
from llmsurgeon.text.files import TextFile
from llmsurgeon.text.kinds import OfItself

# What a search may leave of the rows, and what their number is then a multiple of.
SHARES, MULTIPLE = (0.75, 0.5, 0.375, 0.25), 64


class KeepTokens(BaseModel):
    """Tokens that stay: of a text or of what the model writes, the first of the vocabulary, or those in a list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: TextFile | None = Field(default=None, description="a .txt, .jsonl or .parquet file whose tokens stay")
    self: OfItself | None = Field(
        default=None, description="a kind of text sampled from the model, or all of them, whose tokens stay"
    )
    min_count: int = Field(default=1, ge=1, description="of text and self: how often a token must occur")
    tokens: int | None = Field(
        default=None,
        ge=0,
        description="so many: of text and self the most frequent (0: they only come first in filling `rows` up), else "
        "the first",
    )
    file: str | None = Field(default=None, description="a list of tokens: one a line, or JSON with tokens or ids")

    @model_validator(mode="after")
    def _one_kind(self) -> KeepTokens:
        given = [self.text is not None, self.self is not None, self.file is not None]
        if sum([*given, not self.read and self.tokens is not None]) != 1:
            raise ValueError(
                "keep takes text or self (with min_count or tokens), tokens alone, or file; a list takes several"
            )
        if not self.read and self.tokens == 0:
            raise ValueError("keep: tokens 0 goes with text or self")
        if self.min_count != 1 and not self.read:
            raise ValueError("keep: min_count goes with text or self")
        return self

    @property
    def read(self) -> bool:
        """Whether a text says which tokens these are."""
        return self.text is not None or self.self is not None


class TrimVocab(Step):
    """Keep the tokens that `keep` asks for (the union of its entries) and what must stay beside them.

    rows: how many rows there are to be; what is missing is filled up by the most frequent tokens of the texts, then
        as `fill` says. Without it, as few as a multiple of `multiple_of` allows.
    fill: `order` takes the first of the vocabulary; `predicted` those that are likely in more of the texts, by what the
        model expects there and by how they are spelled, and a quarter in any text. Encoders, which expect nothing, fill
        up in order.
    """

    op: Literal["trim_vocab"] = "trim_vocab"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.CUTS_VOCABULARY})
    # Whoever serves the result has another tokenizer then.
    asked_for: ClassVar[bool] = True
    keep: KeepTokens | tuple[KeepTokens, ...] = ()
    rows: Annotated[int, Field(ge=1)] | None = None
    multiple_of: Annotated[int, Field(ge=1)] = 64
    fill: Literal["order", "predicted"] = "order"

    @model_validator(mode="after")
    def _something(self) -> TrimVocab:
        if not self.keep and self.rows is None:
            raise ValueError("trim_vocab takes keep, rows, or both")
        if self.rows is None and any(entry.self for entry in self.entries):
            raise ValueError("trim_vocab: self goes with rows: how many tokens a model uses shows when it has written")
        if self.fill == "predicted" and (self.rows is None or not any(entry.read for entry in self.entries)):
            raise ValueError("trim_vocab: fill: predicted goes with rows and with text or self in keep")
        return self

    @property
    def entries(self) -> tuple[KeepTokens, ...]:
        """What `keep` asks for, as a list whatever it was."""
        return (self.keep,) if isinstance(self.keep, KeepTokens) else self.keep

    def computes(self) -> bool:
        return self.fill == "predicted" or any(entry.self for entry in self.entries)

    def reads(self) -> tuple[str | None, ...]:
        return tuple(name for entry in self.entries for name in (entry.text, entry.file))

    def check_place(self, before: Sequence[Step]) -> None:
        if before:
            raise SurgeryError(
                "step trim_vocab comes first, and once: later steps fit and measure the tokens that stay (`keep` takes "
                "a list)"
            )

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        # An encoder says nothing of the next token, by which one vocabulary could be held against another.
        if subject.family.encoder:
            return []
        rows = shares_of(subject.spec.vocab, SHARES, MULTIPLE)
        return [Offer((), "table", f"{count:,} rows", (cls(rows=count),), rows=count) for count in rows]

    def plan(self, subject: Subject) -> Plan:
        """Nothing is left to do: the checkpoint was opened with these rows alone."""
        subject.check(self)
        return Plan(subject.spec, ())
