"""What a model costs: parameters, multiplications, cache and disk, from its description and tensor shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod

from llmsurgeon.model.block_transformer import BlockTransformerSpec
from llmsurgeon.model.families import Family
from llmsurgeon.model.parts import AttentionSpec, FFNSpec
from llmsurgeon.model.spec import LayerSpec, ModelSpec

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
    matrices = {name: prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    positions = sum(prod(shape) for name, shape in shapes.items() if name.endswith(LOOKED_UP))
    multiplied = sum(matrices.values()) - _idle(spec, family, matrices)
    if spec.block_transformer:
        multiplied = _in_block_transformer(spec.block_transformer, spec, family, matrices, multiplied)
    # A tied embedding multiplies once, as the head.
    lookup = 0 if spec.tied else sum(prod(shape) for shape in embeddings.values())
    return Costs(
        blocks=len(spec.layers),
        attentions=sum(a.looks_back for a in spec.attentions),
        ffns=sum(len(layer.ffns) for layer in spec.layers),
        parameters=parameters,
        flops_per_token=2 * (multiplied - lookup - positions),
        kv_bytes_per_token=0 if family.encoder else spec.kv_numbers_per_token() * bytes_per_number,
        disk_bytes=parameters * bytes_per_number,
    )


def _idle(spec: ModelSpec, family: Family, matrices: Mapping[str, int]) -> int:
    """How many of the matrices' numbers a token leaves out, as each FFN says of its own."""
    ffns = {path: ffn for i, layer in enumerate(spec.layers) for path, ffn in _ffns(layer, family.layer(i), family)}
    inside: dict[str, dict[str, int]] = {path: {} for path in ffns}
    for name, numbers in matrices.items():
        words = name.split(".")
        for depth in range(1, len(words)):
            if (path := ".".join(words[:depth])) in inside:
                inside[path][".".join(words[depth:])] = numbers
    return sum(ffn.idle(inside[path], spec.hidden) for path, ffn in ffns.items())


def _ffns(layer: LayerSpec, prefix: str, family: Family) -> Iterator[tuple[str, FFNSpec]]:
    """The path of each FFN's module, and the FFN."""
    if layer.ffn:
        yield prefix + family.fast_ffn, layer.ffn
    for place, branch in enumerate(layer.branches):
        yield from _ffns(branch, f"{prefix}branches.{place}.", family)


def _in_block_transformer(
    made: BlockTransformerSpec, spec: ModelSpec, family: Family, matrices: Mapping[str, int], all_of_them: int
) -> int:
    """What a block transformer multiplies for each token, on average over a block, of `all_of_them`.

    Block decoder, embedder and expansion work once a block; the token decoder at each of its positions, of which there
    are more than tokens where the context is a prefix; the map of embeddings at those that are tokens; the block
    embedding is looked up.
    """
    body = family.embedding.rpartition(".")[0]
    within = tuple(family.layer(i) for i in range(made.split, len(spec.layers)))
    once = (*(family.layer(i) for i in range(made.split)), f"{body}.block_embedder.projection", f"{body}.context_exp")
    over_blocks = sum(size for name, size in matrices.items() if name.startswith(once))
    in_block = sum(size for name, size in matrices.items() if name.startswith(within))
    table = matrices[f"{body}.block_embedder.embed_tokens.weight"]
    of_token = matrices.get(f"{body}.token_projection.weight", 0)
    rest = all_of_them - over_blocks - in_block - table - of_token
    in_block_work = in_block * made.positions + of_token * made.embedded
    return rest + round((over_blocks + in_block_work) / made.block_length)


def part_work(
    spec: ModelSpec, family: Family, shapes: Mapping[str, tuple[int, ...]], sequence_length: int
) -> list[tuple[float, float]]:
    """What attention and FFN of each layer multiply for a token, in floating-point operations: 2 for a weight, and for
    attention 2 for each number of the keys and values before it."""
    matrices = {name: prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    found = []
    for index, layer in enumerate(spec.layers):
        prefix = family.layer(index)
        own = {name: size for name, size in matrices.items() if name.startswith(prefix)}
        attends = sum(size for name, size in own.items() if name.startswith(f"{prefix}{family.attention}."))
        ffns = {path.removeprefix(prefix): ffn for path, ffn in _ffns(layer, prefix, family)}
        inside = {path: _below(prefix + path, own) for path in ffns}
        feeds = sum(own.values()) - attends - sum(ffn.idle(inside[path], spec.hidden) for path, ffn in ffns.items())
        looks_back = isinstance(layer.attention, AttentionSpec) and layer.attention.heads * layer.attention.head_dim
        found.append((2.0 * attends + 2.0 * sequence_length * looks_back, 2.0 * feeds))
    return found


def _below(path: str, matrices: Mapping[str, int]) -> dict[str, int]:
    """The matrices inside a module, by their names in it."""
    return {name.removeprefix(f"{path}."): size for name, size in matrices.items() if name.startswith(f"{path}.")}


def layer_parameters(spec: ModelSpec, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Numbers in each layer's tensors."""
    prefixes = [family.layer(index) for index in range(len(spec.layers))]
    return [sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix)) for prefix in prefixes]


def human(number: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'; three significant digits."""
    for factor, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {sign}{unit}"
    return f"{number:.3g} {unit}".strip()
