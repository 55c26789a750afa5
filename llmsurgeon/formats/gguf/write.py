"""Write a model as a GGUF file, for llama.cpp and all that embeds it.

Weights pass through as transforms over the checkpoint, some rows at a time: read, put in llama.cpp's order, turned into
the wanted type, written. The file lies in the folder OUT.gguf.partial until it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.checkpoint.disk import NOTHING, explained
from llmsurgeon.checkpoint.gguf.file import STRING, UINT32, Field
from llmsurgeon.checkpoint.shards import file_order, meta_weights
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.transform import TransformedWeights, blocks, root_of
from llmsurgeon.checkpoint.weight_file import raise_unless_finite
from llmsurgeon.checkpoint.writer import FileStage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.forms import forms_that_can
from llmsurgeon.formats.gguf.model import Layout, lay_out, why_not
from llmsurgeon.formats.gguf.ternary import exact_kind, ternary_q4_0
from llmsurgeon.formats.gguf.tokenizer import tokenizer_fields
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# What the `gguf` package can make, best first.
TYPES = ("F32", "BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0")
TERNARY = ("TQ1_0", "TQ2_0")
FLOATS = ("F32", "F16", "BF16")
EMBEDDINGS = ("token_embd.weight", "output.weight")
POSITIONS = "position_embd.weight"
ROUTER = "ffn_gate_inp.weight"
NUMBERS_AT_ONCE = 2**22  # converted in float32


@dataclass(frozen=True)
class Exported:
    """What was written. `architecture` is llama.cpp's name; `notes` say where it will differ."""

    path: Path
    architecture: str
    type: str
    size: int
    notes: tuple[str, ...]


def write_gguf(
    out: Path | str,
    *,
    config: Mapping[str, Any],
    family: Family,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    source: Path,
    type: str = "F16",
    float_type: str | None = None,
    name: str | None = None,
    pre: str | None = None,
    overwrite: bool = False,
    reads: Sequence[Path] = (),
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Exported:
    """Write a model as one GGUF file.

    `config` is normalised, `weights` have canonical names, `source` is the folder or GGUF file that holds the
    tokenizer. `type` is what matrices are stored in, see TYPES; norms, biases, routers and learnt positions stay
    float32. With a ternary type, tensors that it cannot hold exactly are Q4_0 where that holds them, else `float_type`
    (F16). `pre` names the pre-tokenizer where it cannot be recognised; `trust_remote_code` lets the tokenizer's own
    code run. `reads` are files and folders beside `source` that are read and must survive. `progress` is called with
    (bytes done, in total); `check` once all is written, and where it raises, OUT does not appear.

    Raises:
        SurgeryError: llama.cpp cannot run this model or its tokenizer, OUT exists, the disk fails, or the checkpoint
            changed meanwhile.
    """
    path = local_path(out).absolute()
    kind = _known_type(type)
    if path.suffix != ".gguf":
        raise SurgeryError(f"{path}: a GGUF file's name ends in .gguf")
    FileStage.check(path, overwrite=overwrite, sources=(source, *reads))
    layout = _laid_out(config, family, spec, weights)
    tokenizer = tokenizer_fields(source, spec.vocab, pre, trust_remote_code)
    notes = [*layout.notes, *tokenizer.notes]
    tensors = TransformedWeights(weights, layout.transforms)
    meta = meta_weights(tensors)
    kinds = {tensor: _kind_of(tensor, tuple(meta[tensor].shape), kind) for tensor in file_order(tensors)}
    if kind.name in TERNARY:
        kinds, said = _ternary_kinds(tensors, kinds, kind, _float_type(float_type))
        notes += said
    elif float_type:
        raise SurgeryError(
            f"a float type goes with {' and '.join(TERNARY)}, for what is not ternary; {kind.name} is one"
        )
    narrow = (
        []
        if kind.name in TERNARY
        else [tensor for tensor, chosen in kinds.items() if _fell_back(tensor, meta[tensor].dim(), chosen, kind)]
    )
    if narrow:
        notes.append(
            f"{len(narrow)} tensors, {narrow[0]} the first, are F16: their rows are not whole blocks of {kind.name}"
        )
    title = tokenizer.model_name(name or path.stem)
    fields = [*_general(title, kind, kinds), *layout.fields, *tokenizer.fields]
    sizes = {tensor: _bytes(tuple(meta[tensor].shape), chosen) for tensor, chosen in kinds.items()}
    place = FileStage.open(
        path,
        job={"verb": "export", "format": "gguf"},
        overwrite=overwrite,
        sources=(source, *reads),
        needed_bytes=sum(sizes.values()),
    )
    with place as stage, explained(path, then=NOTHING):
        with closing(_writer(stage.path, layout.architecture, fields, meta, kinds, sizes)) as writer:
            _write_tensors(writer, tensors, kinds, sizes, progress, exact=kind.name in TERNARY)
        if isinstance(root := root_of(weights), Checkpoint):
            root.check_unchanged()
        check()
        stage.commit()
    return Exported(path, layout.architecture, kind.name, path.stat().st_size, tuple(notes))


def _laid_out(config: Mapping[str, Any], family: Family, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Layout:
    try:
        return lay_out(config, family, spec, weights)
    except SurgeryError as error:
        others = forms_that_can(spec, family, config)
        # What native fills up with zeros is of one shape.
        then = "native" in others and not spec.uniform and why_not(family.model_type) is None
        hint = " (a GGUF can be made of native, which fills up with zeros)" if then else ""
        raise SurgeryError(
            f"format gguf cannot hold this model: {error}; formats that can: {', '.join(others)}{hint}"
        ) from error


def _known_type(name: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if name.upper() not in TYPES:
        raise SurgeryError(
            f"GGUF type {name!r} cannot be made here; those that can are {', '.join(TYPES)}. For others (Q4_K_M ...) "
            "write F16 and run llama.cpp's llama-quantize on it"
        )
    return GGMLQuantizationType[name.upper()]


def _kind_of(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of one tensor: vectors and routers stay float32, embeddings and head are spared the coarsest types."""
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Kind

    if len(shape) < 2 or "norm" in name or name == POSITIONS or name.endswith(ROUTER):
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


def _fell_back(name: str, dimensions: int, chosen: GGMLQuantizationType, wanted: GGMLQuantizationType) -> bool:
    kept = name in EMBEDDINGS and wanted.name in TERNARY
    return chosen.name == "F16" and wanted.name != "F16" and dimensions > 1 and not kept


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * block_bytes


def _general(name: str, kind: GGMLQuantizationType, kinds: Mapping[str, GGMLQuantizationType]) -> list[Field]:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    types = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    fields = [
        Field("general.type", "model", STRING),
        Field("general.name", name, STRING),
        Field("general.file_type", int(LlamaFileType[types.get(kind.name, f"MOSTLY_{kind.name}")]), UINT32),
    ]
    if any(chosen.name not in ("F32", "F16", "BF16") for chosen in kinds.values()):
        fields.append(Field("general.quantization_version", GGML_QUANT_VERSION, UINT32))
    return fields


def _writer(
    path: Path,
    architecture: str,
    fields: list[Field],
    meta: Mapping[str, Tensor],
    kinds: Mapping[str, GGMLQuantizationType],
    sizes: Mapping[str, int],
) -> GGUFWriter:
    """A writer that knows the metadata and what tensors there will be."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    for entry in fields:
        inner = None if entry.inner is None else GGUFValueType(entry.inner)
        writer.add_key_value(entry.key, entry.value, GGUFValueType(entry.kind), inner)
    for tensor, kind in kinds.items():
        writer.add_tensor_info(tensor, tuple(meta[tensor].shape), np.dtype(np.float32), sizes[tensor], kind)
    return writer


def _write_tensors(
    writer: GGUFWriter,
    tensors: TransformedWeights,
    kinds: Mapping[str, GGMLQuantizationType],
    sizes: Mapping[str, int],
    progress: Callable[[int, int], None] | None,
    exact: bool,
) -> None:
    """The whole file: header, metadata, and each tensor some rows at a time; `exact`: Q4_0 is of ternary weights."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file, done, total = writer.fout[0], 0, sum(sizes.values())
    writer.write_padding(file, file.tell())
    for tensor, kind in kinds.items():
        for part in _encoded(tensors, tensor, kind, exact):
            file.write(part)
            done += len(part)
            if progress:
                progress(done, total)
        writer.write_padding(file, sizes[tensor])
        if tensor == tensors.group(tensor)[-1]:
            tensors.release()
    file.flush()
    os.fsync(file.fileno())


def _encoded(
    weights: TransformedWeights, name: str, kind: GGMLQuantizationType, exact: bool = False
) -> Iterator[memoryview]:
    """The bytes of one tensor, some rows at a time."""
    from gguf.quants import quantize

    for layer in blocks(weights, name):
        rows = layer.reshape(-1, layer.shape[-1])
        for part in rows.split(max(1, NUMBERS_AT_ONCE // rows.shape[1])):
            numbers = part.detach().to("cpu", torch.float32)
            raise_unless_finite(name, numbers)
            if kind.name == "F16" and numbers.abs().max() > torch.finfo(torch.float16).max:
                raise SurgeryError(f"GGUF: {name} holds numbers beyond float16's range; write it with --type BF16")
            rows_of_block = numbers.contiguous().numpy()
            made = ternary_q4_0(rows_of_block) if exact and kind.name == "Q4_0" else quantize(rows_of_block, kind)
            yield np.ascontiguousarray(made).view(np.uint8).reshape(-1).data
