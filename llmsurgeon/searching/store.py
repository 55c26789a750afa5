"""Scores on disk: what was measured of a model on a text is never measured again, by whichever search."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from llmsurgeon.checkpoint.kept import keep, kept
from llmsurgeon.processes.first import from_first


class ScoreStore:
    """The folder of one model, as it computes, on one text: files of a few measured models each.

    A key is what was done to the model, a value each sequence's KL [S]. The folder is the first process's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Tensor] = from_first(self._kept)

    def _kept(self) -> dict[str, Tensor]:
        self.folder.mkdir(parents=True, exist_ok=True)
        values: dict[str, Tensor] = {}
        for file in sorted(self.folder.glob("scores-*.safetensors")):
            if kept(file):
                values |= load_file(file)
        return values

    def found(self, key: str) -> Tensor | None:
        """What was measured, None where nothing was."""
        return self.values.get(key)

    def keep(self, new: Mapping[str, Tensor]) -> None:
        """Keep what was measured, whole or not at all.

        Raises:
            SurgeryError: the disk fails or is full.
        """
        name = sha256("\n".join(sorted(new)).encode()).hexdigest()[:16]
        plain = {key: value.contiguous() for key, value in new.items()}
        from_first(lambda: keep(self.folder / f"scores-{name}.safetensors", lambda path: save_file(plain, path)))
        self.values |= plain
