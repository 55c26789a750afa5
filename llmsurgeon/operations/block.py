"""Block Transformer (arXiv 2406.02657): global attention over blocks of tokens, and local attention within a block.

    e_i = embed(block i)      c = block decoder(e_0 .. e_i)      tokens of block i + 1 = token decoder(c_i, their left)

Started from a pretrained decoder as the paper's uptraining section does: its layers are parted in two, both embeddings
are its own, a block's embedding is the mean of its tokens', and the context is handed to the token decoder as it is.
Layers and tensors of the parent keep their names; what is new is the embedder, the expansion of the context, the map of
the token decoder's embeddings (not in the paper: the identity, until a refit finds better), and the cross-attentions
where those are asked for.

V vocabulary, D model width, L tokens a block, P vectors of a block's context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmsurgeon.checkpoint.transform import WeightTransform, row_blocks
from llmsurgeon.model.block_transformer import BlockTransformerSpec, check_block_transformer
from llmsurgeon.model.families import Family
from llmsurgeon.model.parts import Touch
from llmsurgeon.operations.base import Plan, Step, Subject

EMBEDDER = "block_embedder"
EXPANSION, TOKENS = "context_expansion", "token_projection"
CROSS, CROSS_NORM = "cross_attn", "cross_attn_layernorm"


def repeated(tensor: Tensor) -> Tensor:
    """A tensor that a second module has, too: the same bytes, and no tie between the two."""
    return tensor.clone()


def mean_projection(length: int) -> Callable[[Tensor], Tensor]:
    """fn(E [V, D]) -> W [D, L * D] = [I / L ... I / L]: the mean of L embeddings side by side.

    It is the paper's convolution of kernel and stride L, its taps one after the other.
    """

    def project(embedding_VD: Tensor) -> Tensor:
        identity = torch.eye(embedding_VD.shape[1], dtype=embedding_VD.dtype, device=embedding_VD.device)
        return identity.repeat(1, length) / length

    return project


def no_bias(count: int = 1) -> Callable[[Tensor], Tensor]:
    """fn(E [V, D]) -> zeros [count * D]."""
    return lambda embedding_VD: embedding_VD.new_zeros(count * embedding_VD.shape[1])


def stacked_identities(count: int) -> Callable[[Tensor], Tensor]:
    """fn(E [V, D]) -> W [count * D, D]: each of `count` vectors is the context itself."""

    def expand(embedding_VD: Tensor) -> Tensor:
        identity = torch.eye(embedding_VD.shape[1], dtype=embedding_VD.dtype, device=embedding_VD.device)
        return identity.repeat(count, 1)

    return expand


def main_directions(width: int) -> Callable[[Tensor], Tensor]:
    """fn(E [V, D]) -> [V, width]: each token's embedding by its coordinates along the table's main directions.

    Of all tables of this width it keeps the most of the tokens' inner products (Eckart-Young).
    """

    def reduce(embedding_VD: Tensor) -> Tensor:
        if embedding_VD.is_meta:
            return embedding_VD.new_empty(len(embedding_VD), width)
        gram = torch.zeros(embedding_VD.shape[1], embedding_VD.shape[1], dtype=torch.float64)
        for layer in row_blocks(embedding_VD):
            gram += layer.double().T @ layer.double()
        directions = torch.linalg.eigh(gram).eigenvectors[:, -width:].flip(1)
        # An eigenvector's sign is arbitrary: its largest entry is made positive, so that all machines agree.
        largest = directions.abs().argmax(0)
        directions = directions * directions[largest, torch.arange(width)].sign()
        return torch.cat([layer.double() @ directions for layer in row_blocks(embedding_VD)]).to(embedding_VD.dtype)

    return reduce


class Block(Step):
    """Turn the model into a block transformer with blocks of `block_length` tokens.

    split: layers before it, numbered as in the parent, form the block decoder; default: the first half.
    embedder: `projected` (the mean of the tokens' embeddings, to begin with) or `concat` (a narrow table's rows side by
        side).
    decoder: the token decoder reads the context as a `prefix` of `prefix_length` tokens, by `summation`, or by
        `cross_attention` to `prefix_length` vectors.
    affine: give that reading a bias, and the token decoder's embeddings an affine map: what a refit needs. The paper's
        model has neither.
    """

    tower_refusal: ClassVar[str] = (
        "block is for text models; this is the text tower of a vision-language model ({kind}), whose images enter as "
        "embeddings that no block of tokens holds"
    )
    op: Literal["block"] = "block"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.RECONNECTS_LAYERS})
    alone: ClassVar[str] = "is fitted with the whole model in memory: run it in one process"
    block_length: Literal[1, 2, 4, 8] = 4
    split: Annotated[int, Field(ge=0)] | None = None
    embedder: Literal["concat", "projected"] = "projected"
    decoder: Literal["prefix", "summation", "cross_attention"] = "prefix"
    prefix_length: Literal[1, 2] = 2
    affine: bool = True

    def resolve(self, subject: Subject) -> Block:
        """The step with the layer at which it splits."""
        subject.check(self)
        if self.split is not None:
            return self
        layers = subject.spec.layers
        half = len(layers) // 2
        return self.model_copy(update={"split": layers[half].parents[0] if half else 0})

    @staticmethod
    def misfit(family: Family) -> str | None:
        return family.no_block_form()

    def plan(self, subject: Subject) -> Plan:
        if self.split is None:
            return self.resolve(subject).plan(subject)
        subject.check(self)
        self._check(subject)
        made = BlockTransformerSpec(
            self.block_length, self._position(subject), self.embedder, self.decoder, self.prefix_length, self.affine
        )
        check_block_transformer(made, len(subject.spec.layers), subject.spec.hidden)
        transforms = self._new_tensors(subject, made)
        # A source that an edit reads would be gone unless something passes it on.
        sources = dict.fromkeys(source for t in transforms for source in t.sources)
        kept = [WeightTransform((source,), (source,)) for source in sources]
        spec = replace(subject.spec, block_transformer=made)
        return Plan(spec, (*kept, *transforms), (f"{_capital(made.sentence())}.",))

    def _check(self, subject: Subject) -> None:
        for layer in subject.spec.layers:
            for attention in layer.attentions:
                if attention.window is not None:
                    raise subject.refuse(
                        f"block: layer {layer.parents[0]} attends within a window of {attention.window} tokens; over "
                        "blocks it would reach as many blocks. Only models with full attention in every layer have a "
                        "block form"
                    )
        if self.decoder == "cross_attention" and any(b.branches or b.attention is None for b in subject.spec.layers):
            raise subject.refuse(
                "block: decoder cross_attention starts from each layer's own attention, and a layer has none or "
                "several; use decoder prefix, or leave out the step that cut it"
            )

    def _position(self, subject: Subject) -> int:
        """The number of layers in the block decoder."""
        assert self.split is not None
        layers = subject.spec.layers
        last = max(parent for layer in layers for parent in layer.parents)
        if self.split > last + 1:
            raise subject.refuse(f"block: split {self.split} is beyond the model's layers, which end at {last}")
        for layer in layers:
            if layer.parents[0] < self.split <= layer.parents[-1]:
                raise subject.refuse(
                    f"block: split {self.split} goes through the layers {layer.parents[0]} to {layer.parents[-1]}, "
                    f"which an earlier step made one; use {layer.parents[0]} or {layer.parents[-1] + 1}"
                )
        return sum(layer.parents[0] < self.split for layer in layers)

    def _new_tensors(self, subject: Subject, made: BlockTransformerSpec) -> list[WeightTransform]:
        family, length = subject.family, made.block_length
        table = f"{family.embedding}.weight"
        body = family.embedding.rpartition(".")[0]
        embedder = f"{body}.{EMBEDDER}"

        def of_table(target: str, fn: Callable[[Tensor], Tensor]) -> WeightTransform:
            return WeightTransform((table,), (target,), fn)

        if made.embedder == "concat":
            made_here = [of_table(f"{embedder}.embed_tokens.weight", main_directions(subject.spec.hidden // length))]
        else:
            made_here = [
                of_table(f"{embedder}.embed_tokens.weight", repeated),
                of_table(f"{embedder}.projection.weight", mean_projection(length)),
                of_table(f"{embedder}.projection.bias", no_bias()),
            ]
        made_here.append(of_table(f"{body}.{EXPANSION}.weight", stacked_identities(made.contexts)))
        if made.affine:
            made_here += [
                of_table(f"{body}.{EXPANSION}.bias", no_bias(made.contexts)),
                of_table(f"{body}.{TOKENS}.weight", stacked_identities(1)),
                of_table(f"{body}.{TOKENS}.bias", no_bias()),
            ]
        if made.decoder == "cross_attention":
            for index in range(made.split, len(subject.spec.layers)):
                made_here += self._cross_attention(subject, index)
        return made_here

    @staticmethod
    def _cross_attention(subject: Subject, index: int) -> list[WeightTransform]:
        """A layer's cross-attention begins as its self-attention does."""
        family, prefix = subject.family, subject.family.layer(index)
        copies = []
        for suffix, name in subject.tensors(index).items():
            for old, new in ((family.attention, CROSS), (family.attention_norm, CROSS_NORM)):
                if suffix.startswith(f"{old}."):
                    target = f"{prefix}{new}.{suffix.removeprefix(f'{old}.')}"
                    copies.append(WeightTransform((name,), (target,), repeated))
        return copies


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
