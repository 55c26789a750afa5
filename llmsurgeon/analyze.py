"""The whole analysis of a model, and the files that it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from llmsurgeon import __version__
from llmsurgeon.analysis.attention_order import runs_of, search_attentions
from llmsurgeon.analysis.ffn_dependency import ffn_dependency
from llmsurgeon.analysis.greedy import SEARCH_TOKENS, Choice
from llmsurgeon.analysis.measure import Measurements, measure
from llmsurgeon.analysis.score import few
from llmsurgeon.boundary.places import relative, without_folders
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.report.analysis import html_report
from llmsurgeon.walk.runner import LayerRunner

_DISTANCES = {"kl": "KL to the parent: {:.3f} nats a token", "cosine": "Cosine distance to the parent: {:.3f}"}


@dataclass(frozen=True)
class Analysis:
    """What the analysis of a model with N layers found.

    dropped: attentions to drop, in the order in which they were chosen; runs: the FFN runs that this makes.
    ffn_dependency: M for FFNs alone with `dropped` gone, [N, N].
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

    def recipe(self, calibration: Mapping[str, Any], folder: Path | None = None) -> str:
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
            "calibration": {key: placed(value) for key, value in calibration.items() if value is not None},
            "steps": steps,
        }
        head = (
            "# Suggested by `llmsurgeon analyze`. Run: llmsurgeon run suggested.yaml -o OUT\n"
            f"# {_DISTANCES[self.distance].format(self.choices[-1].kl)}, measured after cutting, before refit "
            f"({SEARCH_TOKENS:,} tokens or fewer).\n"
        )
        return head + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=120)


def analyze(
    runner: LayerRunner,
    tokens: Tensor,
    model: str,
    text: str,
    count: int,
    max_run: int,
    batch: int = 4,
    say: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """Measure every score, choose `count` attentions together with the runs they make, and measure M for what is left.

    Args:
        tokens: [S, T].

    Raises:
        SurgeryError: more attentions wanted than the model has, or none can go.
    """
    layers = len(runner.layers)
    if not 1 <= count < layers:
        raise SurgeryError(f"--drop {count}: expected 1 to {layers - 1}, the model has {layers} attentions")
    measurements = measure(runner, tokens, batch)
    sample = few(tokens, SEARCH_TOKENS)
    fuses = FuseFFN.declined(runner.family) is None
    attention_kl = measurements.scores["attention_kl"].mean
    choices = search_attentions(runner, sample, count, max_run, fuse=fuses, batch=batch, attention_kl=attention_kl)
    if not choices:
        raise SurgeryError(f"no attention can go with runs of at most {max_run} blocks; raise --max-run (2 or more)")
    if len(choices) < count:
        say(f"only {len(choices)} of {count} attentions can go with runs of at most {max_run} blocks")
    dropped = frozenset(choice.layer for choice in choices)
    return Analysis(
        model=model,
        family=runner.family.model_type,
        layers=layers,
        tokens=tokens.numel(),
        sequence_length=tokens.shape[1],
        text=text,
        measurements=measurements,
        choices=tuple(choices),
        dropped=tuple(choice.layer for choice in choices),
        runs=runs_of(dropped, layers) if fuses else (),
        ffn_dependency=ffn_dependency(runner, sample, dropped, batch),
        distance="cosine" if runner.family.encoder else "kl",
        fuses=fuses,
    )


def write_analysis(stage: Stage, analysis: Analysis, calibration: Mapping[str, Any]) -> list[Path]:
    """Write the four files of an analysis and make its folder appear. Returns their paths.

    Raises:
        SurgeryError: the disk fails, or the folder has come to hold something meanwhile.
    """
    from safetensors.torch import save

    report = analysis.report()
    recipe = analysis.recipe(calibration, Path(stage.out))
    files: dict[str, bytes] = {
        "report.json": (json.dumps(report, allow_nan=False) + "\n").encode(),
        "scores.safetensors": save(analysis.tensors()),
        "suggested.yaml": recipe.encode(),
        "report.html": html_report(report, recipe).encode(),
    }
    for name, content in files.items():
        stage.write_file(name, content)
    folder = stage.commit()
    return [folder / name for name in files]


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
