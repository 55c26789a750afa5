"""What an analysis found, as report.json, scores.safetensors and suggested.yaml have it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon.analysis.greedy import SEARCH_TOKENS, Choice
from llmsurgeon.analysis.measure import Measurements
from llmsurgeon.boundary.places import relative, without_folders

_DISTANCES = {"kl": "KL to the parent: {:.3f} nats a token", "cosine": "Cosine distance to the parent: {:.3f}"}


@dataclass(frozen=True)
class Analysis:
    """What the analysis of a model with N layers found.

    dropped: attentions to drop, in the order in which they were chosen; runs: the FFN runs that this makes.
    ffn_dependency: M for FFNs alone with `dropped` gone, [N, N].
    refit_on: the calibration of the suggested recipe, by a recipe's keys.
    distance: what stands under the name KL: for encoders 1 - cos of the last hidden states.
    fuses: False where the family's FFNs cannot be fused.
    """

    model: str
    family: str
    layers: int
    tokens: int
    sequence_length: int
    text: str
    measurements: Measurements
    choices: tuple[Choice, ...]
    dropped: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]
    ffn_dependency: Tensor
    refit_on: Mapping[str, Any] = field(default_factory=dict)
    distance: Literal["kl", "cosine"] = "kl"
    fuses: bool = True

    def report(self) -> dict[str, Any]:
        """report.json: every number, layers as list indices, NaN as null. docs/report.md describes the fields."""
        return {
            "version": 1,
            "llmsurgeon": __version__,
            "model": without_folders(self.model, self.model),
            "family": self.family,
            "distance": self.distance,
            "layers": self.layers,
            "calibration": {
                "text": without_folders(self.text),
                "tokens": self.tokens,
                "sequence_length": self.sequence_length,
            },
            "scores": {
                name: {"mean": _numbers(s.mean), "low": _numbers(s.low), "high": _numbers(s.high)}
                for name, s in self.measurements.scores.items()
            },
            "block_dependency": _numbers(self.measurements.arrays["block_dependency"].tolist()),
            "ffn_dependency": _numbers(self.ffn_dependency.tolist()),
            "angular_distance": _numbers(self.measurements.arrays["angular_distance"].tolist()),
            "suggestion": {
                "fuses": self.fuses,
                "drop_attention": sorted(self.dropped),
                "fuse_runs": [list(run) for run in self.runs],
                "blocks_after": self.layers - sum(len(run) - 1 for run in self.runs),
                "steps": [
                    {
                        "layer": choice.layer,
                        "kl_after": choice.kl,
                        "candidates": {str(layer): kl for layer, kl in sorted(choice.candidates.items())},
                    }
                    for choice in self.choices
                ],
            },
        }

    def tensors(self) -> dict[str, Tensor]:
        """scores.safetensors: every score and matrix as float32."""
        scores = {f"{name}.mean": torch.tensor(s.mean) for name, s in self.measurements.scores.items()}
        arrays = {**self.measurements.arrays, "ffn_dependency": self.ffn_dependency}
        return {name: t.float().contiguous() for name, t in {**scores, **arrays}.items()}

    def recipe(self, folder: Path | None = None) -> str:
        """suggested.yaml: drop, fuse, refit; runnable as it is. Files are named as they lie from `folder`, its own."""
        steps: list[dict[str, Any]] = [{"op": "prune_attention", "layers": sorted(self.dropped)}]
        if self.runs:
            steps.append({"op": "fuse_ffn", "runs": [f"{run[0]}-{run[-1]}" for run in self.runs], "norm": "fold"})
        steps.append({"op": "refit"})

        def placed(value: Any) -> Any:
            return relative(value, folder) if folder and isinstance(value, str) else value

        body = {
            "version": 1,
            "description": f"{len(self.dropped)} attentions out, "
            f"{self.layers} -> {self.layers - sum(len(run) - 1 for run in self.runs)} blocks",
            "model": placed(self.model),
            "calibration": {key: placed(value) for key, value in self.refit_on.items() if value is not None},
            "steps": steps,
        }
        head = (
            "# Suggested by `llmsurgeon analyze`. Run: llmsurgeon run suggested.yaml -o OUT\n"
            f"# {_DISTANCES[self.distance].format(self.choices[-1].kl)}, measured after cutting, before refit "
            f"({SEARCH_TOKENS:,} tokens or fewer).\n"
        )
        return head + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=120)


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
