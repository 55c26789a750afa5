"""Fast feedforward networks out of dense ones: where the trees branch, and which neurons stand where.

Leaf form: hierarchical balanced 2-means over what the FFN reads gives the hyperplanes; each leaf takes the neurons that
its own tokens need. Node form: small trees of existing neurons; a node's child is a neuron that is active on its side.
Everything is found on one walk over calibration tokens; no weight is touched. Compare arXiv 2308.14711 and 2311.10770,
which train such layers from scratch.

Shapes: n tokens, D model width, H FFN width, L leaves, W neurons a leaf, S shared neurons, K trees, M nodes a tree.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.parts import FFFSpec
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Parts, walk

Assignment = Literal["least_squares", "activation"]

# Activations of one layer that are held at a time; beyond that fewer tokens are used.
HELD_NUMBERS = 1 << 28
# Every JUDGE-th sequence measures errors and fits nothing.
JUDGE = 8
# How much a leaf's neurons also answer for the other leaves' tokens; it steadies leaves with few tokens.
OTHERS = 0.1
# Standard deviation of a hyperplane's score over the tokens that meet it: soft decisions start out nearly hard.
SHARPNESS = 4.0
# Ridges, as multiples of the mean diagonal: of the elimination and of the fit that measures an error.
DAMPING = 1e-2
# Neurons that are eliminated at a time, as a share of the width.
AT_ONCE = 1 / 48


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


@dataclass
class Layer:
    """What a dense FFN did to the calibration tokens.

    read [n, D]: its input; active [n, H]: inner activations; branch [n, H]: pre-activations that a node branches on;
    empty in the leaf form; down [H, D]: its output rows; scale [n]: ||stream behind it - its mean||^2; held [n]: tokens
    that only judge.
    """

    read: Tensor
    active: Tensor
    branch: Tensor
    down: Tensor
    scale: Tensor
    held: Tensor


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
    found: dict[int, tuple[Routing, ...]] = {}
    with Progress("grow trees", len(wanted), "layers") as progress:

        def done(layer: int, seen: Layer) -> None:
            found[layer] = _route(layer, seen, wanted[layer], assignment, min_tokens, runner.dtype)
            progress.advance()

        nodes = any(spec.form == "node" for shapes in wanted.values() for spec in shapes)
        watch = _Watch(runner, frozenset(wanted), len(tokens), nodes, done)
        walk(runner, tokens, [Variant()], watch, batch=batch, enter=lambda layer, module: watch.enter(layer, module))
        watch.finish()
    return found


def check_kernel(runner: LayerRunner) -> None:
    """Raise SurgeryError where LLMSURGEON_FFF_KERNEL forces a kernel that cannot run here."""
    # Modeling files are for checkpoints: reached by path, as formats/models.py does.
    modeling = importlib.import_module("llmsurgeon.modeling.surgeon_fff")
    try:
        modeling.choose_kernel(torch.device(runner.device), runner.dtype, modeling.activation_of(runner.model.config))
    except RuntimeError as error:
        raise SurgeryError(str(error)) from error


class _Watch:
    """Collects each wanted layer's reads and activations while the walk passes, and hands them on when it leaves."""

    def __init__(self, runner: LayerRunner, wanted: frozenset[int], sequences: int, nodes: bool, done: Any) -> None:
        self.runner, self.wanted, self.sequences, self.nodes, self.done = runner, wanted, sequences, nodes, done
        self.layer: int | None = None
        self.hooks: list[Any] = []
        self.module: Any = None

    def enter(self, layer: int, module: nn.Module) -> None:
        """The walk has loaded a layer."""
        self.finish()
        if layer not in self.wanted:
            return
        family = self.runner.family
        self.layer, self.module = layer, module
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
        if not self.nodes:
            return
        first = module.get_submodule(family.ffn_module(family.ffn_in[0]))
        self.hooks.append(
            first.register_forward_hook(
                lambda _, inputs, output: self._keep(self.branch, output.chunk(family.ffn_stacked, dim=-1)[0])
            )
        )

    def _keep(self, where: list[Tensor], tensor: Tensor) -> None:
        where.append(tensor.detach().float().flatten(0, -2).cpu())

    def __call__(self, layer: int, part: slice, variant: int, mine: Parts, base: Parts) -> None:
        if layer != self.layer:
            return
        real = self.runner.real(mine.entered)
        self._keep(self.read, self.module.ffn_input(mine.ffn_input)[real])
        entered = mine.ffn_input[real].float().cpu()
        for kept in (self.active, self.branch):
            if kept:
                kept[-1] = kept[-1][real.flatten().cpu()]
        self.behind.append(entered + self.active[-1] @ self.down.cpu() + self.bias.cpu())
        sequences = torch.arange(part.start, part.start + len(mine.entered))
        judges = (sequences % JUDGE == JUDGE - 1) | (self.sequences < JUDGE) & (sequences == self.sequences - 1)
        self.held.append(judges.repeat_interleave(real.sum(1).cpu()))

    def finish(self) -> None:
        """The walk has left the layer."""
        for hook in self.hooks:
            hook.remove()
        if self.layer is not None:
            read, active, behind = (torch.cat(kept) for kept in (self.read, self.active, self.behind))
            branch = torch.cat(self.branch) if self.branch else torch.empty(0)
            scale = (behind - behind.mean(0)).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            seen = Layer(read, active, branch, self.down.cpu(), scale, torch.cat(self.held))
            self.read, self.active, self.branch, self.behind = [], [], [], []
            self.done(self.layer, seen)
        self.layer, self.hooks = None, []


def _route(
    layer: int, seen: Layer, wanted: Sequence[FFFSpec], assignment: Assignment, min_tokens: int, dtype: torch.dtype
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
        found += _route_leaves(seen, leaf, sums[level], shapes, assignment, weight, bias, int(counts[least]))
    if not found:
        raise SurgeryError(refusal)
    return tuple(found)


def grow_tree(read: Tensor, depth: int, rounds: int = 8) -> tuple[Tensor, Tensor]:
    """Hyperplanes of a balanced tree: float32 [2^depth - 1, D] and [2^depth - 1], breadth first.

    Each node halves the tokens [n, D] that reach it by 2-means along a line: it starts as their first principal
    direction and moves to the difference of the halves' means, cut at the median, `rounds` times. A score
    (read @ w + b) of at least 0 goes right.
    """
    nodes = 2**depth - 1
    weight, bias = read.new_zeros(nodes, read.shape[1]), read.new_zeros(nodes)
    place = torch.zeros(len(read), dtype=torch.long)
    for node in range(nodes):
        mine = place == node
        tokens = read[mine]
        if len(tokens) < 2:
            continue
        centred = tokens - tokens.mean(0)
        direction = _first_direction(centred)
        for _ in range(rounds):
            score = centred @ direction
            right = score >= _middle(score)
            if right.all():
                break
            moved = centred[right].mean(0) - centred[~right].mean(0)
            direction = moved / moved.norm().clamp_min(1e-12)
        score = centred @ direction
        scale = SHARPNESS / score.std().clamp_min(1e-6)
        weight[node] = direction * scale
        bias[node] = -(_middle(score) + tokens.mean(0) @ direction) * scale
        place[mine] = 2 * node + 1 + (tokens @ weight[node] + bias[node] >= 0).long()
    return weight, bias


def _middle(score: Tensor) -> Tensor:
    """A number that as many scores [n] lie below as above."""
    count = len(score)
    ranked = score.sort().values
    return (ranked[(count - 1) // 2] + ranked[count // 2]) / 2


def _first_direction(centred: Tensor, rounds: int = 12) -> Tensor:
    """First principal direction [D], by power iteration from the token that is farthest out."""
    direction = centred[centred.square().sum(-1).argmax()].clone()
    for _ in range(rounds):
        direction = centred.T @ (centred @ direction)
        direction /= direction.norm().clamp_min(1e-12)
    return direction


def leaf_of(read: Tensor, weight: Tensor, bias: Tensor, depth: int) -> Tensor:
    """The leaf of each token, int64 [n], in the first `depth` levels of the tree."""
    node = torch.zeros(len(read), dtype=torch.long)
    scores = read @ weight[: 2**depth - 1].T + bias[: 2**depth - 1] if depth else read
    for _ in range(depth):
        node = 2 * node + 1 + (scores.gather(1, node[:, None])[:, 0] >= 0)
    return node - (2**depth - 1)


def _route_leaves(
    seen: Layer,
    leaf: Tensor,
    sums: Sequence[Sums],
    shapes: Sequence[FFFSpec],
    assignment: Assignment,
    weight: Tensor,
    bias: Tensor,
    least_tokens: int,
) -> list[Routing]:
    """Assign neurons for every shape of one depth, and measure what each costs."""
    depth = shapes[0].depth
    everyone = OTHERS * joined(sums).covariance()
    importance = torch.stack([_importance(leaf_sums, seen.down, everyone, assignment) for leaf_sums in sums])
    shares = [share_out(importance, spec.shared, spec.leaf_width) for spec in shapes]
    errors = _leaf_errors(seen, leaf, sums, everyone, shares)
    # Without decisions there are no hyperplanes.
    planes = weight[: 2**depth - 1] if depth else None, bias[: 2**depth - 1] if depth else None
    return [
        Routing(spec, neurons, shared, planes[0], planes[1], error, least_tokens)
        for spec, (shared, neurons), error in zip(shapes, shares, errors, strict=True)
    ]


@dataclass(frozen=True)
class Sums:
    """Of the activations A of a leaf's tokens: their number and sums of magnitudes [H]; with A counted from a `centre`
    [H] that lies near them, the sums of A [H] and A^T A [H, H]."""

    centre: Tensor
    count: int
    size: Tensor
    first: Tensor
    second: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean activations [H]."""
        return self.centre + self.first / max(self.count, 1)

    def covariance(self) -> Tensor:
        """Covariance [H, H] of the activations; the mean is left to the leaf's bias."""
        mean = self.first / max(self.count, 1)
        return self.second / max(self.count, 1) - mean[:, None] * mean


def joined(parts: Sequence[Sums]) -> Sums:
    """The sums over several leaves."""
    names = ("count", "size", "first", "second")
    return Sums(parts[0].centre, *(sum(getattr(part, name) for part in parts) for name in names))


def leaf_sums(active: Tensor, leaf: Tensor, depth: int) -> list[list[Sums]]:
    """The sums of each leaf of each level from 0 to `depth`, from activations [n, H] and leaves [n] at `depth`.

    Tokens are multiplied once: a leaf of a shallower tree is the two below it.
    """
    centre = active.mean(0)
    levels = [[_sums(active[leaf == k], centre) for k in range(2**depth)]]
    while len(levels[0]) > 1:
        below = levels[0]
        levels.insert(0, [joined(below[k : k + 2]) for k in range(0, len(below), 2)])
    return levels


def _sums(active: Tensor, centre: Tensor) -> Sums:
    centred = active - centre
    return Sums(centre, len(active), active.abs().sum(0), centred.sum(0), centred.T @ centred)


def _importance(leaf: Sums, down: Tensor, everyone: Tensor, assignment: Assignment) -> Tensor:
    """How much a leaf needs each neuron [H]: higher is more. Only the order counts."""
    if assignment == "activation":
        return (leaf.size * down.norm(dim=1)).argsort().argsort().float()
    return eliminate(leaf.covariance() + everyone, down)[0]


def eliminate(gram: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(when each neuron goes [H], what is lost [H + 1] once so many are gone), float32.

    Those go first that the others can best stand in for. Removing neuron i and moving the others' output rows to make
    up for it costs ||v_i||^2 / [C^-1]_ii (optimal brain surgeon, applied to neurons); rows and inverse are then brought
    up to date. A few go at a time. The loss is the mean squared change of the output, damping included.

    Args:
        gram: covariance C of the activations [H, H]; down: output rows [H, D].
    """
    count = len(gram)
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean().clamp_min(1e-12))
    inverse, rows = torch.cholesky_inverse(torch.linalg.cholesky(damped)), down.clone()
    gone = torch.zeros(count, dtype=torch.bool)
    order, lost = torch.zeros(count), torch.zeros(count + 1)
    step = max(1, int(count * AT_ONCE))
    for start in range(0, count, step):
        cost = rows.square().sum(1) / inverse.diagonal()
        cost[gone] = torch.inf
        least = cost.topk(min(step, count - start), largest=False).indices
        order[least] = torch.arange(start, start + len(least), dtype=torch.float32)
        correction = torch.linalg.solve(inverse[least][:, least], torch.cat([inverse[least], rows[least]], dim=1))
        # Of those that go together each one's part is in proportion to what it would cost alone.
        together = (rows[least] * correction[:, count:]).sum().clamp_min(0)
        alone = cost[least].cumsum(0)
        lost[start + 1 : start + 1 + len(least)] = lost[start] + together * alone / alone[-1].clamp_min(1e-30)
        touched = inverse[:, least]
        rows -= touched @ correction[:, count:]
        inverse -= touched @ correction[:, :count]
        gone[least] = True
        rows[least] = 0
        # What is gone must neither move others nor be divided by.
        inverse[least] = 0
        inverse[:, least] = 0
        inverse[least, least] = 1
    return order, lost


def share_out(importance: Tensor, shared: int, leaf_width: int) -> tuple[Tensor, Tensor]:
    """(shared [S], neurons of the leaves [L, W]) from importances [L, H]: shared are those that most leaves need."""
    always = importance.mean(0).topk(shared).indices.sort().values
    own = importance.clone()
    own[:, always] = -torch.inf
    return always, own.topk(leaf_width, dim=1).indices.sort(dim=1).values


def _leaf_errors(
    seen: Layer, leaf: Tensor, sums: Sequence[Sums], everyone: Tensor, shares: Sequence[tuple[Tensor, Tensor]]
) -> list[float]:
    """The error of `Routing` for each (shared, neurons); the shared neurons' rows are taken as free in each leaf,
    which they are not quite."""
    totals = [0.0] * len(shares)
    for k, mine in enumerate(sums):
        judge = seen.active[(leaf == k) & seen.held]
        if not len(judge):
            continue
        mean, gram = mine.mean, mine.covariance() + everyone
        target, wanted = gram @ seen.down, (judge - mean) @ seen.down
        scale = seen.scale[(leaf == k) & seen.held]
        for place, (shared, neurons) in enumerate(shares):
            kept = torch.cat([shared, neurons[k]])
            system = gram[kept][:, kept]
            system.diagonal().add_(DAMPING * system.diagonal().mean())
            rows = torch.cholesky_solve(target[kept], torch.linalg.cholesky(system))
            missing = wanted - (judge[:, kept] - mean[kept]) @ rows
            totals[place] += float((missing.square().sum(-1) / scale).sum())
    return [total / int(seen.held.sum()) for total in totals]


def _route_nodes(seen: Layer, spec: FFFSpec) -> Routing:
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


def reach_nodes(visited: Tensor, right: Tensor, nodes: Tensor, depth: int) -> None:
    """Mark in `visited` [n, H] the neurons that each token meets in one tree, `nodes` [M] breadth first.

    right: [n, H], where a neuron sends the token if it decides. A node without a neuron sends it left.
    """
    place = torch.zeros(len(visited), dtype=torch.long)
    everyone = torch.arange(len(visited))
    for _ in range(depth + 1):
        neuron = nodes[place]
        there = neuron >= 0
        visited[everyone[there], neuron[there]] = True
        place = 2 * place + 1 + (there & right[everyone, neuron.clamp_min(0)])


def plant(energy: Tensor, right: Tensor, depth: int, trees: int) -> Tensor:
    """Trees of neurons, int64 [trees, 2^(depth + 1) - 1], breadth first; -1 where no neuron is left.

    The strongest neurons stand at the roots, which every token meets, the next ones a level lower, and so on. Each
    takes, strongest first, the free place whose tokens carry most of what it does.

    Args:
        energy: squared activation times squared norm of the output row [n, H].
        right: where each neuron sends a token that meets it, [n, H].
    """
    strongest = energy.sum(0).argsort(descending=True)
    nodes = torch.full((trees, 2 ** (depth + 1) - 1), -1, dtype=torch.long)
    used = 0
    reach = torch.ones(len(energy), trees)
    for level in range(depth + 1):
        places = torch.arange(2**level - 1, 2 ** (level + 1) - 1)
        mine = strongest[used : used + trees * len(places)]
        used += len(mine)
        # reach [n, trees * places of this level]: 1 where a token comes by.
        worth = energy[:, mine].T @ reach
        free = torch.ones(worth.shape[1], dtype=torch.bool)
        for row, neuron in zip(worth, mine.tolist(), strict=True):
            best = int(row.where(free, -torch.inf).argmax())
            free[best] = False
            nodes[best // len(places), places[best % len(places)]] = neuron
        if level < depth:
            decider = nodes[:, places].flatten()
            goes = right[:, decider.clamp_min(0)].float() * (decider >= 0)
            reach = torch.stack([reach * (1 - goes), reach * goes], dim=-1).flatten(1)
    return nodes
