"""Mixtures of experts: files hold each expert's projections by themselves, today's classes stack them.

Operations and written checkpoints keep to the files' names, so that an expert's bytes pass unchanged. Only a model in
memory needs the class's names.

E experts, I channels of an expert, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from llmsurgeon.checkpoint.transform import TransformedWeights, WeightTransform, rename
from llmsurgeon.model.families import Family
from llmsurgeon.model.families.modules import Experts

Shape = tuple[int, ...]


def file_shapes(shapes: Mapping[str, Shape], family: Family) -> dict[str, Shape]:
    """Shapes under the class's names -> shapes under the names of files."""
    experts = family.experts
    if experts is None:
        return dict(shapes)
    made: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if not _stacked(name):
            made[_renamed(name, experts.module, family.ffn)] = shape
            continue
        count, rows, columns = shape
        parts = (
            {experts.gate: rows // 2, experts.up: rows // 2} if name.endswith("gate_up_proj") else {experts.down: rows}
        )
        for target, height in ((_expert(name, e, p, family), h) for e in range(count) for p, h in parts.items()):
            made[target] = (height, columns)
    return made


def file_form(weights: Mapping[str, Tensor], family: Family) -> Mapping[str, Tensor]:
    """The weights under the names of files, where a checkpoint was saved as the class holds it."""
    experts = family.experts
    if experts is None or not any(_stacked(name) for name in weights):
        return weights
    edits: list[WeightTransform] = []
    for name in weights:
        if not _stacked(name):
            target = _renamed(name, experts.module, family.ffn)
            edits += [rename(name, target)] if target != name else []
            continue
        count = len(weights[name])
        parts = (experts.gate, experts.up) if name.endswith("gate_up_proj") else (experts.down,)
        targets = tuple(_expert(name, e, part, family) for e in range(count) for part in parts)
        edits.append(
            WeightTransform((name,), targets, _apart if len(parts) == 2 else lambda down: tuple(down.unbind()))
        )
    return TransformedWeights(weights, edits)


def class_form(weights: Mapping[str, Tensor], family: Family) -> Mapping[str, Tensor]:
    """The weights under the names of today's class, each layer's experts stacked when they are asked for."""
    experts = family.experts
    if experts is None:
        return weights
    counts: dict[str, int] = {}
    edits: list[WeightTransform] = []
    for name in weights:
        match = re.fullmatch(rf"(.+\.experts)\.(\d+)\.{re.escape(experts.down)}\.weight", name)
        if match:
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
        elif ".experts." not in name and (target := _renamed(name, family.ffn, experts.module)) != name:
            edits.append(rename(name, target))
    for prefix, count in counts.items():
        target = _renamed(prefix, family.ffn, experts.module)

        def sources(*parts: str, prefix: str = prefix, count: int = count) -> tuple[str, ...]:
            return tuple(f"{prefix}.{e}.{part}.weight" for part in parts for e in range(count))

        gate_up = WeightTransform(sources(experts.gate, experts.up), (f"{target}.gate_up_proj",), _together)
        down = WeightTransform(sources(experts.down), (f"{target}.down_proj",), lambda *each: torch.stack(each))
        edits += [gate_up, down]
    return TransformedWeights(weights, edits)


def _together(*weights: Tensor) -> Tensor:
    """E gates and E ups [I, D] -> [E, 2 I, D]."""
    half = len(weights) // 2
    return torch.cat([torch.stack(weights[:half]), torch.stack(weights[half:])], dim=1)


def _apart(gate_up: Tensor) -> tuple[Tensor, ...]:
    """[E, 2 I, D] -> gate, up of expert 0, gate, up of expert 1 ..., each [I, D]."""
    return tuple(part.contiguous() for expert in gate_up for part in expert.chunk(2))


def _stacked(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _expert(stacked: str, expert: int, part: str, family: Family) -> str:
    """The file's name of one expert's projection, from the class's name of all of them."""
    assert isinstance(family.experts, Experts)
    prefix = _renamed(stacked.rpartition(".")[0], family.experts.module, family.ffn)
    return f"{prefix}.{expert}.{part}.weight"


def _renamed(name: str, old: str, new: str) -> str:
    """`name` with the path component `old` called `new`."""
    return ".".join(new if part == old else part for part in name.split("."))
