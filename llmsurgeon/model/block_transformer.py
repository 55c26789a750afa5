"""The Block Transformer (arXiv 2406.02657): a decoder over blocks of text, and one within each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.parts import Touch


@dataclass(frozen=True)
class BlockTransformerSpec:
    """Two decoders in one model (Block Transformer, arXiv 2406.02657), `block_length` tokens to a block of text.

    split: layers before it form the block decoder, which attends over blocks; the others the token decoder, which
        attends within one.
    embedder: `concat` looks up hidden / block_length numbers a token and lays them side by side; `projected` looks up
        whole embeddings and projects them to one.
    decoder: how the token decoder reads a block's context: as `prefix_length` tokens before its own, as a summand on
        each, or by cross-attention to `prefix_length` vectors.
    affine: the expansion of the context has a bias, and the token decoder reads embeddings through an affine map.
    """

    block_length: int
    split: int
    embedder: Literal["concat", "projected"] = "projected"
    decoder: Literal["prefix", "summation", "cross_attention"] = "prefix"
    prefix_length: int = 2
    affine: bool = False

    # Its layers are not one stack: healing alone knows what each of them reads.
    forbids: ClassVar[frozenset[Touch]] = frozenset(Touch) - {Touch.FITS, Touch.TRAINS}

    @property
    def lead(self) -> int:
        """Positions of the token decoder before it has said a block's first token."""
        return self.prefix_length if self.decoder == "prefix" else 1

    @property
    def positions(self) -> int:
        """Positions of the token decoder for one block: what its cache holds at most."""
        return self.lead + self.block_length - 1

    @property
    def embedded(self) -> int:
        """Positions of the token decoder, of those, that begin as a token's embedding."""
        return self.positions - (self.prefix_length if self.decoder == "prefix" else 0)

    @property
    def contexts(self) -> int:
        """Vectors that a block's context is expanded to."""
        return self.block_length if self.decoder == "summation" else self.prefix_length

    def refusal(self, touches: frozenset[Touch]) -> str | None:
        """Why a step that does this cannot be done to such a model, None where it can."""
        if self.forbids & touches:
            return (
                "the model is a block transformer already, whose layers are not one stack; cut first, block comes "
                "last, and refit and distill heal it"
            )
        return None

    def sentence(self) -> str:
        """The description in a line."""
        how = {"prefix": f"a prefix of {self.prefix_length}", "summation": "summation"}
        reads = how.get(self.decoder, f"cross-attention to {self.prefix_length}")
        return (
            f"block transformer: {self.block_length} token{'s' if self.block_length > 1 else ''} a block, embedder "
            f"{self.embedder}, layers before {self.split} over blocks, the others within one, by {reads}"
        )


def to_block_transformer(spec: BlockTransformerSpec) -> dict[str, Any]:
    """`block_transformer` of config.json."""
    return asdict(spec)


def from_block_transformer(config: Mapping[str, Any], layers: int, hidden: int) -> BlockTransformerSpec:
    """The inverse of `to_block_transformer`, for a model of so many layers of this width.

    Raises:
        SurgeryError: keys are missing or unknown, or values cannot be.
    """
    try:
        spec = BlockTransformerSpec(**config)
        sizes = (spec.block_length, spec.split, spec.prefix_length)
        if not all(type(size) is int for size in sizes):
            raise TypeError(f"sizes {sizes}")
        if type(spec.affine) is not bool:
            raise TypeError(f"affine {spec.affine!r}")
    except TypeError as error:
        raise SurgeryError(f"config.json: block_transformer cannot be read: {error}") from error
    check_block_transformer(spec, layers, hidden)
    return spec


def check_block_transformer(spec: BlockTransformerSpec, layers: int, hidden: int) -> None:
    """Raise SurgeryError for sizes that no model can have."""
    if spec.block_length < 1 or spec.prefix_length < 1 or not 0 <= spec.split <= layers:
        raise SurgeryError(
            f"block transformer: block_length {spec.block_length}, prefix_length {spec.prefix_length} and split "
            f"{spec.split} must be at least 1, at least 1, and from 0 to the {layers} layers"
        )
    if spec.embedder == "concat" and hidden % spec.block_length:
        raise SurgeryError(
            f"block transformer: embedder concat gives each of {spec.block_length} tokens an equal part of the hidden "
            f"size {hidden}, which {spec.block_length} does not divide; use embedder projected or another block_length"
        )
    if spec.embedder not in ("concat", "projected") or spec.decoder not in ("prefix", "summation", "cross_attention"):
        raise SurgeryError(f"block transformer: unknown embedder {spec.embedder!r} or decoder {spec.decoder!r}")
