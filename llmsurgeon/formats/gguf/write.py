"""Write a model as a GGUF file, for llama.cpp and all that embeds it.

Weights pass through as transforms over the checkpoint, some rows at a time: read, put in llama.cpp's order, turned into
the wanted type, written. The file lies in the folder OUT.gguf.partial until it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.checkpoint.card_file import Heritage
from llmsurgeon.checkpoint.disk import NOTHING, explained
from llmsurgeon.checkpoint.gguf.card import card_fields
from llmsurgeon.checkpoint.gguf.file import STRING, UINT32, Field
from llmsurgeon.checkpoint.shards import meta_weights
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.transform import TransformedWeights, blocks, root_of
from llmsurgeon.checkpoint.weight_file import raise_unless_finite
from llmsurgeon.checkpoint.writer import FileStage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.forms import forms_that_can
from llmsurgeon.formats.gguf.kinds import FLOATS, Kinds, chosen_kinds, known_type
from llmsurgeon.formats.gguf.llama_quantizer import llama_quantize
from llmsurgeon.formats.gguf.model import Layout, lay_out, why_not
from llmsurgeon.formats.gguf.ternary import ternary_q4_0
from llmsurgeon.formats.gguf.tokenizer import tokenizer_fields
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

NUMBERS_AT_ONCE = 2**22  # converted in float32


@dataclass(frozen=True)
class Exported:
    """What was written. `architecture` is llama.cpp's name; `notes` say where it will differ."""

    path: Path
    architecture: str
    type: str
    size: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """What is written: `config` is normalised, `weights` have canonical names, `source` holds the tokenizer.

    trust_remote_code: whether the tokenizer's own code may run.
    """

    config: Mapping[str, Any]
    family: Family
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    source: Path
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Asked:
    """How it is written.

    type: what matrices are stored in, see TYPES and MIXES; norms, biases, routers and learnt positions stay float32.
    float_type: with a ternary type, of tensors that neither it nor Q4_0 holds exactly; F16 where none is given.
    pre: the pre-tokenizer's name, where it cannot be recognised.
    heritage: what the cards of the model and of those before it say.
    name: what the file calls the model, where the tokenizer's files do not say; the file's own name by default.
    """

    type: str = "F16"
    float_type: str | None = None
    pre: str | None = None
    name: str | None = None
    heritage: Heritage = field(default_factory=Heritage)


def write_gguf(
    out: Path | str,
    model: Model,
    asked: Asked = Asked(),
    *,
    place: Mapping[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a model as one GGUF file.

    Args:
        place: `overwrite`, and `sources` beside the model's that are read and must survive, as `FileStage.open` has it.
        check: called once all is written; where it raises, OUT does not appear.
        progress: called with (bytes done, in total).

    Raises:
        SurgeryError: llama.cpp cannot run this model or its tokenizer, OUT exists, the disk fails, or the checkpoint
            changed meanwhile.
    """
    path = local_path(out).absolute()
    kind = known_type(asked.type)
    if path.suffix != ".gguf":
        raise SurgeryError(f"{path}: a GGUF file's name ends in .gguf")
    place = {**(place or {}), "sources": (model.source, *(place or {}).get("sources", ()))}
    FileStage.check(path, **place)
    layout = _laid_out(model)
    tokenizer = tokenizer_fields(model.source, model.spec.vocab, asked.pre, model.trust_remote_code)
    tensors = TransformedWeights(model.weights, layout.transforms)
    meta = meta_weights(tensors)
    kinds = chosen_kinds(tensors, meta, kind, asked.float_type, _heads_a_value(model.spec))
    sizes = kinds.sizes(meta)
    title = tokenizer.model_name(asked.name or path.stem)
    general = [*_general(title, kinds), *card_fields(asked.heritage)]
    fields = [*general, *layout.fields, *tokenizer.fields]
    job = {"verb": "export", "format": "gguf"}
    staged = FileStage.open(path, job=job, needed_bytes=sum(sizes.values()), **place)
    with staged as stage, explained(path, then=NOTHING):
        with closing(opened_writer(stage.path, layout.architecture, fields, meta, kinds)) as writer:
            _write_tensors(writer, tensors, kinds, sizes, progress)
        if isinstance(root := root_of(model.weights), Checkpoint):
            root.check_unchanged()
        check()
        stage.commit()
    notes = (*layout.notes, *tokenizer.notes, *kinds.notes)
    return Exported(path, layout.architecture, kind, path.stat().st_size, notes)


def _laid_out(model: Model) -> Layout:
    spec, family, config = model.spec, model.family, model.config
    try:
        return lay_out(config, family, spec, model.weights)
    except SurgeryError as error:
        others = forms_that_can(spec, family, config)
        # What native fills up with zeros is of one shape.
        then = "native" in others and not spec.uniform and why_not(family.model_type) is None
        hint = " (a GGUF can be made of native, which fills up with zeros)" if then else ""
        raise SurgeryError(
            f"format gguf cannot hold this model: {error}; formats that can: {', '.join(others)}{hint}"
        ) from error


def _general(name: str, kinds: Kinds) -> list[Field]:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    types = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    fields = [
        Field("general.type", "model", STRING),
        Field("general.name", name, STRING),
        Field("general.file_type", int(LlamaFileType[types.get(kinds.main, f"MOSTLY_{kinds.main}")]), UINT32),
    ]
    if any(chosen.name not in ("F32", "F16", "BF16") for chosen in kinds.of.values()):
        fields.append(Field("general.quantization_version", GGML_QUANT_VERSION, UINT32))
    return fields


def opened_writer(
    path: Path, architecture: str, fields: Sequence[Field], meta: Mapping[str, Tensor], kinds: Kinds
) -> GGUFWriter:
    """A writer that knows the metadata and what tensors there will be."""
    from gguf import GGUFValueType, GGUFWriter

    writer, sizes = GGUFWriter(path, architecture), kinds.sizes(meta)
    for entry in fields:
        inner = None if entry.inner is None else GGUFValueType(entry.inner)
        writer.add_key_value(entry.key, entry.value, GGUFValueType(entry.kind), inner)
    for tensor, kind in kinds.of.items():
        writer.add_tensor_info(tensor, tuple(meta[tensor].shape), np.dtype(np.float32), sizes[tensor], kind)
    return writer


def _write_tensors(
    writer: GGUFWriter,
    tensors: TransformedWeights,
    kinds: Kinds,
    sizes: Mapping[str, int],
    progress: Callable[[int, int], None],
) -> None:
    """The whole file: header, metadata, and each tensor some rows at a time."""
    file, done, total = begun(writer), 0, sum(sizes.values())
    for tensor, kind in kinds.of.items():
        for part in _encoded(tensors, tensor, kind, encoder_of(kinds, kind)):
            file.write(part)
            done += len(part)
            progress(done, total)
        writer.write_padding(file, sizes[tensor])
        if tensor == tensors.group(tensor)[-1]:
            tensors.release()
    file.flush()
    os.fsync(file.fileno())


def begun(writer: GGUFWriter) -> IO[bytes]:
    """The file with header, metadata and names written, where the first tensor's bytes go."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file: IO[bytes] = writer.fout[0]
    writer.write_padding(file, file.tell())
    return file


def _heads_a_value(spec: ModelSpec) -> int:
    return next((layer.attention.heads // layer.attention.kv_heads for layer in spec.layers if layer.attention), 1)


Encoder = Callable[[np.ndarray, "GGMLQuantizationType"], np.ndarray]


def encoder_of(kinds: Kinds, kind: GGMLQuantizationType) -> Encoder:
    """What turns rows into a type: Q4_0 of ternary weights is exact, mixtures are llama.cpp's own."""
    from gguf.quants import quantize

    if kinds.ternary and kind.name == "Q4_0":
        return lambda rows, kind: ternary_q4_0(rows)
    return llama_quantize if kinds.mixed and kind.name not in FLOATS else quantize


def _encoded(
    weights: TransformedWeights, name: str, kind: GGMLQuantizationType, encode: Encoder
) -> Iterator[memoryview]:
    """The bytes of one tensor, some rows at a time."""
    for layer in blocks(weights, name):
        rows = layer.reshape(-1, layer.shape[-1])
        for part in rows.split(max(1, NUMBERS_AT_ONCE // rows.shape[1])):
            numbers = part.detach().to("cpu", torch.float32)
            raise_unless_finite(name, numbers)
            if kind.name == "F16" and numbers.abs().max() > torch.finfo(torch.float16).max:
                raise SurgeryError(f"GGUF: {name} holds numbers beyond float16's range; write it with --type BF16")
            made = encode(numbers.contiguous().numpy(), kind)
            yield np.ascontiguousarray(made).view(np.uint8).reshape(-1).data
