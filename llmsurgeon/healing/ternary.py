"""Ternary linears whose codes compensate: layer by layer, on what each linear reads behind the ternary ones before it.

The dense student and the ternary one walk side by side. In each block, group by group in the order in which data flows
(what reads the attention's input, its output projection, what reads the FFN's input, its output projection):

    align       once something before it is ternary, a linear reads something else than it did. It is moved by ridge
                regression to give what the dense student's gave; a projection that writes the stream also makes up for
                what the stream has drifted. Linears that stay dense are moved, too.
    ternarise   codes in GPTQ's column order with error compensation, scales fitted anew (llmsurgeon/model/ternary.py).

Part of the sequences is held out and fits nothing; it chooses the ridge, and a move that does not lower the error there
is not made.

A norm that the step puts before an output projection is not there in the dense student, so the projection is aligned to
make up for it; behind the codes the norm's gain, one number for each of the projection's inputs, is fitted, too.

Shapes: S sequences, T tokens, D model width, I inputs and O outputs of a linear.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import keep, kept
from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.refit.fits import stored_names, stored_records
from llmsurgeon.healing.refit.ridge import Moments, best_update
from llmsurgeon.model.ternary import Grid, compensated, fitted_gain, is_ternary
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams


@dataclass(frozen=True)
class Ternarised:
    """What became of one linear. Errors are ||change of its output||^2 relative to the output.

    zeros: share of the codes; rounding: what plain rounding of the same weight would err.
    moved: held-out error of the alignment relative to none.
    """

    block: int
    linear: str
    error: float
    rounding: float
    zeros: float
    moved: float


@dataclass(frozen=True)
class TernaryOptions:
    """ridges: candidates for aligning, as multiples of the mean diagonal of X^T X; none: nothing is aligned."""

    grid: Grid
    ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    batch: int = 8


@dataclass(frozen=True)
class Group:
    """Linears of one block that read the same input; `writes` where what they give is added to the stream."""

    part: str
    modules: tuple[str, ...]
    writes: bool


class _Reached(Exception):
    """The forward pass has come to what was waited for."""


class Ternarise:
    """Dense and ternary student side by side over one calibration batch.

    Args:
        runner: over the dense student's weights (canonical names).
        chosen: block -> names inside it of the weights that become ternary.
        tokens: [S, T]; `held_out` [S] marks the sequences that only judge.
        store: folder in which each block's new tensors are kept as soon as they are found: a killed run goes on there.
        normed: block -> output projections inside it whose norms are new: the dense student goes without them.
    """

    def __init__(
        self,
        runner: LayerRunner,
        chosen: Mapping[int, Sequence[str]],
        tokens: Tensor,
        held_out: Tensor,
        options: TernaryOptions,
        store: Path,
        normed: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.runner, self.chosen, self.options, self.store = runner, chosen, options, store
        self.family, self.normed = runner.family, normed or {}
        # Batches hold either fitting or judging sequences, never both.
        order = torch.cat([torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()])
        self.tokens = tokens[order]
        fitting = int((~held_out).sum())
        edges = [*range(0, fitting, options.batch), *range(fitting, len(tokens), options.batch), len(tokens)]
        self.parts = [(slice(a, b), a >= fitting) for a, b in pairwise(edges)]
        self.made: list[Ternarised] = []

    def run(self) -> dict[str, Path]:
        """Block after block. Returns name -> safetensors file of every tensor that changed.

        Raises:
            SurgeryError: a weight is ternary already.
        """
        for index, names in self.chosen.items():
            for name in names:
                self._refuse_ternary(self.family.layer(index) + name)
        self.x = torch.cat([self.runner.embed(self.tokens[part]).cpu() for part, _ in self.parts])
        self.p = self.x
        found: dict[str, Path] = {}
        with torch.no_grad(), Progress("ternarise", len(self.runner.layers), "blocks") as progress:
            for index in range(len(self.runner.layers)):
                with self.runner.loaded(index) as layer:
                    if index in self.chosen or self._drifted:
                        file = self._block(index, layer)
                        found.update({self.family.layer(index) + name: file for name in stored_names(file)})
                    else:
                        self.x = self.p = self._advanced(index, self.x)
                progress.advance()
        return found

    @property
    def _drifted(self) -> bool:
        return self.x is not self.p

    def _refuse_ternary(self, name: str) -> None:
        weight = self.runner.weights[name]
        if is_ternary(weight.T if self.family.transposed else weight):
            raise SurgeryError(
                f"ternary: {name} is ternary already, and each further rounding shrinks its scale; start from the "
                "weights before, or name other layers"
            )

    def _block(self, index: int, layer: nn.Module) -> Path:
        """Ternarise one loaded layer, or take what an earlier run stored. Returns the file of its new tensors."""
        from safetensors.torch import load_file, save_file

        file = self.store / f"block-{index:04d}.safetensors"
        if kept(file):
            # The same sums in the same order as the run that stored it.
            left = self._dense(index, layer, ())[0][""]
            stored = {name: tensor.to(self.runner.dtype) for name, tensor in load_file(file).items()}
            layer.load_state_dict({**layer.state_dict(), **stored}, assign=True)
            self.x = self._left(index, self._attended(index))
            self.p = left
            self.made += [Ternarised(**entry) for entry in stored_records(file, "ternary")]
            return file
        known, before = len(self.made), layer.state_dict()
        groups = self._groups(layer)
        wanted, attended = self._dense(index, layer, groups)
        layer.load_state_dict({name: tensor.clone() for name, tensor in before.items()}, assign=True)
        left = wanted.pop("")
        behind: Tensor | None = None
        for group in groups:
            if group.part == "ffn" and behind is None:
                behind = self._attended(index)
            streams = (self.p, attended) if group.part == "attention" else (attended, left)
            self._group(index, layer, group, wanted, streams, behind)
        self.x = self._left(index, self._attended(index) if behind is None else behind)
        self.p = left
        prefix, state = self.family.layer(index), layer.state_dict()
        new = {name: t.contiguous() for name, t in state.items() if not torch.equal(t, before[name])}
        new = {name: t.to(self.runner.weights[prefix + name].dtype) for name, t in new.items()}
        records = json.dumps([vars(entry) for entry in self.made[known:]])
        keep(file, lambda path: save_file(new, path, metadata={"ternary": records}))
        return file

    def _groups(self, layer: nn.Module) -> list[Group]:
        """The block's linears in the order in which data flows."""
        family, groups = self.family, []
        inside = f"{family.attention}."
        linears = [name for name, m in layer.named_modules() if getattr(m, "weight", torch.empty(0)).dim() == 2]
        out = inside + family.attention_out
        readers = tuple(name for name in linears if name.startswith(inside) and name != out)
        if readers:
            groups += [Group("attention", readers, False), Group("attention", (out,), True)]
        ffn = tuple(name for p in family.ffn_in if (name := family.ffn_module(p)) in linears)
        if ffn and not family.experts:
            groups += [Group("ffn", ffn, False), Group("ffn", (family.ffn_module(family.ffn_out),), True)]
        return groups

    def _dense(self, index: int, layer: nn.Module, groups: Sequence[Group]) -> tuple[dict[str, Tensor], Tensor]:
        """What the dense student does here: linear -> its outputs [S, T, O], "" -> what leaves the block [S, T, D]; and
        the stream behind its attention."""
        seen: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Any:
            return lambda module, inputs, output: seen.setdefault(name, []).append(output.cpu())

        names = [name for group in groups for name in group.modules] if self.options.ridges else []
        hooks = [layer.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        left, attended = torch.empty_like(self.p), torch.empty_like(self.p)
        try:
            with self._without_norms(index, layer):
                for part, _ in self.parts:
                    hidden = self.p[part].to(self.runner.device)
                    attention = self.runner.attend(index, hidden)
                    middle = hidden if attention is None else hidden + attention
                    ffn = self.runner.feed_forward(index, hidden if self.runner.parallel_residual else middle)
                    attended[part], left[part] = middle.cpu(), (middle if ffn is None else middle + ffn).cpu()
        finally:
            for hook in hooks:
                hook.remove()
        return {"": left, **{name: torch.cat(outputs) for name, outputs in seen.items()}}, attended

    def _norm(self, layer: nn.Module, path: str) -> Any:
        """The norm before an output projection."""
        return layer.get_submodule(self.family.sub_norms[path][1])

    @contextmanager
    def _without_norms(self, index: int, layer: nn.Module) -> Iterator[None]:
        """The layer as the dense student has it."""
        norms = [self._norm(layer, path) for path in self.normed.get(index, ())]
        for norm in norms:
            norm.forward = _as_it_is
        try:
            yield
        finally:
            for norm in norms:
                del norm.forward

    def _group(
        self,
        index: int,
        layer: Any,
        group: Group,
        wanted: dict[str, Tensor],
        streams: tuple[Tensor, Tensor],
        behind: Tensor | None,
    ) -> None:
        """Align and ternarise linears that read one input.

        `streams`: the dense student's before and behind this part of the block; `behind`: the ternary one's behind its
        attention, where that is known.
        """
        chosen = [name for name in group.modules if f"{name}.weight" in self.chosen.get(index, ())]
        # An earlier group of this block may have made a difference, too.
        new_norm = any(name in self.normed.get(index, ()) for name in group.modules)
        drifted = self._drifted or new_norm or any(entry.block == index for entry in self.made)
        aligns = drifted and bool(self.options.ridges)
        if not chosen and not aligns:
            return
        mine = self.x if behind is None else behind
        drift = self._drift(layer, group, streams[0], mine)
        weights = token_weights(streams[1]) if group.writes else None
        moments, modules = Moments(), [layer.get_submodule(name) for name in group.modules]
        for part, held in self.parts:
            if held and not aligns:
                continue  # nothing is judged
            features = self._read(index, layer, group, part, mine)
            residual = features.new_zeros(len(features), 0)
            if aligns:
                missing = [
                    # Not by a call: a norm before it has been at the features already.
                    wanted[name][part].to(features.device).float().flatten(0, -2) - module.forward(features).float()
                    for name, module in zip(group.modules, modules, strict=True)
                ]
                residual = torch.cat(missing, dim=1)
                if drift is not None:
                    residual = residual + drift[part].to(features.device).float().flatten(0, 1)
            if weights is not None:
                each = weights[part].to(features.device).reshape(-1, 1)
                features, residual = features.float() * each, residual * each
            moments.add(features, residual, held)
        moments.complete()
        update, _, moved = best_update(moments, self.options.ridges) if aligns else (None, None, 1.0)
        gram = moments.gram[0]
        moments.gram[1] = gram.new_empty(0)  # it has judged, and what follows takes several of its size
        sizes = [self._weight(module).shape[0] for module in modules]
        updates = update.T.split(sizes) if update is not None else [None] * len(sizes)
        for name, module, change in zip(group.modules, modules, updates, strict=True):
            weight = self._weight(module)
            if change is not None:
                weight.copy_((weight.float() + change).to(weight.dtype))
            if name in chosen:
                stored = self.runner.weights[f"{self.family.layer(index)}{name}.weight"].dtype
                made, error, rounding = compensated(weight, gram, self.options.grid, stored)
                if new_norm:
                    gain = self._norm(layer, name).weight.data
                    factors, error = fitted_gain(weight, made, gram, error)
                    gain.copy_((gain.float() * factors).to(gain.dtype))
                weight.copy_(made)
                zeros = float((made == 0).float().mean())
                self.made.append(Ternarised(index, name, error, rounding, zeros, moved))

    def _drift(self, layer: Any, group: Group, dense: Tensor, mine: Tensor) -> Tensor | None:
        """What a projection that writes the stream is to make up for, before the factor on it, [S, T, D]."""
        family = self.family
        post_norm = family.attention_post_norm if group.part == "attention" else family.ffn_post_norm
        if not group.writes or post_norm or dense is mine:
            return None
        return (dense.float() - mine.float()) / float(layer.residual_multiplier)

    def _read(self, index: int, layer: nn.Module, group: Group, part: slice, mine: Tensor) -> Tensor:
        """What the group's linears read of some sequences, [n, I]."""
        seen: list[Tensor] = []

        def reached(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0].detach().flatten(0, -2))
            raise _Reached

        hooks = [layer.get_submodule(name).register_forward_pre_hook(reached) for name in group.modules]
        try:
            if group.part == "attention":
                self.runner.attend(index, self.x[part].to(self.runner.device))
            else:
                read = self.x if self.runner.parallel_residual else mine
                self.runner.feed_forward(index, read[part].to(self.runner.device))
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return seen[0]

    def _weight(self, module: Any) -> Tensor:
        """A linear's weight as a view [O, I]."""
        weight: Tensor = module.weight.data
        return weight.T if self.family.transposed else weight

    def _attended(self, index: int) -> Tensor:
        """The ternary student's stream behind the loaded block's attention."""
        attended = self.x.clone()
        for part, _ in self.parts:
            contribution = self.runner.attend(index, self.x[part].to(self.runner.device))
            if contribution is not None:
                attended[part] += contribution.cpu()
        return attended

    def _left(self, index: int, attended: Tensor) -> Tensor:
        """The ternary student's stream behind the loaded block."""
        left = attended.clone()
        for part, _ in self.parts:
            read = self.x if self.runner.parallel_residual else attended
            ffn = self.runner.feed_forward(index, read[part].to(self.runner.device))
            if ffn is not None:
                left[part] += ffn.cpu()
        return left

    def _advanced(self, index: int, stream: Tensor) -> Tensor:
        """A stream behind the loaded block."""
        left = Streams(1, tuple(stream.shape), stream.dtype).data[0]
        for part, _ in self.parts:
            left[part] = self.runner.whole(index, stream[part].to(self.runner.device)).cpu()
        return left


def token_weights(stream: Tensor) -> Tensor:
    """What each token's row counts in a fit of what is added to `stream` [S, T, D]: [S, T], at most 1.

    Norms see tokens relative to their size, and a window's first token may be a hundred times as large as the others
    (massive activations, arXiv 2402.17762): squared errors of a few such tokens would decide the fit of all. Tokens
    larger than the median count as that one does.
    """
    sizes = stream.float().norm(dim=-1)
    return (sizes.median() / sizes).clamp(max=1)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def summary(made: Sequence[Ternarised]) -> str:
    """One line for the model card."""
    mean = sum(entry.error for entry in made) / len(made)
    rounding = sum(entry.rounding for entry in made) / len(made)
    zeros = sum(entry.zeros for entry in made) / len(made)
    return (
        f"Ternarised {len(made)} linears, codes and scales fitted to calibration text: their outputs err by {mean:.3f} "
        f"of their size (squared; rounding {rounding:.3f}), {100 * zeros:.0f} % of the codes are 0."
    )
