"""What closed forms found: files of tensors, a layer each, from which a killed run goes on; and their overlay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import keep, kept
from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform
from llmsurgeon.processes.first import from_first

RECORDS = "records"


@dataclass(frozen=True)
class Stored:
    """One file: tensors under canonical names, and beside them the records that say how they were found."""

    file: Path
    names: tuple[str, ...]
    records: tuple[dict[str, Any], ...]

    @property
    def files(self) -> dict[str, Path]:
        """Name of each tensor -> the file."""
        return dict.fromkeys(self.names, self.file)

    def load_into(self, module: nn.Module, prefix: str) -> None:
        """Put the tensors, whose names begin with `prefix`, into a loaded layer."""
        from safetensors.torch import load_file

        state = module.state_dict()
        found = {name.removeprefix(prefix): tensor for name, tensor in load_file(self.file).items()}
        module.load_state_dict({**state, **{name: t.to(state[name]) for name, t in found.items()}}, assign=True)


@dataclass(frozen=True)
class LayerStore:
    """The folder of one step of one job, which alone reads it again: whether the files fit the job is asked before.

    A file has its name only once it is whole, with its size and sum noted beside it. A run that finds it verifies both;
    a file that is not what was written is removed, with a line that says so, and made again.
    """

    folder: Path

    def found(self, name: str) -> Stored | None:
        """What an earlier run kept under this name, None where nothing whole is there."""
        return from_first(lambda: self._found(self._file(name)))

    @staticmethod
    def _found(file: Path) -> Stored | None:
        from safetensors import safe_open

        if not kept(file):
            return None
        with safe_open(file, framework="pt") as opened:
            return Stored(file, tuple(opened.keys()), tuple(json.loads(opened.metadata()[RECORDS])))

    def keep(self, name: str, tensors: Mapping[str, Tensor], records: Sequence[Any]) -> Stored:
        """Write tensors and records (dataclasses of plain values), whole or not at all.

        Raises:
            SurgeryError: the disk fails or is full.
        """
        from safetensors.torch import save_file

        plain = json.dumps([vars(record) for record in records])
        new = {name: tensor.contiguous() for name, tensor in tensors.items()}
        from_first(lambda: keep(self._file(name), lambda path: save_file(new, path, metadata={RECORDS: plain})))
        return Stored(self._file(name), tuple(new), tuple(json.loads(plain)))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def layer_name(index: int) -> str:
    """The name of the file of the student's layer `index`."""
    return f"layer-{index:04d}"


def on_copies(module: nn.Module) -> dict[str, Tensor]:
    """Give a loaded layer copies of its tensors, which may be views of the checkpoint on disk; what it had before."""
    before = module.state_dict()
    module.load_state_dict({name: tensor.clone() for name, tensor in before.items()}, assign=True)
    return before


def moved(module: nn.Module, before: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module that are not what they were, `prefix` in front of their names."""
    state = module.state_dict()
    return {prefix + name: tensor for name, tensor in state.items() if not torch.equal(tensor, before[name])}


def overlay(weights: Mapping[str, Tensor], found: Mapping[str, Path]) -> TransformedWeights:
    """The student's weights with the fitted tensors, read from their files when asked for.

    A file names its tensors as the student does, or as inside one layer.
    """

    def read(name: str, file: Path) -> Callable[[Tensor], Tensor]:
        def fitted(old: Tensor) -> Tensor:
            from safetensors import safe_open

            if old.is_meta:
                return old
            with safe_open(file, framework="pt") as opened:
                key = max((key for key in opened.keys() if name.endswith(key)), key=len)  # noqa: SIM118
                tensor: Tensor = opened.get_tensor(key)
            return tensor.to(old.dtype)

        return fitted

    return TransformedWeights(
        weights, [WeightTransform((name,), (name,), read(name, file)) for name, file in found.items()]
    )
