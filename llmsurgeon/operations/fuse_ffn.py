"""FFN Fusion (arXiv 2503.18908): a run of attention-free layers becomes one layer with one wide FFN.

    f_run(X) = X + sum_j FFN_j(norm_j(X))

Every FFN of the run reads the run's input. Stacking the input projections along the inner width and the output
projections along the other axis computes the sum in one FFN. The first layer of a run may keep its attention; its
FFN's input is then what the whole run reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from llmsurgeon.checkpoint.transform import BLOCK_NUMBERS, row_blocks
from llmsurgeon.model.families import Family
from llmsurgeon.model.layers import RunList
from llmsurgeon.model.parts import FFNSpec, Touch
from llmsurgeon.model.spec import LayerSpec
from llmsurgeon.operations.base import Computed, NewLayer, Offer, Plan, Request, Step, Subject, all_kept, assemble
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.runs import choose_runs

# Lengths of the runs that a search may fuse.
SEARCHED_RUNS = (2, 3)


def by_part(tensors: Sequence[Tensor], stacked: int) -> list[Tensor]:
    """Rows of tensors that each stack projections [gate; up], in the order in which the fused one stacks them."""
    return [tensor.chunk(stacked)[part] for part in range(stacked) for tensor in tensors]


def concatenate(dim: int, stacked: int = 1) -> Callable[..., Iterator[Tensor]]:
    """Weights of the run's FFNs side by side along their inner width, a block of rows at a time."""

    def stack(*weights: Tensor) -> Iterator[Tensor]:
        if dim == 0:
            for weight in by_part(weights, stacked):
                yield from row_blocks(weight)
            return
        whole = weights[0].is_meta
        rows = len(weights[0]) if whole else max(1, BLOCK_NUMBERS // sum(weight.shape[1] for weight in weights))
        for blocks in zip(*(weight.split(rows) for weight in weights), strict=True):
            yield torch.cat(blocks, dim=1)

    return stack


def add_biases(*biases: Tensor) -> Tensor:
    """Output biases of the run [D] add up; summed in float32, cast once."""
    return torch.stack([bias.to(_wide(bias)) for bias in biases]).sum(0).to(biases[0].dtype)


def fold_gain(weight_HD: Tensor, gain_D: Tensor) -> Tensor:
    """W diag(g): a norm's gain moved into the projection that reads it. Exact but for one cast. [H, D]."""
    if weight_HD.dtype == gain_D.dtype and weight_HD.dtype.itemsize > 1:
        # torch multiplies 16-bit numbers in float32, which holds the product: the same bits in one pass.
        return weight_HD * gain_D
    return (weight_HD.to(_wide(weight_HD)) * gain_D.to(_wide(weight_HD))).to(weight_HD.dtype)


def fold_shift(weight_HD: Tensor, bias_H: Tensor, shift_D: Tensor) -> Tensor:
    """b + W s: LayerNorm's shift moved into the projection's bias [H]."""
    wide = _wide(weight_HD)
    return (bias_H.to(wide) + weight_HD.to(wide) @ shift_D.to(wide)).to(bias_H.dtype)


def stack_folded(transposed: bool, stacked: int = 1) -> Callable[..., Iterator[Tensor]]:
    """fn(W_1 .. W_n, g_1 .. g_n) -> the run's projection with each gain folded into its own rows [sum H, D].

    One shared input has one RMS, so each layer's gain can move into its own rows. Made a block of rows at a time:
    the float32 copy never exists whole.
    """

    def stack(*tensors: Tensor) -> Iterator[Tensor]:
        weights, gains = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        if not transposed:
            for weight, gain in zip(by_part(weights, stacked), gains * stacked, strict=True):
                for layer in row_blocks(weight):
                    yield fold_gain(layer, gain)
            return
        # Conv1D stores [D, H]: the run's widths lie side by side, and a gain scales rows.
        folded = [fold_gain(weight.T, gain).T for weight, gain in zip(weights, gains, strict=True)]
        yield from concatenate(1)(*folded)

    return stack


def stack_biases(transposed: bool, biased: Sequence[bool], shifted: bool, stacked: int = 1) -> Callable[..., Tensor]:
    """fn(W_1 .. W_n, b .. of those that are `biased`, s_1 .. s_n if `shifted`) -> the run's input bias [sum H].

    Each LayerNorm's shift s is folded in; a missing bias counts as zero.
    """

    def stack(*tensors: Tensor) -> Tensor:
        n = len(biased)
        weights = [weight.T if transposed else weight for weight in tensors[:n]]
        given = iter(tensors[n : n + sum(biased)])
        biases = [next(given) if has else w.new_zeros(len(w)) for w, has in zip(weights, biased, strict=True)]
        if shifted:
            biases = [fold_shift(w, b, s) for w, b, s in zip(weights, biases, tensors[-n:], strict=True)]
        return torch.cat(by_part(biases, stacked))

    return stack


def _wide(tensor: Tensor) -> torch.dtype:
    # torch promotes no numbers of 8 bits.
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Fused(Request):
    """FFNs without attention between them will be fused in runs of at most `max_run`."""

    max_run: int


class FuseFFN(Step):
    """Fuse the FFNs of `runs`; `auto` takes the runs that the analysis finds, of at most `max_run` layers.

    norm: `fold` moves each layer's own norm into its weights and equals the parallel sum exactly;
    `last` uses the last layer's norm for all, as the paper does.
    """

    op: Literal["fuse_ffn"] = "fuse_ffn"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REWRITES_NEURONS})
    runs: RunList | Literal["auto"] = "auto"
    max_run: Annotated[int, Field(ge=2)] = 4
    max_dependency: Annotated[float, Field(gt=0)] | None = None
    norm: Literal["fold", "last"] = "fold"

    def needs(self) -> frozenset[str]:
        return frozenset({"ffn_dependency"} if self.runs == "auto" else ())

    def requests(self, subject: Subject) -> tuple[Request, ...]:
        return (*super().requests(subject), Fused("attention_order", self.max_run))

    def resolve(self, subject: Subject) -> FuseFFN:
        subject.check(self)
        if self.runs != "auto":
            return self
        dependency = subject.score("ffn_dependency", "fuse_ffn with runs: auto")
        runs = choose_runs(subject.spec, dependency, self.max_run, self.max_dependency)
        if not runs:
            raise subject.refuse(
                "fuse_ffn: no two neighbouring FFNs without attention between them; "
                "put a prune_attention step before this one"
            )
        return self.model_copy(update={"runs": runs})

    @classmethod
    def offers(cls, subject: Subject, grain: int) -> list[Offer]:
        # The model's last FFN is left alone: fusing it hurts most (section 4).
        layers = subject.spec.layers[:-1]
        offers = []
        for start in range(len(layers)):
            for run in (layers[start : start + size] for size in SEARCHED_RUNS if start + size <= len(layers)):
                if all(each.ffn and each.ffn.plain and not each.branches and len(each.parents) == 1 for each in run):
                    numbers = tuple(each.parents[0] for each in run)
                    attending = tuple(each.parents[0] for each in run[1:] if each.attention)
                    steps = (PruneAttention(layers=attending),) if attending else ()
                    offers.append(Offer(numbers, "all", f"fused {_name(numbers)}", (*steps, cls(runs=(numbers,)))))
        return offers

    @classmethod
    def merged(cls, steps: Sequence[Self]) -> list[Step]:
        return [cls(runs=tuple(sorted(run for step in steps if step.runs != "auto" for run in step.runs)))]

    @staticmethod
    def misfit(family: Family) -> str | None:
        if family.ffn_post_norm:
            return "it norms what an FFN gives before adding it, and a sum of normed outputs is not one normed output"
        return None

    def plan(self, subject: Subject) -> Plan:
        if self.runs == "auto":
            return self.resolve(subject).plan(subject)
        subject.check(self)
        positions = [self._positions(subject, run) for run in self.runs]
        seen: set[int] = set()
        for run, indices in zip(self.runs, positions, strict=True):
            if overlap := seen.intersection(indices):
                raise subject.refuse(f"fuse_ffn: runs overlap: block {min(overlap)} of {_name(run)} is in another run")
            seen.update(indices)
        layers = all_kept(subject)
        fused = {indices[0]: self._fused(subject, [layers[i] for i in indices]) for indices in positions}
        gone = {i for indices in positions for i in indices[1:]}
        return assemble(subject, [fused.get(i, layer) for i, layer in enumerate(layers) if i not in gone])

    def _positions(self, subject: Subject, run: tuple[int, ...]) -> list[int]:
        indices = list(dict.fromkeys(subject.position(number, f"fuse_ffn: run {_name(run)}: layer") for number in run))
        if len(indices) < 2:
            raise subject.refuse(f"fuse_ffn: run {_name(run)} names one block; a run needs at least two")
        if indices != list(range(indices[0], indices[-1] + 1)):
            raise subject.refuse(f"fuse_ffn: run {_name(run)} is not contiguous")
        for place, index in enumerate(indices):
            layer = subject.spec.layers[index]
            if layer.ffn is None or layer.branches:
                raise subject.refuse(f"fuse_ffn: run {_name(run)}: layer {layer.parents[0]} has no dense FFN")
            if place and layer.attention is not None:
                raise subject.refuse(
                    f"fuse_ffn: run {_name(run)} goes across the attention of layer {layer.parents[0]}; "
                    f"drop it first (prune_attention) or end the run at layer {layer.parents[0] - 1}"
                )
        return indices

    def _fused(self, subject: Subject, layers: list[NewLayer]) -> NewLayer:
        family, first = subject.family, layers[0]
        names = [{suffix: str(name) for suffix, name in layer.tensors.items()} for layer in layers]
        ffns = [layer.spec.ffn for layer in layers if layer.spec.ffn]
        # A norm that attention reads, too, stays as it is: the fused FFN gets its own.
        own = [not family.shares_norm or ffn.own_norm for ffn in ffns]
        norms = [family.ffn_norm if mine else family.attention_norm for mine in own]

        def each(suffix: str) -> tuple[str, ...]:
            return tuple(layer[suffix] for layer in names)

        def each_norm(kind: str) -> tuple[str, ...]:
            return tuple(layer[f"{norm}.{kind}"] for layer, norm in zip(names, norms, strict=True))

        gained, shifted = (f"{norms[0]}.{kind}" in names[0] for kind in ("weight", "bias"))
        fold = self.norm == "fold"
        in_dim, stacked = 1 if family.transposed else 0, family.ffn_stacked
        tensors: dict[str, str | Computed] = {}
        if first.spec.attention:
            tensors |= {suffix: name for suffix, name in first.tensors.items() if family.is_attention(suffix)}
        added_bias = False
        for projection in family.ffn_in:
            weight, bias = family.ffn_tensor(projection), family.ffn_tensor(projection, "bias")
            tensors[weight] = (
                Computed(each(weight) + each_norm("weight"), stack_folded(family.transposed, stacked))
                if fold and gained
                else Computed(each(weight), concatenate(in_dim, stacked))
            )
            biased = [bias in layer for layer in names]
            if any(biased) or (fold and shifted):
                sources = each(weight) + tuple(layer[bias] for layer in names if bias in layer)
                sources += each_norm("bias") if fold and shifted else ()
                tensors[bias] = Computed(sources, stack_biases(family.transposed, biased, fold and shifted, stacked))
                added_bias = not all(biased) or any(ffn.bias for ffn in ffns)
        down, down_bias = family.ffn_tensor(family.ffn_out), family.ffn_tensor(family.ffn_out, "bias")
        tensors[down] = Computed(each(down), concatenate(1 - in_dim))
        if down_bias in names[0]:
            tensors[down_bias] = Computed(each(down_bias), add_biases)
        for kind, present, neutral in (("weight", gained, torch.ones_like), ("bias", shifted, torch.zeros_like)):
            if present:
                last = each_norm(kind)[-1]
                tensors[f"{family.ffn_norm}.{kind}"] = Computed((last,), neutral) if fold else last
        spec = LayerSpec(
            attention=first.spec.attention,
            ffn=FFNSpec(sum(ffn.width for ffn in ffns), own_norm=family.shares_norm, bias=added_bias),
            parents=tuple(p for layer in layers for p in layer.spec.parents),
        )
        return NewLayer(spec, tensors)


def _name(run: tuple[int, ...]) -> str:
    return f"[{run[0]}-{run[-1]}]"
