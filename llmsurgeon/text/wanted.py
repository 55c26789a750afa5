"""Which calibration text is wanted, and of which sources. S sequences of L tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.files import kind_of
from llmsurgeon.text.kinds import ALL, KINDS, kinds_of
from llmsurgeon.text.sequences import Sequences, spread


@dataclass(frozen=True)
class Source:
    """Where some of the text comes from: a file, a hub dataset (NAME[:CONFIG][:SPLIT]) or kinds that the model writes.

    weight: how much of it there is beside the other sources.
    """

    text: str | None = None
    dataset: str | None = None
    kinds: tuple[str, ...] = ()
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What a reader is told of it."""
        return self.text or f"dataset {self.dataset}"


SELF = Source(kinds=kinds_of([ALL]))


@dataclass(frozen=True)
class Calibration:
    """How calibration tokens are made.

    At most one of `text` (a file) and `dataset` (NAME[:CONFIG][:SPLIT]), beside which the share `self_share` is sampled
    from the model; or `texts`, several sources by their weights; with none of them all is sampled from the model.
    """

    text: str | None = None
    dataset: str | None = None
    tokens: int = 65536
    sequence_length: int = 512
    seed: int = 0
    sentences: bool = False
    self_share: float = 0.0
    texts: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        if self.text and self.dataset:
            raise SurgeryError("calibration: give text or dataset, not both")
        if self.texts and (self.text or self.dataset):
            raise SurgeryError("calibration: give several texts alone, without one text or dataset beside them")
        for source in self.sources:
            if source.text:
                kind_of(source.text)
        if self.sequence_length < 2:
            raise SurgeryError(f"calibration: sequence_length is {self.sequence_length}, expected 2 or more")
        if self.tokens < self.sequence_length:
            raise SurgeryError(
                f"calibration: {self.tokens} tokens are less than one sequence of {self.sequence_length}; "
                "raise the number of tokens (--tokens), or lower the sequence length (--seq-len)"
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the text comes from."""
        if self.texts:
            return self.texts
        if not (self.text or self.dataset):
            return (SELF,)
        named = Source(self.text, self.dataset, weight=1 - self.self_share)
        return (named, replace(SELF, weight=self.self_share)) if self.self_share else (named,)

    @property
    def named(self) -> tuple[Source, ...]:
        """The files and datasets among the sources."""
        return tuple(source for source in self.sources if not source.kinds)

    @property
    def labels(self) -> tuple[str, ...]:
        """The kind of the text of each source: the name of its file or dataset, in full where that is not its
        own; "" where the model writes, whose kinds have names of their own."""
        short = [Path(source.text).name if source.text else source.dataset or "" for source in self.sources]
        return tuple(
            f"file {source.name}" if not source.kinds and (name in KINDS or short.count(name) > 1) else name
            for source, name in zip(self.sources, short, strict=True)
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of text that there may be."""
        sources = zip(self.sources, self.labels, strict=True)
        return tuple(dict.fromkeys(kind for source, label in sources for kind in source.kinds or (label,)))

    def order(self) -> list[int]:
        """The number of the source of each sequence, by the weights."""
        count = self.tokens // self.sequence_length
        return spread({place: source.weight for place, source in enumerate(self.sources)}, count)

    def describe(self, made: Sequences, purpose: str = "calibration", sampled_from: str = "the model itself") -> str:
        """One line for the reader: how many tokens there are and where they come from, with the share of each kind."""
        length = made.tokens.shape[1] if len(made) else 0
        line = f"{purpose}: {made.tokens.numel():,} tokens "
        told = [f"of {source.name}" for source in self.named]
        if len(self.named) < len(self.sources):
            told.append(f"sampled from {sampled_from}" + ("" if self.named else " (no --text given)"))
        line += " and ".join(told)
        if len(set(made.kinds)) > 1:
            shares = {kind: int(mask.sum()) / len(made) for kind, mask in made.named().items()}
            line += ": " + ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())
        if self.sentences:
            line += f", {len(made):,} sentences, padding counted"
        wanted = self.tokens // self.sequence_length
        return line if len(made) >= wanted or not length else f"{line}; {self.tokens:,} were asked for"
