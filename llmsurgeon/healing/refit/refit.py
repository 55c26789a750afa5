"""Closed-form healing: after a cut, fit projections of the student to the parent's hidden states by ridge regression.

No gradients: parent and student walk side by side, layer by layer, over calibration text. The fits for a block:

    join    the attention that a changed block keeps takes over what it can of the work of those that went: its output
            projection is regressed on what is missing to the parent's state, next to the outputs of the block's FFNs
            (which are refitted on their own, later).
    align   what a projection reads has drifted from what it read in the parent. The linear map I + M that brings the
            student's normed inputs nearest to the parent's is folded into the weights that read them: W <- W (I + M).
    mixer   an MLGRU in the place of an attention: its output projection is fitted to what the attention added, from the
            gated states that it reads.
    refit   the output projection W_o is moved to W_o + dW so that the block's output meets the parent's hidden state
            after the same span: dW = argmin ||A (W_o + dW)^T - Y||^2 + ridge * mean(diag(A^T A)) ||dW||^2.

Ternary weights (llmsurgeon/model/ternary.py) stay as they are; they count as a change that the others make up for.
Inputs are always the student's own, so errors of earlier blocks are corrected by later ones. Part of the calibration
sequences is held out: it chooses the ridge, and an update that does not lower its error there is not made.

Shapes: S sequences, T tokens, D model width, F features (FFN width, or heads * head_dim), O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmsurgeon.checkpoint.kept import keep, kept
from llmsurgeon.healing.refit.fits import Fit, stored_fits, stored_names
from llmsurgeon.healing.refit.output import Outlet
from llmsurgeon.healing.refit.ridge import Moments, best_update, joint_update
from llmsurgeon.model.parts import FFFSpec, MLGRUSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec
from llmsurgeon.model.ternary import is_ternary
from llmsurgeon.progress import Progress
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams

# An MLGRU's output projection was made for other inputs: there is little in it that a ridge should hold on to.
MIXER_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)


@dataclass(frozen=True)
class RefitOptions:
    """ridges: candidates, as multiples of the mean diagonal of the Gram matrix; the other ridges likewise."""

    ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    align: bool = True
    align_ridge: float = 0.03
    join: bool = True
    join_ridge: float = 0.3
    batch: int = 8


def spans(spec: ModelSpec, parent_layers: int) -> list[tuple[int, ...]]:
    """The parent layers whose joint work each block of the student does: removed layers go to the block before them."""
    first = [min(layer.parents) for layer in spec.layers]
    ends = [*first[1:], parent_layers]
    starts = [0, *first[1:]]
    return [tuple(range(start, end)) for start, end in zip(starts, ends, strict=True)]


def changed(layer: LayerSpec, span: tuple[int, ...], parent: ModelSpec) -> bool:
    """True where the block is not simply the parent's layer."""
    return len(span) != 1 or (layer.attention, layer.ffn, layer.branches) != (
        parent.layers[span[0]].attention,
        parent.layers[span[0]].ffn,
        (),
    )


def holds_ternary(layer: nn.Module, transposed: bool) -> bool:
    """True where some linear of a loaded layer is ternary."""
    return any(is_ternary(weight.T if transposed and weight.dim() == 2 else weight) for weight in layer.parameters())


class Refit:
    """Parent and student side by side over one calibration batch.

    Args:
        parent, student: runners over their weights (canonical names).
        spec: the student's; its blocks name the parent layers they stand for.
        tokens: [S, T]; `held_out` [S] marks the sequences that only judge.
        store: folder in which each block's new tensors are kept as soon as they are found: a killed run goes on there.
    """

    def __init__(
        self,
        parent: LayerRunner,
        student: LayerRunner,
        parent_spec: ModelSpec,
        spec: ModelSpec,
        tokens: Tensor,
        held_out: Tensor,
        options: RefitOptions,
        store: Path,
    ) -> None:
        self.parent, self.student, self.spec, self.parent_spec = parent, student, spec, parent_spec
        self.options, self.store, self.family = options, store, student.family
        # Batches hold either fitting or judging sequences, never both.
        order = torch.cat([torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()])
        self.tokens = tokens[order]
        fitting = int((~held_out).sum())
        edges = [*range(0, fitting, options.batch), *range(fitting, len(tokens), options.batch), len(tokens)]
        self.parts = [(slice(a, b), a >= fitting) for a, b in pairwise(edges)]
        self.real = torch.ones(tokens.shape, dtype=torch.bool)
        self.fits: list[Fit] = []

    def _tokens(self, part: slice, values: Tensor) -> Tensor:
        """Values [s, T, *] or [s * T, *] of a part's sequences as [n, *], without padding."""
        rows = values.reshape(self.real[part].numel(), -1)
        # Without padding nothing is picked out: the widest features of a batch are not copied.
        return rows if self.parent.padding is None else rows[self.real[part].flatten().to(values.device)]

    def run(self) -> dict[str, Path]:
        """Fit block after block. Returns name -> safetensors file of every tensor that changed."""
        for part, _ in self.parts:
            self.real[part] = self.parent.real(self.parent.embed(self.tokens[part])).cpu()
        self.x = torch.cat([self.student.embed(self.tokens[part]).cpu() for part, _ in self.parts])
        self.p = self.x.clone()
        self.sums = torch.empty_like(self.x) if self.family.post_norm else self.p
        found: dict[str, Path] = {}
        drifted = False
        todo = spans(self.spec, len(self.parent.layers))
        with torch.no_grad(), Progress("refit", len(todo), "blocks") as progress:
            for index, (block, span) in enumerate(zip(self.spec.layers, todo, strict=True)):
                with self.student.loaded(index) as layer:
                    is_changed = changed(block, span, self.parent_spec) or holds_ternary(layer, self.family.transposed)
                    attended = None
                    if is_changed or drifted:
                        file, attended = self._fitted(index, block, span, layer, is_changed, drifted)
                        found.update({self.family.layer(index) + name: file for name in stored_names(file)})
                    else:
                        self._walk_parent(span)
                    self._advance(index, attended)
                drifted = drifted or is_changed
                progress.advance()
        return found

    def _fitted(
        self, index: int, block: LayerSpec, span: tuple[int, ...], layer: nn.Module, is_changed: bool, drifted: bool
    ) -> tuple[Path, Tensor | None]:
        """Fit one loaded layer, or take the fit that an earlier run stored.

        Returns the file of its new tensors, and the stream behind its attention where that is known.
        """
        from safetensors.torch import load_file, save_file

        file = self.store / f"block-{index:04d}.safetensors"
        if kept(file):
            self._walk_parent(span)
            layer.load_state_dict({**layer.state_dict(), **load_file(file)}, assign=True)
            self.fits += stored_fits(file)
            # The same sums in the same order as the run that stored it.
            moved = block.branches or (is_changed and block.ffn is None)
            return file, None if moved else self._attended(index)
        known, before = len(self.fits), layer.state_dict()
        # The loaded tensors may be views of the checkpoint on disk: work on copies.
        layer.load_state_dict({name: tensor.clone() for name, tensor in before.items()}, assign=True)
        attended = None
        if block.branches:
            self._walk_parent(span)
        else:
            attended = self._fit(index, block, span, layer, is_changed, drifted)
        new = {name: t.contiguous() for name, t in layer.state_dict().items() if not torch.equal(t, before[name])}
        fits = json.dumps([vars(fit) for fit in self.fits[known:]])
        keep(file, lambda path: save_file(new, path, metadata={"fits": fits}))
        return file, attended

    def _advance(self, index: int, attended: Tensor | None) -> None:
        """Take the student's stream through the loaded layer; `attended`, where given, is behind its attention."""
        for part, _ in self.parts:
            entered = self.x[part].to(self.student.device)
            if attended is None:
                self.x[part] = self.student.whole(index, entered).cpu()
                continue
            middle = attended[part].to(self.student.device)
            ffn = self.student.feed_forward(index, entered if self.student.parallel_residual else middle)
            self.x[part] = (middle if ffn is None else middle + ffn).cpu()

    def _walk_parent(self, span: tuple[int, ...]) -> Tensor:
        """Take the parent's stream over a span. Returns what each of its FFNs read, [layers of the span, S, T, D]."""
        read = Streams(len(span), tuple(self.p.shape), self.p.dtype).data
        for place, layer in enumerate(span):
            with self.parent.loaded(layer) as module, self._watched_sum(module) as summed:
                for part, _ in self.parts:
                    hidden = self.p[part].to(self.parent.device)
                    attention = self.parent.attend(layer, hidden)
                    attended = hidden if attention is None else hidden + attention
                    ffn_input = hidden if self.parent.parallel_residual else attended
                    read[place, part] = ffn_input.cpu()
                    ffn = self.parent.feed_forward(layer, ffn_input)
                    self.p[part] = (attended if ffn is None else attended + ffn).cpu()
                    if summed:
                        self.sums[part] = summed.pop().cpu()
        return read

    @contextmanager
    def _watched_sum(self, layer: nn.Module) -> Iterator[list[Tensor]]:
        """What the norm behind a post-norm layer's FFN reads, call after call; nothing where no fit needs it."""
        seen: list[Tensor] = []
        if not self.family.post_norm or not any(isinstance(block.ffn, FFFSpec) for block in self.spec.layers):
            yield seen
            return
        norm = layer.get_submodule(self.family.ffn_norm)
        hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def _fit(
        self,
        index: int,
        block: LayerSpec,
        span: tuple[int, ...],
        layer: Any,
        is_changed: bool,
        drifted: bool,
    ) -> Tensor | None:
        if self.options.align and block.attention is not None and drifted and (own := self._attention_readers(layer)):
            moments = Moments()
            for part, held in self.parts:
                self._add_drift(moments, layer.attention_input, part, held, self.x, self.p)
            self._align(index, block, "attention input", moments, own)
        parent_read = self._walk_parent(span)
        # A tree's decisions move with what it reads: attention may only bring that nearer to what the parent read.
        trees = isinstance(block.ffn, FFFSpec)
        joins = self.options.join and is_changed and not self.family.post_norm and not trees
        joins = joins and not self._is_ternary(layer, f"{self.family.attention}.{self.family.attention_out}")
        if isinstance(block.attention, MLGRUSpec) and is_changed:
            attended = self._fit_mixer(index, block, layer, parent_read[span.index(block.parents[0])])
        elif joins and block.attention is not None and block.ffn is not None:
            attended = self._join(index, block, layer)
        else:
            attended = self._attended(index)
        if trees:
            if self.options.align and drifted and block.attention is not None:
                attended = self._refit_attention(index, block, layer, attended, parent_read[-1])
            self._fit_trees(index, block, layer, attended, parent_read[-1], drifted)
            if self.family.post_norm:
                self._refit_norm(index, block, layer, attended)
            return attended
        if self.options.align and block.ffn is not None and not self.family.experts:
            read = self.x if self.student.parallel_residual else attended
            for parent in block.parents:
                rows = self._rows(block, parent)
                readers = self._ffn_readers(layer, rows) if rows else []
                if readers and (drifted or parent != block.parents[0]):
                    moments = Moments()
                    for part, held in self.parts:
                        theirs = parent_read[span.index(parent)]
                        self._add_drift(moments, layer.ffn_input, part, held, read, theirs)
                    self._align(index, block, f"ffn input of layer {parent}", moments, readers)
        if is_changed and self.family.post_norm:
            self._refit_norm(index, block, layer, attended)
        if is_changed and self._has_linear_end(block) and not self._ends_ternary(block, layer):
            self._refit_output(index, block, layer, attended)
        # Without an FFN it was attention's own output that moved.
        return None if is_changed and block.ffn is None else attended

    def _fit_trees(
        self, index: int, block: LayerSpec, layer: Any, attended: Tensor, parent_read: Tensor, drifted: bool
    ) -> None:
        """Fit a fast feedforward network to what the parent's sum of stream and FFN was, before any norm behind it."""
        from llmsurgeon.healing.refit.trees import fit_leaves, fit_nodes, readers

        module = layer.get_submodule(self.family.fast_ffn)
        stream = self.x if self.student.parallel_residual else attended
        if self.options.align and drifted:
            moments = Moments()
            for part, held in self.parts:
                self._add_drift(moments, layer.ffn_input, part, held, stream, parent_read)
            self._align(index, block, f"ffn input of layer {block.parents[0]}", moments, readers(module))
        read, missing, judges = [], [], []
        for part, held in self.parts:
            inputs = self._tokens(part, layer.ffn_input(stream[part].to(self.student.device)))
            summed = self.sums if self.family.post_norm else self.p
            wanted = self._tokens(part, summed[part].to(self.student.device)).float()
            start = self._tokens(part, attended[part].to(self.student.device)).float()
            read.append(inputs)
            missing.append((wanted - start) / layer.residual_multiplier - module(inputs).float())
            judges.append(torch.full((len(inputs),), held))
        fit = fit_leaves if isinstance(block.ffn, FFFSpec) and block.ffn.form == "leaf" else fit_nodes
        ridge, error = fit(module, torch.cat(read), torch.cat(missing), torch.cat(judges), self.options.ridges)
        self.fits.append(Fit(index, block.parents, self.family.fast_ffn, ridge, error))

    def _fit_mixer(self, index: int, block: LayerSpec, layer: nn.Module, wanted: Tensor) -> Tensor:
        """Fit an MLGRU's output projection so that the stream behind it meets the parent's behind its attention.

        wanted: that stream, [S, T, D]. Returns the student's behind the moved projection.
        """
        device, outlet = self.student.device, self._outlet(layer, "attention")
        moments = Moments()
        states: list[Tensor] = []
        for part, held in self.parts:
            entered = self.x[part].to(device)
            contribution = self.student.attend(index, entered)
            assert contribution is not None
            states.append(outlet.read.cpu())
            missing = wanted[part].to(device).float() - (entered + contribution).float()
            moments.add(outlet.features(), missing.flatten(0, 1), held)
        outlet.close()
        update, ridge, error = best_update(moments.complete(), MIXER_RIDGES)
        self.fits.append(Fit(index, block.parents, outlet.name, ridge, error))
        if update is not None:
            outlet.move(update)
        stream = torch.empty_like(self.x)
        for (part, _), read in zip(self.parts, states, strict=True):
            stream[part] = (self.x[part].to(device) + outlet.contribution(read.to(device))).cpu()
        return stream

    def _refit_attention(
        self, index: int, block: LayerSpec, layer: Any, attended: Tensor, parent_attended: Tensor
    ) -> Tensor:
        """Move the attention's output projection so that the stream behind it comes nearest to the parent's there.

        Returns the student's stream behind the moved attention, [S, T, D]; the given one where the parent has none to
        hold against, or where the held-out error does not fall.
        """
        if self.student.parallel_residual:
            return attended
        outlet = self._outlet(layer, "attention")
        moments = Moments()
        for part, held in self.parts:
            self.student.attend(index, self.x[part].to(self.student.device))
            missing = (parent_attended[part].float() - attended[part].float()).to(self.student.device)
            moments.add(self._tokens(part, outlet.features()), self._tokens(part, missing), held)
        outlet.close()

        def left(reached: Tensor) -> float:
            judged = torch.cat([torch.arange(part.start, part.stop) for part, held in self.parts if held])
            return (reached[judged].float() - parent_attended[judged].float()).square().sum().item()

        update, ridge, error = best_update(moments.complete(), self.options.ridges)
        if update is not None:
            before = [kept.clone() for kept in outlet.tensors()]
            outlet.move(update)
            moved = self._attended(index)
            # Behind a norm the moments promise what holds for small updates: see what this one does.
            error = left(moved) / left(attended)
            if error < 1:
                attended = moved
            else:
                for tensor, kept in zip(outlet.tensors(), before, strict=True):
                    tensor.copy_(kept)
                ridge, error = None, 1.0
        self.fits.append(Fit(index, block.parents, outlet.name, ridge, error))
        return attended

    def _join(self, index: int, block: LayerSpec, layer: nn.Module) -> Tensor:
        """Move the attention's output projection towards what the whole span did in the parent.

        Returns the student's stream behind the moved attention, [S, T, D].
        """
        device = self.student.device
        outlet = self._outlet(layer, "attention")
        # A mixture of experts has no one projection: its output counts as one group.
        down = None if self.family.experts else self._outlet(layer, "ffn")
        columns = down.weight.float() if down else torch.empty(0)
        # Channels that no parent can be told to own count as one FFN.
        rows = [r for parent in block.parents if (r := self._rows(block, parent))] or [slice(None)]
        moments = Moments()
        groups: list[int] = []
        stream = torch.empty_like(self.x)
        heads_read: list[Tensor] = []
        for part, held in self.parts:
            entered = self.x[part].to(device)
            contribution = self.student.attend(index, entered)
            assert contribution is not None
            attended = entered + contribution
            ffn = self.student.feed_forward(index, entered if self.student.parallel_residual else attended)
            stream[part] = attended.cpu()
            heads_read.append(outlet.read.cpu())
            heads = outlet.features()
            assert ffn is not None
            if down is None or down.gain is not None:
                outputs = [ffn.float().flatten(0, 1)]
            else:
                inner = down.read.float().flatten(0, 1)
                outputs = [inner[:, r] @ columns[:, r].T * down.factor for r in rows]
            groups = [heads.shape[1], *(output.shape[1] for output in outputs)]
            missing = self.p[part].to(device).float() - attended.float() - ffn.float()
            features = torch.cat([heads, *outputs], dim=1)
            moments.add(self._tokens(part, features), self._tokens(part, missing), held)
        outlet.close()
        if down:
            down.close()
        update, error = joint_update(moments.complete(), self.options.join_ridge, groups)
        ridge = None if update is None else self.options.join_ridge
        self.fits.append(Fit(index, block.parents, outlet.name, ridge, error))
        if update is not None:
            outlet.move(update)
            # Only the projection moved: no second pass through attention. Bit for bit what a resumed run computes.
            for (part, _), heads in zip(self.parts, heads_read, strict=True):
                stream[part] = (self.x[part].to(device) + outlet.contribution(heads.to(device))).cpu()
        return stream

    def _has_linear_end(self, layer: LayerSpec) -> bool:
        """True where the block ends in a projection that a linear fit can move.

        Not so a mixture of experts, and an attention without FFN whose output goes through two norms.
        """
        if layer.ffn is not None:
            return self.family.experts is None
        return not self.family.post_norm

    def _ends_ternary(self, block: LayerSpec, layer: nn.Module) -> bool:
        """True where the block's last projection is ternary, which no update may move."""
        family = self.family
        end = f"{family.attention}.{family.attention_out}" if block.ffn is None else family.ffn_module(family.ffn_out)
        return self._is_ternary(layer, end)

    def _is_ternary(self, layer: nn.Module, name: str) -> bool:
        """True where a linear's weight is ternary."""
        weight = getattr(dict(layer.named_modules()).get(name), "weight", None)
        return weight is not None and is_ternary(weight.T if self.family.transposed else weight)

    def _refit_norm(self, index: int, block: LayerSpec, layer: nn.Module, attended: Tensor) -> None:
        """Give the norm that ends the block the gain and shift that bring each channel nearest to the parent's.

        Where blocks went, the parent's span ends in another block's norm; where trees came, some channels are surer
        than others.
        """
        norm: Any = layer.get_submodule(self.family.ffn_norm)
        gain, shift = norm.weight.data, norm.bias.data
        seen: list[Tensor] = []
        hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        # Per channel, of tokens that fit and that judge: sums of 1, z, z z, p, z p, p p (z normed, p wanted).
        sums = torch.zeros(2, 6, len(gain), dtype=torch.float64)
        for part, held in self.parts:
            self.student.feed_forward(index, attended[part].to(self.student.device))
            z = self._tokens(part, F.layer_norm(seen.pop().float(), gain.shape, eps=norm.eps))
            p = self._tokens(part, self.p[part].to(z.device).float())
            terms = (torch.ones_like(z), z, z * z, p, z * p, p * p)
            sums[int(held)] += torch.stack([term.sum(0) for term in terms]).double().cpu()
        hook.remove()
        n, z, zz, p, zp, _ = sums[0]
        new_gain = (n * zp - z * p) / (n * zz - z * z).clamp_min(torch.finfo(torch.float32).tiny)
        new_shift = (p - new_gain * z) / n

        def error(g: Tensor, s: Tensor) -> float:
            n, z, zz, p, zp, pp = sums[1]
            return float((pp - 2 * g * zp - 2 * s * p + g * g * zz + 2 * g * s * z + n * s * s).sum())

        ratio = error(new_gain, new_shift) / max(error(gain.double().cpu(), shift.double().cpu()), 1e-30)
        accepted = ratio < 1
        self.fits.append(Fit(index, block.parents, self.family.ffn_norm, 0.0 if accepted else None, min(ratio, 1.0)))
        if accepted:
            gain.copy_(new_gain.to(gain))
            shift.copy_(new_shift.to(shift))

    def _outlet(self, layer: nn.Module, part: Literal["attention", "ffn"]) -> Outlet:
        family = self.family
        name, post_norm = (
            (f"{family.attention}.{family.attention_out}", family.attention_post_norm)
            if part == "attention"
            else (family.ffn_module(family.ffn_out), family.ffn_post_norm)
        )
        outer = (family.attention_norm if part == "attention" else family.ffn_norm) if family.post_norm else ""
        return Outlet(layer, name, post_norm, family.transposed, outer)

    def _rows(self, layer: LayerSpec, parent: int) -> slice | None:
        """The rows of a fused FFN that came from one parent: each read its own input there.

        None where they cannot be told, because widths were cut before or after fusing.
        """
        if len(layer.parents) == 1:
            return slice(None)
        widths = [ffn.width if (ffn := self.parent_spec.layers[p].ffn) else 0 for p in layer.parents]
        if layer.ffn is None or sum(widths) != layer.ffn.width:
            return None
        start = sum(widths[: layer.parents.index(parent)])
        return slice(start, start + widths[layer.parents.index(parent)])

    def _attended(self, index: int) -> Tensor:
        """The student's stream behind the block's attention, [S, T, D]."""
        attended = self.x.clone()
        for part, _ in self.parts:
            contribution = self.student.attend(index, self.x[part].to(self.student.device))
            if contribution is not None:
                attended[part] += contribution.cpu()
        return attended

    def _attention_readers(self, layer: nn.Module) -> list[Tensor]:
        """Weights [O, D] that read the attention norm's output, as views."""
        attention = getattr(layer, self.family.attention)
        weights = [
            module.weight.data.T if self.family.transposed else module.weight.data
            for name, module in attention.named_modules()
            if name != self.family.attention_out and getattr(module, "weight", torch.empty(0)).dim() == 2
        ]
        return [weight for weight in weights if not is_ternary(weight)]

    def _ffn_readers(self, layer: nn.Module, rows: slice) -> list[Tensor]:
        """Rows [rows, D] of the weights that read the FFN norm's output, as views."""
        family = self.family
        weights: list[Any] = [layer.get_submodule(family.ffn_module(name)).weight for name in family.ffn_in]
        oriented = [weight.data.T if family.transposed else weight.data for weight in weights]
        oriented = [weight for weight in oriented if not is_ternary(weight)]
        return [part[rows] for weight in oriented for part in weight.chunk(family.ffn_stacked)]

    def _add_drift(
        self, moments: Moments, norm: Callable[[Tensor], Tensor], part: slice, held: bool, mine: Tensor, theirs: Tensor
    ) -> None:
        """What the student reads, against what the parent read, both behind the student's norm."""
        own = norm(mine[part].to(self.student.device)).float()
        wanted = norm(theirs[part].to(self.student.device)).float()
        moments.add(self._tokens(part, own), self._tokens(part, wanted - own), held)

    def _align(self, index: int, layer: LayerSpec, what: str, moments: Moments, readers: Sequence[Tensor]) -> None:
        update, ridge, error = best_update(moments.complete(), (self.options.align_ridge,))
        self.fits.append(Fit(index, layer.parents, what, ridge, error))
        if update is not None:
            for weight in readers:
                wide = weight.float()
                weight.copy_((wide + wide @ update.T).to(weight.dtype))

    def _refit_output(self, index: int, block: LayerSpec, layer: nn.Module, attended: Tensor) -> None:
        """Move the block's last projection so that the block ends where the parent's span ended."""
        if block.ffn is not None:
            outlet = self._outlet(layer, "ffn")
            read, start = self.x if self.student.parallel_residual else attended, attended
        else:
            outlet, read, start = self._outlet(layer, "attention"), self.x, self.x
        compute: Any = self.student.attend if block.ffn is None else self.student.feed_forward

        def residual(part: slice) -> Tensor:
            contribution = compute(index, read[part].to(self.student.device)).float()
            reached = start[part].to(self.student.device).float() + contribution
            return (self.p[part].to(self.student.device).float() - reached).flatten(0, 1)

        moments = Moments()
        for part, held in self.parts:
            missing = residual(part)
            moments.add(self._tokens(part, outlet.features()), self._tokens(part, missing), held)
        update, ridge, error = best_update(moments.complete(), self.options.ridges)
        if update is not None:
            before = [kept.clone() for kept in outlet.tensors()]
            outlet.move(update)
            if outlet.gain is not None:
                # Behind a post-norm the moments promise what holds for small updates: see what this one does.
                left = sum(residual(part).square().sum().item() for part, held in self.parts if held)
                error = left / moments.square[1]
                if not error < 1:
                    for tensor, kept in zip(outlet.tensors(), before, strict=True):
                        tensor.copy_(kept)
                    ridge, error = None, 1.0
        outlet.close()
        self.fits.append(Fit(index, block.parents, outlet.name, ridge, error))
