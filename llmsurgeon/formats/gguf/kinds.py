"""In which of GGUF's types each tensor of a file is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from llmsurgeon.checkpoint.shards import file_order
from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.gguf.llama_quantizer import require
from llmsurgeon.formats.gguf.mixes import MIXES, types_of
from llmsurgeon.formats.gguf.ternary import exact_kind

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# What the `gguf` package can make, best first.
TYPES = ("F32", "BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0")
TERNARY = ("TQ1_0", "TQ2_0")
FLOATS = ("F32", "F16", "BF16")
EMBEDDINGS = ("token_embd.weight", "output.weight")
POSITIONS = "position_embd.weight"
ROUTER = "ffn_gate_inp.weight"


@dataclass(frozen=True)
class Kinds:
    """main: what matrices are stored in, or the mixture's name; of: the type of each tensor, in the order of the file;
    notes: what to say."""

    main: str
    of: dict[str, GGMLQuantizationType]
    notes: tuple[str, ...]

    @property
    def ternary(self) -> bool:
        """Whether the file is for ternary weights."""
        return self.main in TERNARY

    @property
    def mixed(self) -> bool:
        """Whether the file is one of llama.cpp's mixtures, which its own quantizer makes."""
        return self.main in MIXES

    def sizes(self, meta: Mapping[str, Tensor]) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: _bytes(tuple(meta[name].shape), kind) for name, kind in self.of.items()}


def chosen_kinds(
    tensors: TransformedWeights,
    meta: Mapping[str, Tensor],
    type: str,
    float_type: str | None = None,
    heads_a_value: int = 1,
) -> Kinds:
    """The types of all tensors; `meta` are they without data, which is read where `type` is ternary.

    heads_a_value: query heads a key/value head, by which mixtures choose.

    Raises:
        SurgeryError: no tensor is ternary, or a float type is given where it means nothing.
    """
    from gguf import GGMLQuantizationType

    if float_type and type not in TERNARY:
        raise SurgeryError(f"a float type goes with {' and '.join(TERNARY)}, for what is not ternary; {type} is one")
    shapes = {name: tuple(meta[name].shape) for name in file_order(tensors)}
    if type in MIXES:
        return _mixed_kinds(shapes, type, heads_a_value)
    kind = GGMLQuantizationType[type]
    kinds = {name: _kind_of(name, shape, kind) for name, shape in shapes.items()}
    if type in TERNARY:
        kinds, notes = _ternary_kinds(tensors, kinds, kind, _float_type(float_type))
        return Kinds(type, kinds, tuple(notes))
    narrow = [name for name, found in kinds.items() if _fell_back(meta[name].dim(), found, kind)]
    if not narrow:
        return Kinds(type, kinds, ())
    note = f"{len(narrow)} tensors, {narrow[0]} the first, are F16: their rows are not whole blocks of {type}"
    return Kinds(type, kinds, (note,))


def known_type(name: str) -> str:
    """The type, or mixture, of this name.

    Raises:
        SurgeryError: it is none that can be made here, or llama.cpp's quantizer makes it and is not installed.
    """
    known = name.upper()
    if known in MIXES:
        require(known)
    elif known not in TYPES:
        raise SurgeryError(
            f"GGUF type {name!r} cannot be made here; those that can are {', '.join((*TYPES, *MIXES))}. For others "
            "(IQ2_XS ..., which need an importance matrix) write F16 and run llama.cpp's llama-quantize on it"
        )
    return known


def _mixed_kinds(shapes: Mapping[str, tuple[int, ...]], type: str, heads_a_value: int) -> Kinds:
    """The types of one of llama.cpp's mixtures."""
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Kind

    matrices = {name: shape for name, shape in shapes.items() if not _stays_float32(name, shape)}
    head = next(name for name in reversed(EMBEDDINGS) if name in shapes)
    block = {kind.name: size for kind, (size, _) in GGML_QUANT_SIZES.items()}
    found = types_of(MIXES[type], matrices, heads_a_value, head, block)
    kinds = {name: Kind[found[name]] if name in found else Kind.F32 for name in shapes}
    narrow = [name for name, shape in matrices.items() if name != head and shape[-1] % block[MIXES[type].base]]
    if not narrow:
        return Kinds(type, kinds, ())
    instead = ", ".join(sorted({found[name] for name in narrow}))
    note = f"{len(narrow)} tensors, {narrow[0]} the first, are {instead}: their rows are not whole blocks of {type}"
    return Kinds(type, kinds, (note,))


def _stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Vectors, norms, learnt positions and routers."""
    return len(shape) < 2 or "norm" in name or name == POSITIONS or name.endswith(ROUTER)


def _kind_of(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of one tensor: vectors and routers stay float32, embeddings and head are spared the coarsest types."""
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Kind

    if _stays_float32(name, shape):
        return Kind.F32
    if name in EMBEDDINGS and wanted not in (Kind.F32, Kind.BF16, Kind.F16):
        wanted = Kind.F16 if wanted.name in TERNARY else Kind.Q8_0
    return Kind.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _float_type(name: str | None) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if name is not None and name.upper() not in FLOATS:
        raise SurgeryError(f"GGUF float type {name!r}: expected one of {', '.join(FLOATS)}")
    return GGMLQuantizationType[(name or "F16").upper()]


def _ternary_kinds(
    tensors: TransformedWeights,
    kinds: Mapping[str, GGMLQuantizationType],
    wanted: GGMLQuantizationType,
    float_type: GGMLQuantizationType,
) -> tuple[dict[str, GGMLQuantizationType], list[str]]:
    """The types of a ternary file: `wanted` or Q4_0 for the tensors that they hold exactly, and what there is to say.

    Raises:
        SurgeryError: no tensor is ternary.
    """
    made: dict[str, GGMLQuantizationType] = {}
    for name, kind in kinds.items():
        matrix = kind.name != "F32"
        found = exact_kind(tensors[name], wanted) if matrix and name not in EMBEDDINGS else None
        made[name] = found or (float_type if matrix else kind)
        tensors.release()
    narrow = [name for name, kind in made.items() if kind.name == "Q4_0"]
    if not narrow and wanted not in made.values():
        raise SurgeryError(
            f"GGUF type {wanted.name} is for ternary weights, and this model has none; run `llmsurgeon ternary` first, "
            "or choose another type"
        )
    if not narrow:
        return made, []
    said = (
        f"{len(narrow)} ternary tensors, {narrow[0]} the first, are Q4_0, which holds them exactly: their rows are not "
        f"whole blocks of {wanted.name} with one scale each"
    )
    return made, [said]


def _fell_back(dimensions: int, chosen: GGMLQuantizationType, wanted: GGMLQuantizationType) -> bool:
    return chosen.name == "F16" and wanted.name != "F16" and dimensions > 1


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * block_bytes
