"""What a fit did to a projection, and the tensors it changed: kept in files, laid over the student's weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform


@dataclass(frozen=True)
class Fit:
    """What happened to one projection. Errors are mean squared errors on the held-out sequences, relative to before."""

    block: int
    parents: tuple[int, ...]
    projection: str
    ridge: float | None
    error_ratio: float

    @property
    def accepted(self) -> bool:
        """True where the update was made."""
        return self.ridge is not None


def stored_names(file: Path) -> list[str]:
    """Names of the tensors in a file that a fit wrote."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def stored_records(file: Path, key: str) -> list[dict[str, Any]]:
    """What stands beside a file's tensors under `key`: how each of them was found."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        records: list[dict[str, Any]] = json.loads(opened.metadata()[key])
    return records


def stored_fits(file: Path) -> list[Fit]:
    """The fits that a file's tensors come from."""
    return [Fit(**{**fit, "parents": tuple(fit["parents"])}) for fit in stored_records(file, "fits")]


def overlay(weights: Mapping[str, Tensor], found: Mapping[str, Path]) -> TransformedWeights:
    """The student's weights with the fitted tensors, read from their files when asked for."""

    def read(name: str, file: Path) -> Callable[[Tensor], Tensor]:
        def fitted(old: Tensor) -> Tensor:
            from safetensors import safe_open

            if old.is_meta:
                return old
            with safe_open(file, framework="pt") as opened:
                key = next(key for key in opened.keys() if name.endswith(key))  # noqa: SIM118
                tensor: Tensor = opened.get_tensor(key)
            return tensor.to(old.dtype)

        return fitted

    return TransformedWeights(
        weights, [WeightTransform((name,), (name,), read(name, file)) for name, file in found.items()]
    )
