"""What a model costs: parameters, multiplications, cache and disk, from its description and tensor shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import AttentionSpec, BitFFNSpec, FFFSpec, FFNSpec, LayerSpec, MLGRUSpec, ModelSpec, MoESpec

# Learnt positions and token types: tables that are looked up, never multiplied.
LOOKED_UP = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight", "token_type_embeddings.weight")


@dataclass(frozen=True)
class Costs:
    """Costs of one model.

    flops_per_token: 2 per weight that multiplies an activation (head included, embedding lookup and the
        context-dependent part of attention not).
    kv_bytes_per_token: growth of the KV cache for each token, sliding windows not counted off.
    """

    blocks: int
    attentions: int
    ffns: int
    parameters: int
    flops_per_token: int
    kv_bytes_per_token: int
    disk_bytes: int

    def to_dict(self) -> dict[str, int]:
        """The fields under their own names."""
        return asdict(self)


def costs(spec: ModelSpec, family: Family, shapes: Mapping[str, tuple[int, ...]], bytes_per_number: int) -> Costs:
    """Costs of a model whose tensors have these canonical names and shapes."""
    parameters = sum(prod(shape) for shape in shapes.values())
    embeddings = {name: shape for name, shape in shapes.items() if name == f"{family.embedding}.weight"}
    matrices = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    positions = sum(prod(shape) for name, shape in shapes.items() if name.endswith(LOOKED_UP))
    # Of trees, a token multiplies what it visits, whatever is stored.
    fast = {family.layer(i) + family.fast_ffn: b.ffn for i, b in enumerate(spec.layers) if isinstance(b.ffn, FFFSpec)}
    matrices -= sum(
        prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name.rpartition(".")[0] in fast
    )
    matrices += sum(ffn.rows * spec.hidden for ffn in fast.values())
    mixtures = [ffn for layer in spec.layers for ffn in _ffn_specs(layer) if isinstance(ffn, MoESpec)]
    if mixtures:
        # Of experts, too, a token multiplies those that are chosen for it.
        idle = 1 - mixtures[0].per_token / mixtures[0].experts
        matrices -= round(idle * sum(prod(shape) for name, shape in shapes.items() if ".experts." in name))
    if spec.block_transformer:
        matrices = _block_matrices(spec, family, shapes, matrices)
    # A tied embedding multiplies once, as the head.
    lookup = 0 if spec.tied else sum(prod(shape) for shape in embeddings.values())
    return Costs(
        blocks=len(spec.layers),
        attentions=sum(not isinstance(a, MLGRUSpec) for a in spec.attentions),
        ffns=sum(_ffns(layer) for layer in spec.layers),
        parameters=parameters,
        flops_per_token=2 * (matrices - lookup - positions),
        kv_bytes_per_token=0 if family.encoder else spec.kv_numbers_per_token() * bytes_per_number,
        disk_bytes=parameters * bytes_per_number,
    )


def _block_matrices(spec: ModelSpec, family: Family, shapes: Mapping[str, tuple[int, ...]], all_of_them: int) -> int:
    """What a block transformer multiplies for each token, on average over a block, of `all_of_them`.

    Block decoder, embedder and expansion work once a block; the token decoder at each of its positions, of which there
    are more than tokens where the context is a prefix; the map of embeddings at those that are tokens; the block
    embedding is looked up.
    """
    halves = spec.block_transformer
    assert halves
    body = family.embedding.rpartition(".")[0]
    within = tuple(family.layer(i) for i in range(halves.split, len(spec.layers)))
    once = (*(family.layer(i) for i in range(halves.split)), f"{body}.block_embedder.projection", f"{body}.context_exp")
    sizes = {name: prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    over_blocks = sum(size for name, size in sizes.items() if name.startswith(once))
    in_block = sum(size for name, size in sizes.items() if name.startswith(within))
    table = sizes[f"{body}.block_embedder.embed_tokens.weight"]
    of_token = sizes.get(f"{body}.token_projection.weight", 0)
    rest = all_of_them - over_blocks - in_block - table - of_token
    in_block_work = in_block * halves.positions + of_token * halves.embedded
    return rest + round((over_blocks + in_block_work) / halves.block_length)


def _ffns(layer: LayerSpec) -> int:
    return len(_ffn_specs(layer))


def layer_rows(spec: ModelSpec, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """One row per block for `inspect`: attention (heads, KV heads, head width, window) or MLGRU, FFN, parameters."""
    rows = []
    for index, layer in enumerate(spec.layers):
        prefix = family.layer(index)
        rows.append(
            {
                "block": index,
                "attention": [_attention_row(a) for a in layer.attentions],
                "ffn": [_ffn_row(ffn) for ffn in _ffn_specs(layer)],
                "parallel": len(layer.branches) or None,
                "parameters": sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix)),
            }
        )
    return rows


def _ffn_specs(layer: LayerSpec) -> list[FFNSpec]:
    own = [layer.ffn] if layer.ffn else []
    return own + [ffn for branch in layer.branches for ffn in _ffn_specs(branch)]


def _attention_row(attention: AttentionSpec) -> dict[str, Any]:
    if isinstance(attention, MLGRUSpec):
        return {"kind": "mlgru", "width": attention.width, "linears": "ternary" if attention.ternary else "float"}
    return asdict(attention)


def _ffn_row(ffn: FFNSpec) -> dict[str, Any]:
    if isinstance(ffn, MoESpec):
        return {"kind": "moe", "width": ffn.width, "experts": ffn.experts, "per_token": ffn.per_token}
    if isinstance(ffn, FFFSpec):
        names = ("leaf_width", "shared") if ffn.form == "leaf" else ("trees",)
        shape = {name: getattr(ffn, name) for name in ("form", "depth", *names, "active")}
        return {"kind": "fff", "width": ffn.width, **shape, "words": ffn.words}
    kind = "bitlinear" if isinstance(ffn, BitFFNSpec) else "dense"
    return {"kind": kind, "width": ffn.width, **({"sub_norm": True} if ffn.sub_norm else {})}


def human(number: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'; three significant digits."""
    for factor, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {sign}{unit}"
    return f"{number:.3g} {unit}".strip()
