"""Token mixers without a context to search: attentions become MLGRUs (MatMul-free LM, arXiv 2406.02528).

    f_t = lb + (1 - lb) sigmoid(W_f x_t)
    h_t = f_t h_(t-1) + (1 - f_t) SiLU(W_i x_t)
    o_t = W_o (sigmoid(W_g x_t) h_t)

The paper trains such models from scratch. Here W_i starts as the value projection (key/value heads repeated for the
query heads that share them), W_g as the query projection, W_o as the output projection and W_f as the key projection,
with a bias that spreads the channels' memories from one token to the whole context. The plan only picks and scales rows
of weights; what such a start is worth shows once `refit` has fitted W_o to what attention gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmsurgeon.model.families import Family
from llmsurgeon.model.layers import LayerList
from llmsurgeon.model.parts import AttentionSpec, BitFFNSpec, MLGRUSpec, Touch
from llmsurgeon.operations.base import Computed, NewLayer, Plan, Step, Subject, all_kept, assemble
from llmsurgeon.operations.prune_attention import RANKINGS

# Of models whose config names no length.
CONTEXT = 2048
# Memories are context^(u^SKEW) tokens long, u evenly from 0 to 1: most of what attention does is near by.
SKEW = 2.0
# Where the lower bounds of the forget gates begin; below what any channel but the shortest keeps.
LOWER_BOUND = 0.02


class MatMulFree(Step):
    """Turn attentions into MLGRUs, whose state has one size whatever the context.

    layers: which attentions; all by default.
    keep_attention: or all but these.
    count: or so many, those whose removal costs least by `score`: `kl` or `similarity`.
    linears: `float`, or `ternary`: projections of the mixers and of their layers' FFNs become BitLinears. Where a layer
        has an MLGRU with float linears already, these become ternary.
    context: tokens that the slowest channels remember; by default the attention's window or the model's positions.
    """

    op: Literal["matmulfree"] = "matmulfree"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.REPLACES_ATTENTION})
    layers: LayerList | None = None
    keep_attention: LayerList | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    score: Literal["kl", "similarity"] = "kl"
    linears: Literal["float", "ternary"] = "float"
    context: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> MatMulFree:
        if sum(value is not None for value in (self.layers, self.keep_attention, self.count)) > 1:
            raise ValueError("matmulfree takes one of layers, keep_attention and count, or none of them for all layers")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset() if self.count is None else frozenset({RANKINGS[self.score].score})

    def resolve(self, subject: Subject) -> Step:
        subject.check(self)
        if self.layers is not None:
            return self
        if self.count is not None:
            layers = RANKINGS[self.score].first(subject, self._open_to(subject), self.count, self.op)
        else:
            kept = self.keep_attention or ()
            for layer in kept:
                self._attention(subject, layer, "keep_attention: layer")
            layers = tuple(layer for layer in self._open_to(subject) if layer not in kept)
        if not layers:
            raise subject.refuse("matmulfree: no layer is left that could become one: nothing to do")
        return self.model_copy(update={"layers": layers, "keep_attention": None, "count": None})

    @staticmethod
    def misfit(family: Family) -> str | None:
        if family.encoder:
            return "it is an encoder and reads in both directions, an MLGRU reads from left to right alone"
        if family.experts:
            return "its FFN is a mixture of experts, and an MLGRU's block is a Llama block"
        apart = family.queries and family.kv
        if family.norm != "rms" or not apart or family.attention_post_norm or not family.attention_norm:
            return (
                "an MLGRU takes the place of an attention that reads through an RMSNorm, has a projection each for "
                "queries, keys and values, and adds what it gives as it is, as Llama's does"
            )
        return None

    def plan(self, subject: Subject) -> Plan:
        if self.layers is None:
            return self.resolve(subject).plan(subject)
        subject.check(self)
        layers = all_kept(subject)
        for number in self.layers:
            attention = self._attention(subject, number, "layer")
            index = subject.position(number)
            layer = layers[index]
            if attention.looks_back:
                layer = self._converted(subject, layer, attention)
            layers[index] = _ternary(subject, layer) if self.linears == "ternary" else layer
        made = assemble(subject, layers)
        left = sum(a.looks_back for a in made.spec.attentions)
        note = (
            f"MatMul-free mixers: {len(self.layers)} attentions are MLGRUs, {left} are left. A sequence keeps "
            f"{made.spec.state_numbers():,} numbers of state (float32), however long it is."
        )
        return replace(made, notes=(note,))

    def _attention(self, subject: Subject, number: int, what: str) -> AttentionSpec:
        """The attention of a layer, which must be softmax attention on its own."""
        layer = subject.spec.layers[subject.position(number, f"matmulfree: {what}")]
        if layer.branches:
            raise subject.refuse(f"matmulfree: layer {number} runs in parallel with others; make MLGRUs first")
        if layer.attention is None:
            raise subject.refuse(f"matmulfree: layer {number} has no attention")
        if not self._changes(layer.attention):
            raise subject.refuse(f"matmulfree: layer {number} has an MLGRU already")
        return layer.attention

    def _changes(self, attention: AttentionSpec) -> bool:
        return attention.looks_back or (self.linears == "ternary" and not attention.bit_linears)

    def _open_to(self, subject: Subject) -> list[int]:
        """Parent layers with a mixer of their own that this step would change."""
        layers = [layer for layer in subject.spec.layers if layer.attention is not None]
        return [layer.parents[0] for layer in layers if layer.attention and self._changes(layer.attention)]

    def _converted(self, subject: Subject, layer: NewLayer, attention: AttentionSpec) -> NewLayer:
        family = subject.family
        old = {suffix: str(name) for suffix, name in layer.tensors.items()}
        q, k, v, o = (f"{family.attention}.{name}." for name in (family.queries, *family.kv[:2], family.attention_out))
        norm = old[f"{family.attention_norm}.weight"]
        spec = MLGRUSpec.instead_of(attention, in_bias=v + "bias" in old, out_bias=o + "bias" in old)
        context = self.context or attention.window or subject.spec.max_positions or CONTEXT
        repeat = repeated(attention)
        new = f"{family.attention}."
        tensors: dict[str, str | Computed] = {s: n for s, n in old.items() if not s.startswith(new)}
        tensors |= {
            f"{new}i_proj.weight": Computed((old[v + "weight"],), repeat),
            f"{new}g_proj.weight": Computed((old[q + "weight"], norm), unit_rows),
            f"{new}f_proj.weight": Computed((old[k + "weight"], norm), lambda w, gain: repeat(unit_rows(w, gain))),
            f"{new}o_proj.weight": old[o + "weight"],
            f"{new}f_proj.bias": Computed((norm,), constant(memory_bias(attention, context))),
            f"{new}lower_bound": Computed((norm,), constant(torch.logit(torch.tensor([LOWER_BOUND])))),
        }
        if spec.in_bias:
            tensors[f"{new}i_proj.bias"] = Computed((old[v + "bias"],), repeat)
            sources = (old[q + "bias"], old[q + "weight"], norm)
            tensors[f"{new}g_proj.bias"] = Computed(sources, lambda b, w, gain: scaled(b, w, gain))
        if spec.out_bias:
            tensors[f"{new}o_proj.bias"] = old[o + "bias"]
        return NewLayer(replace(layer.spec, attention=spec), tensors)


def repeated(attention: AttentionSpec) -> Callable[[Tensor], Tensor]:
    """Rows of key/value heads [K * d, ...], each head repeated for the query heads that share it: [H * d, ...]."""

    def made(rows: Tensor) -> Tensor:
        by_head = rows.unflatten(0, (attention.kv_heads, attention.head_dim))
        return by_head.repeat_interleave(attention.heads // attention.kv_heads, dim=0).flatten(0, 1)

    return made


def unit_rows(weight: Tensor, gain: Tensor) -> Tensor:
    """Rows [O, D] scaled so that each makes numbers of about unit size from a normed input with this gain [D].

    Queries and keys of pretrained models are large, and a sigmoid of them would be all 0 or 1.
    """
    return (weight.float() * _unit(weight, gain)[:, None]).to(weight.dtype)


def scaled(bias: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """The bias [O] that goes with `unit_rows`."""
    return (bias.float() * _unit(weight, gain)).to(bias.dtype)


def _unit(weight: Tensor, gain: Tensor) -> Tensor:
    norms: Tensor = (weight.float() * gain.float()).norm(dim=1)
    return 1 / norms.clamp_min(1e-6)


def memory_bias(attention: AttentionSpec, context: int) -> Tensor:
    """Forget-gate biases [H * d] under which a channel is a mean over its last n tokens or so, n from 1 to `context`.

    A state that keeps 1 - 1 / n a token weighs n tokens in all. Neighbouring channels of a head differ, and so do the
    copies of one key/value channel.
    """
    heads, _, width = attention.shape
    head, channel = torch.arange(heads * width) // width, torch.arange(heads * width) % width
    step = max(1, width * attention.kv_heads // heads)
    place = ((channel + step * head) % width) * heads + head
    reach = (place + 0.5) / (heads * width)
    kept = 1 - float(context) ** -(reach**SKEW)
    # Below the bound nothing can be kept: those channels hold the last token alone.
    return torch.logit(((kept - LOWER_BOUND) / (1 - LOWER_BOUND)).clamp_min(LOWER_BOUND))


def constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    """A tensor on the device and of the dtype of the one that is given."""
    return lambda like: value.to(device=like.device, dtype=like.dtype)


def _ternary(subject: Subject, layer: NewLayer) -> NewLayer:
    """The layer with BitLinears for all projections.

    What a norm's gain did goes into the norms of the BitLinears that read it, whose input is then normed alone: until
    rounding sets in, they compute what the projections did.
    """
    family, ffn, mixer = subject.family, layer.spec.ffn, layer.spec.attention
    assert isinstance(mixer, MLGRUSpec)
    tensors = dict(layer.tensors)
    mixing = ("i_proj", "f_proj", "g_proj")
    groups: list[tuple[str, str, tuple[str, ...], str]] = [
        (family.attention_norm, family.attention, mixing, family.attention_out)
    ]
    if ffn and ffn.plain:
        projections = tuple(family.ffn_module(name) for name in (*family.ffn_in, family.ffn_out))
        groups.append((family.ffn_norm, family.ffn, family.ffn_in, family.ffn_out))
        ffn = BitFFNSpec(ffn.width, projections=projections)
    for norm, module, readers, writer in groups:
        gain = str(tensors[f"{norm}.weight"])
        for name in readers:
            tensors[f"{module}.{name}.gain"] = Computed((gain,), lambda given: given.clone())
        tensors[f"{norm}.weight"] = Computed((gain,), torch.ones_like)
        weight = tensors[f"{module}.{writer}.weight"]
        sources = (weight,) if isinstance(weight, str) else weight.sources
        tensors[f"{module}.{writer}.gain"] = Computed(sources[:1], lambda given: torch.ones_like(given[0]))
    return NewLayer(replace(layer.spec, attention=replace(mixer, ternary=True), ffn=ffn), tensors)
