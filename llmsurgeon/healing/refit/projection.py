"""A part's output projection, watched while a layer runs, and moved by an update of what the part adds to the stream.

Shapes: n tokens, F features (FFN width, or heads * head_dim), O outputs (the model width).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from llmsurgeon.healing.refit.context import LayerFit
from llmsurgeon.model.families.base import Family


class OutputProjection:
    """The way from a part's output projection into the stream, watched: contribution = m * post_norm(projection(read)).

    A context manager: what runs inside is seen.

    Without a post-norm the contribution is linear in the projection. A post-norm g * z / rms(z) is taken as linear
    with each token's rms as it is: good for small updates. So is a LayerNorm `outer` behind the residual sum, with each
    token's deviation as it is.
    """

    def __init__(self, layer: Any, name: str, post_norm: str, transposed: bool, outer: str = "") -> None:
        self.name, self.transposed = name, transposed
        self.layer, self.post_norm = layer, post_norm or None
        self.projection: Any = layer.get_submodule(name)
        self.read = self.output = torch.empty(0)
        weight = self.weight
        ones = weight.new_ones(weight.shape[0])
        # A norm of ones is its gain.
        self.gain = getattr(layer, post_norm)(ones).float() if post_norm else None
        self.factor = float(layer.residual_multiplier)
        self.hooks = [self.projection.register_forward_hook(self._see)]
        self.outer = outer
        if outer:
            norm = layer.get_submodule(outer)
            self.gain = norm.weight.data.float()
            self.hooks.append(norm.register_forward_pre_hook(self._see_sum))

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.read, self.output = inputs[0], output

    def _see_sum(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.output = inputs[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        for hook in self.hooks:
            hook.remove()

    @property
    def weight(self) -> Tensor:
        """The projection's weight as a view [O, F]."""
        weight: Tensor = self.projection.weight.data
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The projection's bias [O]."""
        bias = getattr(self.projection, "bias", None)
        return None if bias is None else bias.data

    def _tensors(self) -> list[Tensor]:
        """What an update moves, as views."""
        return [self.weight, *([] if self.bias is None else [self.bias])]

    def copies(self) -> list[Tensor]:
        """What an update moves, to be restored where it does not do what it promised."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, copies: Sequence[Tensor]) -> None:
        """Take an update back."""
        for tensor, copy in zip(self._tensors(), copies, strict=True):
            tensor.copy_(copy)

    def features(self) -> Tensor:
        """What an update multiplies to change the contribution, for the tokens seen last [n, F (+ 1 for the bias)].

        In the dtype of the layer where it is what the projection reads, and no more.
        """
        features = self.read.flatten(0, -2)
        if self.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        if self.gain is not None:
            normed = self.output.float().flatten(0, -2)
            if self.outer:
                normed = normed - normed.mean(-1, keepdim=True)
            features = features * normed.square().mean(-1, keepdim=True).rsqrt()
        return features if self.factor == 1 else features.float() * self.factor

    def contribution(self, read: Tensor) -> Tensor:
        """What the part adds to the stream when its projection reads this."""
        added: Tensor = self.layer.added(self.post_norm, self.projection(read))
        return added

    def move(self, update: Tensor) -> None:
        """Add an update [F, O] of the contribution to the projection; a last row beyond its inputs goes to its bias."""
        if self.gain is not None:
            # Channels that the norm all but closes cannot be reached.
            open_enough = self.gain.abs() > 1e-3 * self.gain.abs().max()
            update = torch.where(open_enough, update / self.gain, 0)
        if (bias := self.bias) is not None:
            bias.copy_((bias.float() + update[-1]).to(bias.dtype))
            update = update[:-1]
        self.weight.copy_((self.weight.float() + update.T).to(self.weight.dtype))


def attention_out(family: Family) -> str:
    """Path inside a layer of the projection by which its attention writes the stream."""
    return f"{family.attention}.{family.attention_out}"


def ffn_out(family: Family) -> str:
    """Path inside a layer of the projection by which its FFN writes the stream."""
    return family.ffn_module(family.ffn_out)


def output_projection(here: LayerFit, part: Literal["attention", "ffn"]) -> OutputProjection:
    """The output projection of the layer's attention or FFN, watched."""
    family = here.family
    name, post_norm, outer = (
        (attention_out(family), family.attention_post_norm, family.attention_norm)
        if part == "attention"
        else (ffn_out(family), family.ffn_post_norm, family.ffn_norm)
    )
    return OutputProjection(here.module, name, post_norm, family.transposed, outer if family.post_norm else "")
