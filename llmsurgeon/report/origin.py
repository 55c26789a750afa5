"""Where a model comes from, as somebody elsewhere can find it: no folder of the maker's disk is an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmsurgeon.checkpoint.card_file import Heritage, heritage_of
from llmsurgeon.checkpoint.hub import repository_of
from llmsurgeon.checkpoint.source import Checkpoint

SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Origin:
    """A model that another was made from.

    name: its hub id, else its folder's or file's own name. hub_id: where the hub has it. revision: the commit that was
    read. fingerprint: of its config, headers and a sample of its numbers, for what is not read from the hub.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    def __str__(self) -> str:
        if self.revision:
            return f"{self.name} at revision {self.revision[:SHOWN_DIGITS]}"
        return f"{self.name} (fingerprint {self.fingerprint[:SHOWN_DIGITS]})" if self.fingerprint else self.name

    @property
    def short(self) -> str:
        """The name without its owner."""
        return self.name.rpartition("/")[2]


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Where a checkpoint comes from: the hub, what its own card says it is, else a name and a fingerprint."""
    if known := repository_of(checkpoint.path):
        return Origin(known[0], known[0], known[1])
    own = heritage_of(checkpoint.card).hub_id
    name = own or Path(checkpoint.name).expanduser().absolute().name
    return Origin(name, own, fingerprint=checkpoint.content)


def inherited(*checkpoints: Checkpoint) -> Heritage:
    """What the cards of a model and of those before it say: of the first that names a licence, else of the first."""
    found = [heritage_of(checkpoint.card) for checkpoint in checkpoints]
    return next((heritage for heritage in found if heritage.license), found[0])
