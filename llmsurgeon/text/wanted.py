"""Which calibration text is wanted. S sequences of L tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.files import kind_of


@dataclass(frozen=True)
class Calibration:
    """How calibration tokens are made. At most one of `text` (a file) and `dataset` (NAME[:CONFIG][:SPLIT]);
    with neither, text is sampled from the model itself."""

    text: str | None = None
    dataset: str | None = None
    tokens: int = 65536
    sequence_length: int = 512
    seed: int = 0
    sentences: bool = False

    def __post_init__(self) -> None:
        if self.text and self.dataset:
            raise SurgeryError("calibration: give text or dataset, not both")
        if self.text:
            kind_of(self.text)
        if self.sequence_length < 2:
            raise SurgeryError(f"calibration: sequence_length is {self.sequence_length}, expected 2 or more")
        if self.tokens < self.sequence_length:
            raise SurgeryError(
                f"calibration: {self.tokens} tokens are less than one sequence of {self.sequence_length}; "
                "raise the number of tokens (--tokens), or lower the sequence length (--seq-len)"
            )

    def describe(self, windows_SL: Tensor, purpose: str = "calibration", sampled_from: str = "the model itself") -> str:
        """One line for the reader: how many tokens there are and where they come from."""
        line = f"{purpose}: {windows_SL.numel():,} tokens "
        if self.text:
            line += f"of {self.text}"
        elif self.dataset:
            line += f"of dataset {self.dataset}"
        else:
            line += f"sampled from {sampled_from} (no --text given)"
        if self.sentences:
            line += f", {len(windows_SL):,} sentences, padding counted"
        wanted = self.tokens // self.sequence_length
        return line if len(windows_SL) >= wanted else f"{line}; {self.tokens:,} were asked for"
