"""Fast feedforward networks out of dense ones: where the trees branch, and which neurons stand where.

Leaf form: hierarchical balanced 2-means over what the FFN reads gives the hyperplanes; each leaf takes the neurons that
its own tokens need. Node form: small trees of existing neurons; a node's child is a neuron that is active on its side.
Everything is found on one walk over calibration tokens; no weight is touched. Compare arXiv 2308.14711 and 2311.10770,
which train such layers from scratch.

Shapes: n tokens, D model width, H FFN width, L leaves, W neurons a leaf, S shared neurons, K trees, M nodes a tree.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.analysis.elimination import DAMPING
from llmsurgeon.analysis.fff_leaves import (
    OTHERS,
    Assignment,
    Seen,
    Sums,
    grow_tree,
    importance_of,
    joined,
    leaf_errors,
    leaf_of,
    leaf_sums,
    share_out,
)
from llmsurgeon.analysis.fff_nodes import plant, reach_nodes
from llmsurgeon.analysis.score import Scene, Score
from llmsurgeon.analysis.watch import watch
from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.parts import FFFSpec
from llmsurgeon.operations.fff import Trees
from llmsurgeon.processes.share import Share
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.walk import Parts

# Activations of one layer that are held at a time; beyond that fewer tokens are used.
HELD_NUMBERS = 1 << 28
# Every JUDGE-th sequence measures errors and fits nothing.
JUDGE = 8


@dataclass(frozen=True)
class Routing:
    """How one FFN becomes a tree. Indices are of the dense FFN's neurons; -1 marks a node without a neuron.

    router_weight, router_bias: hyperplanes [L - 1, D], [L - 1] of the leaf form, breadth first; None without depth.
    neurons: [L, W] or [K, M]; `shared`: [S].
    error: mean over unseen tokens of ||FFN's change||^2 / ||stream behind it - its mean||^2, output projection refitted
        (what all tokens have in common tells nothing).
    least_tokens: calibration tokens of the leaf that has fewest.
    """

    spec: FFFSpec
    neurons: Tensor
    shared: Tensor
    router_weight: Tensor | None
    router_bias: Tensor | None
    error: float
    least_tokens: int


def route_ffns(
    runner: LayerRunner,
    tokens: Tensor,
    wanted: Mapping[int, Sequence[FFFSpec]],
    assignment: Assignment = "least_squares",
    min_tokens: int = 64,
    batch: int = 4,
) -> dict[int, tuple[Routing, ...]]:
    """Layer -> a routing for each of the shapes that are wanted of it.

    Where several are wanted, those with leaves that too few tokens reach are left out.

    Args:
        tokens: [S, T].

    Raises:
        SurgeryError: no shape of some layer gets `min_tokens` calibration tokens into each of its leaves.
    """
    check_kernel(runner)
    width = max(runner.entries[layer]["ffn"]["intermediate_size"] for layer in wanted)
    sequences = max(2, min(len(tokens), HELD_NUMBERS // width // tokens.shape[1]))
    tokens = tokens[torch.linspace(0, len(tokens) - 1, min(sequences, len(tokens))).long()]
    nodes = any(spec.form == "node" for shapes in wanted.values() for spec in shapes)

    def watcher(layer: int, module: nn.Module) -> _FFN:
        route = partial(_route, layer, wanted=wanted[layer], assignment=assignment, min_tokens=min_tokens)
        return _FFN(runner, module, len(tokens), nodes, route)

    return watch(runner, tokens, watcher, wanted, "grow trees", batch)


def check_kernel(runner: LayerRunner) -> None:
    """Raise SurgeryError where LLMSURGEON_FFF_KERNEL forces a kernel that cannot run here."""
    # Modeling files are for checkpoints: reached by path, as formats/models.py does.
    modeling = importlib.import_module("llmsurgeon.modeling.surgeon_fff")
    try:
        modeling.choose_kernel(torch.device(runner.device), runner.dtype, modeling.activation_of(runner.model.config))
    except RuntimeError as error:
        raise SurgeryError(str(error)) from error


class _FFN:
    """Collects what a layer's FFN reads and what its neurons do, and routes when the walk leaves the layer."""

    def __init__(
        self,
        runner: LayerRunner,
        module: nn.Module,
        sequences: int,
        nodes: bool,
        route: Callable[..., tuple[Routing, ...]],
    ) -> None:
        self.runner, self.sequences, self.route = runner, sequences, route
        self.module: Any = module
        family = runner.family
        self.read: list[Tensor] = []
        self.behind: list[Tensor] = []
        self.held: list[Tensor] = []
        self.active: list[Tensor] = []
        self.branch: list[Tensor] = []
        out = module.get_submodule(family.ffn_module(family.ffn_out))
        weight: Any = out.weight
        bias: Any = getattr(out, "bias", None)
        self.down = (weight if family.transposed else weight.T).detach().float().clone()
        self.bias = torch.zeros(()) if bias is None else bias.detach().float().clone()
        self.hooks = [out.register_forward_pre_hook(lambda _, inputs: self._keep(self.active, inputs[0]))]
        if not nodes:
            return
        first = module.get_submodule(family.ffn_module(family.ffn_in[0]))
        self.hooks.append(
            first.register_forward_hook(
                lambda _, inputs, output: self._keep(self.branch, output.chunk(family.ffn_stacked, dim=-1)[0])
            )
        )

    def _keep(self, where: list[Tensor], tensor: Tensor) -> None:
        where.append(tensor.detach().float().flatten(0, -2).cpu())

    def see(self, part: slice, parts: Parts) -> None:
        """Keep what some sequences' tokens did."""
        real = self.runner.real(parts.entered)
        self._keep(self.read, self.module.ffn_input(parts.ffn_input)[real])
        entered = parts.ffn_input[real].float().cpu()
        for kept in (self.active, self.branch):
            if kept:
                kept[-1] = kept[-1][real.flatten().cpu()]
        self.behind.append(entered + self.active[-1] @ self.down.cpu() + self.bias.cpu())
        sequences = torch.arange(part.start, part.start + len(parts.entered))
        judges = (sequences % JUDGE == JUDGE - 1) | (self.sequences < JUDGE) & (sequences == self.sequences - 1)
        self.held.append(judges.repeat_interleave(real.sum(1).cpu()))

    def found(self, share: Share) -> tuple[Routing, ...]:
        """A routing for each shape that is wanted."""
        for hook in self.hooks:
            hook.remove()
        read, active, behind = (torch.cat(kept) for kept in (self.read, self.active, self.behind))
        branch = torch.cat(self.branch) if self.branch else torch.empty(0)
        scale = (behind - behind.mean(0)).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        seen = Seen(read, active, branch, self.down.cpu(), scale, torch.cat(self.held))
        self.read, self.active, self.branch, self.behind = [], [], [], []
        return self.route(seen, dtype=self.runner.dtype)


def _route(
    layer: int, seen: Seen, wanted: Sequence[FFFSpec], assignment: Assignment, min_tokens: int, dtype: torch.dtype
) -> tuple[Routing, ...]:
    if wanted[0].form == "node":
        return tuple(_route_nodes(seen, spec) for spec in wanted)
    depth = max(spec.depth for spec in wanted)
    weight, bias = grow_tree(seen.read[~seen.held], depth)
    # What the checkpoint will hold.
    weight, bias = weight.to(dtype).float(), bias.to(dtype).float()
    found: list[Routing] = []
    refusal = ""
    sums = leaf_sums(seen.active[~seen.held], leaf_of(seen.read[~seen.held], weight, bias, depth), depth)
    for level in sorted({spec.depth for spec in wanted}):
        shapes = [spec for spec in wanted if spec.depth == level]
        leaf = leaf_of(seen.read, weight, bias, level)
        counts = torch.bincount(leaf, minlength=2**level)
        least = int(counts.argmin())
        if counts[least] < min_tokens:
            refusal = (
                f"fff: layer {layer}: leaf {least} of {2**level} gets {int(counts[least])} of {len(leaf)} calibration "
                f"tokens, {min_tokens} are needed (min_tokens); lower depth or raise calibration.tokens"
            )
            continue
        found += _route_leaves(seen, leaf, sums[level], shapes, assignment, (weight, bias))
    if not found:
        raise SurgeryError(refusal)
    return tuple(found)


def _route_leaves(
    seen: Seen,
    leaf: Tensor,
    sums: Sequence[Sums],
    shapes: Sequence[FFFSpec],
    assignment: Assignment,
    planes: tuple[Tensor, Tensor],
) -> list[Routing]:
    """Assign neurons for every shape of one depth, and measure what each costs."""
    depth = shapes[0].depth
    everyone = OTHERS * joined(sums).covariance()
    importance = torch.stack([importance_of(leaf_sums, seen.down, everyone, assignment) for leaf_sums in sums])
    shares = [share_out(importance, spec.shared, spec.leaf_width) for spec in shapes]
    errors = leaf_errors(seen, leaf, sums, everyone, shares)
    # Without decisions there are no hyperplanes.
    weight, bias = (plane[: 2**depth - 1] if depth else None for plane in planes)
    least_tokens = int(torch.bincount(leaf, minlength=2**depth).min())
    return [
        Routing(spec, neurons, shared, weight, bias, error, least_tokens)
        for spec, (shared, neurons), error in zip(shapes, shares, errors, strict=True)
    ]


def _route_nodes(seen: Seen, spec: FFFSpec) -> Routing:
    fit = ~seen.held
    energy = seen.active[fit].square() * seen.down.square().sum(1)
    neurons = plant(energy, seen.branch[fit] > 0, spec.depth, spec.trees)
    kept = neurons[neurons >= 0]
    visited = torch.zeros_like(seen.active, dtype=torch.bool)
    for nodes in neurons:
        reach_nodes(visited, seen.branch > 0, nodes, spec.depth)
    active = seen.active * visited
    mine, judge = active[fit][:, kept], active[seen.held][:, kept]
    wanted, unseen = (seen.active[mask] @ seen.down for mask in (fit, seen.held))
    mean, shift = mine.mean(0), wanted.mean(0)
    gram = (mine - mean).T @ (mine - mean)
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    rows = torch.linalg.solve(gram, (mine - mean).T @ (wanted - shift))
    missing = unseen - shift - (judge - mean) @ rows
    error = float((missing.square().sum(-1) / seen.scale[seen.held]).mean())
    return Routing(spec, neurons, torch.zeros(0, dtype=torch.long), None, None, error, len(seen.read))


def _measured(scene: Scene, requests: Sequence[Trees]) -> Mapping[str, Any]:
    found: dict[int, Any] = {}
    for request in requests:
        shapes, assign = request.wanted, request.assign
        found |= route_ffns(scene.runner, scene.tokens, shapes, assign, request.min_tokens, scene.batch)
    return {"fff": found}


ROUTINGS = Score(_measured, sentences=True)
