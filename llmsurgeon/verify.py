"""`verify`: is a checkpoint whole? Its files, its tensors, and one tiny forward pass."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.checkpoint.finite import first_not_finite, is_finite
from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.forms import form_of
from llmsurgeon.formats.models import embedding_rows, fill
from llmsurgeon.formats.reading import read_model


@dataclass(frozen=True)
class Verified:
    """What `verify` found in a folder.

    problems: what is wrong, a sentence each; none where the checkpoint is in order.
    remarks: what should be known of it and is no fault.
    packed: its form is for transformers alone to load (bitnet), so no forward pass was made.
    """

    folder: Path
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    packed: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(folder: str | os.PathLike[str]) -> Verified:
    """Check the checkpoint in `folder`: hashes, index, names and shapes against the config, tied weights, values.

    What is wrong with the checkpoint is returned, not raised. Weights are read in the dtype in which they are stored.

    Raises:
        SurgeryError: there is no such folder.
    """
    name = os.fspath(folder)
    place = local_path(name)
    if not place.is_dir():
        what = "is a file" if place.exists() else "no such folder"
        raise SurgeryError(f"{name}: {what}; verify takes the folder of a checkpoint")
    if problems := verify_files(place):
        return Verified(place, tuple(problems))
    if _packed(name):
        return Verified(place, packed=True)
    problems, remarks = _model_problems(name)
    return Verified(place, tuple(problems), tuple(remarks))


def _packed(folder: str) -> bool:
    try:
        return form_of(open_checkpoint(folder).config).unread is not None
    except SurgeryError:
        return False  # what is wrong with it is said by what comes next


def _model_problems(folder: str) -> tuple[list[str], list[str]]:
    """What is wrong with the tensors and with what they compute, and what is to be said of them."""
    try:
        checkpoint = open_checkpoint(folder)
        damaged = [name for name in checkpoint if not is_finite(checkpoint[name])]
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            return [f"tensor {damaged[0]}{more} holds NaN or infinity: the weights are damaged, get them anew"], []
        made = read_model(checkpoint)
        # As stored, float16 on a CPU, too: where that overflows, it does so elsewhere.
        fill(made.empty, made.weights, made.dtype, "cpu")
    except SurgeryError as error:
        return [str(error)], []
    problems, remarks = list(made.contradictions), list(made.remarks)
    model = made.empty
    ids = torch.arange(4)[None] % embedding_rows(model)
    if type(model).__name__.endswith("MultipleChoice"):
        ids = ids[None]
    if broken := first_not_finite(model, made.dtype, input_ids=ids):
        problems.append(f"a forward pass breaks: {broken}")
    return problems, remarks
