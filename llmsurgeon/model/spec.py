"""A model as a tuple of layers: the description every operation edits and every format writes.

A layer is attention and a feed-forward network (FFN); either may be absent. Widths and kinds may differ
from layer to layer. `to_block_configs` writes the description in the field names that NVIDIA's
Puzzle / Nemotron-NAS checkpoints use (arXiv 2411.19146), extended where those have no word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.block_transformer import BlockTransformerSpec
from llmsurgeon.model.parts import (
    ATTENTION_KEYS,
    ATTENTIONS,
    FFN_KEYS,
    FFNS,
    SUB_NORM,
    AttentionSpec,
    FFNSpec,
    Part,
    Touch,
)

AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the model. `parents` are the layers of the original model whose work it does.

    `branches`, when present, are layers that read the same input and whose contributions add up
    (full-block parallelisation, FFN Fusion section 5); attention and ffn are then None.
    """

    attention: AttentionSpec | None
    ffn: FFNSpec | None
    parents: tuple[int, ...] = ()
    branches: tuple[LayerSpec, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its own attention and FFN, those of branches not counted."""
        return tuple(part for part in (self.attention, self.ffn) if part)

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Every attention in the layer, in cache-slot order."""
        own = () if self.attention is None else (self.attention,)
        return own + tuple(a for branch in self.branches for a in branch.attentions)

    @property
    def ffns(self) -> tuple[FFNSpec, ...]:
        """Every FFN in the layer."""
        own = () if self.ffn is None else (self.ffn,)
        return own + tuple(ffn for branch in self.branches for ffn in branch.ffns)

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """Its attention and FFN, and those of its branches."""
        return self.parts + tuple(part for branch in self.branches for part in branch.all_parts)

    @property
    def empty(self) -> bool:
        """True where the layer only passes its input on."""
        return self.attention is None and self.ffn is None and not self.branches

    @property
    def own_kind(self) -> str | None:
        """What the layer has that no family's own class has, as a verb and its object; None without such a part."""
        kinds = (part.own_kind for part in self.parts if part.own_kind)
        return next(kinds, SUB_NORM if self.sub_normed else None)

    @property
    def sub_normed(self) -> tuple[str, ...]:
        """Which of its own parts, attention and ffn, have an RMSNorm before their output projection."""
        parts = (("attention", self.attention), ("ffn", self.ffn))
        return tuple(name for name, part in parts if part and part.normed)

    def refusal(self, touches: frozenset[Touch]) -> str | None:
        """What it has that does not bear being touched in these ways, as a verb and more; None where it has nothing."""
        return next((reason for part in self.parts if (reason := part.refusal(touches))), None)


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embeddings, `layers`, final norm, head. Sizes are in numbers, not bytes.

    `block_transformer` is there where some layers work over blocks of text and the others within them.
    """

    family: str
    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    tied: bool
    max_positions: int | None = None
    block_transformer: BlockTransformerSpec | None = None

    def with_layers(self, layers: Sequence[LayerSpec]) -> ModelSpec:
        """This model with other layers in the place of its own."""
        return replace(self, layers=tuple(layers))

    def check_layer(self, index: int, what: str = "layer") -> None:
        """Raise SurgeryError unless `index` names a layer."""
        if not 0 <= index < len(self.layers):
            raise SurgeryError(
                f"{what} {index} is out of range: this model has layers 0 to {len(self.layers) - 1}; "
                "run `llmsurgeon inspect MODEL` to list them"
            )

    @property
    def uniform(self) -> bool:
        """True where every layer has attention and FFN of one shape (window aside): the family's own form."""
        first = self.layers[0]
        shapes = {(layer.attention and layer.attention.shape, layer.ffn) for layer in self.layers}
        return (
            self.block_transformer is None
            and len(shapes) == 1
            and not any(layer.branches or layer.own_kind for layer in self.layers)
            and None not in (first.attention, first.ffn)
        )

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Every attention of the model in cache-slot order, MLGRUs included."""
        return tuple(a for layer in self.layers for a in layer.attentions)

    def state_numbers(self) -> int:
        """Numbers that the states of MLGRUs take for a sequence of any length."""
        return sum(a.state_width for a in self.attentions)

    def kv_numbers_per_token(self) -> int:
        """Numbers that the KV cache gains for each token (multiply by the dtype's size for bytes).

        A block transformer's gains those of the block decoder once a block; the token decoder's does not grow.
        """
        if self.block_transformer is None:
            return sum(a.kv_width for a in self.attentions)
        over_blocks = self.layers[: self.block_transformer.split]
        return -(-sum(a.kv_width for b in over_blocks for a in b.attentions) // self.block_transformer.block_length)


def to_block_configs(spec: ModelSpec) -> list[dict[str, Any]]:
    """`block_configs` of config.json: an entry a layer, in which each part says its own."""
    return [_entry(layer, spec.hidden) for layer in spec.layers]


def _entry(layer: LayerSpec, hidden: int) -> dict[str, Any]:
    attention, ffn = layer.attention, layer.ffn
    entry: dict[str, Any] = {
        "attention": {**_there(attention), **(attention.entry() if attention else dict.fromkeys(ATTENTION_KEYS))},
        "ffn": {**_there(ffn), **(ffn.entry(hidden) if ffn else dict.fromkeys(FFN_KEYS))},
        "parents": list(layer.parents),
    }
    if layer.branches:
        entry["parallel"] = [_entry(branch, hidden) for branch in layer.branches]
    return entry


def _there(part: Part | None) -> dict[str, bool]:
    return {"no_op": part is None, "replace_with_linear": False}


def from_block_configs(
    entries: Sequence[Mapping[str, Any]],
    head_dim: int,
    windows: Sequence[int | None],
    ropes: Sequence[bool] | None = None,
) -> tuple[LayerSpec, ...]:
    """The inverse of `to_block_configs`; `windows` and `ropes` give each layer's window and rotary positions."""
    ropes = ropes or [True] * len(entries)
    return tuple(_layer(entry, head_dim, w, r) for entry, w, r in zip(entries, windows, ropes, strict=True))


def _layer(entry: Mapping[str, Any], head_dim: int, window: int | None, rope: bool) -> LayerSpec:
    attention, ffn = entry["attention"], entry["ffn"]
    around = head_dim, window, rope
    return LayerSpec(
        attention=None if attention["no_op"] else _kind(ATTENTIONS, attention).from_entry(attention, *around),
        ffn=None if ffn["no_op"] else _kind(FFNS, ffn).from_entry(ffn),
        parents=tuple(entry.get("parents") or ()),
        branches=tuple(_layer(branch, head_dim, window, rope) for branch in entry.get("parallel") or ()),
    )


def _kind(kinds: Mapping[str, type[AnyPart]], entry: Mapping[str, Any]) -> type[AnyPart]:
    """The kind of part that an entry is of; the first of the table where it does not say.

    Raises:
        SurgeryError: a kind that is not in the table.
    """
    kind = entry.get("kind") or next(iter(kinds))
    if kind not in kinds:
        raise SurgeryError(f"config.json: block_configs has a part of kind {kind!r}, known here are {', '.join(kinds)}")
    return kinds[kind]
