"""A checkpoint in another form: the same model, written for those who read that form."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from llmsurgeon.boundary.foreign import json_object, shortened
from llmsurgeon.checkpoint.atomic import write_whole
from llmsurgeon.checkpoint.push import prepare
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.beside import GENERATION
from llmsurgeon.formats.bitnet import LinearClass
from llmsurgeon.formats.forms import forms_of_towers
from llmsurgeon.formats.gguf.modelfile import modelfile as modelfile_of
from llmsurgeon.formats.gguf.write import Asked, Model, write_gguf
from llmsurgeon.formats.gguf.write import Exported as GGUF
from llmsurgeon.formats.loading import load_tokenizer
from llmsurgeon.formats.names import CheckpointName
from llmsurgeon.model.costs import Costs
from llmsurgeon.planning.inputs import Inputs
from llmsurgeon.planning.opened import open_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.records import write_export_records
from llmsurgeon.planning.student import packed_by_value, student_of, without_empty_layers
from llmsurgeon.report.gguf_card import gguf_card
from llmsurgeon.report.origin import inherited, origin_of


@dataclass(frozen=True)
class Exported:
    """What an export made: where, in which form, where that loads, the costs of both."""

    out: Path
    format: CheckpointName
    loads: str
    before: Costs
    after: Costs


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: CheckpointName,
    options: Options | None = None,
    *,
    revision: str | None = None,
    linear_class: LinearClass | None = None,
) -> Exported:
    """Write `model` (hub id, folder or GGUF file) to the folder `out` as a checkpoint of the form `to`.

    Tensors that the form takes as they are go by byte range; the rest is computed a block of rows at a time.
    bitnet packs the linears whose weights are ternary, for transformers' `linear_class`. `revision` is the model's, on
    the hub.

    Raises:
        SurgeryError: bad input, or a block that the form cannot express; nothing is written to `out`.
    """
    model, out, options = os.fspath(model), os.fspath(out), options or Options()
    if to not in get_args(CheckpointName):
        known = ", ".join(get_args(CheckpointName))
        raise SurgeryError(f"form {shortened(to)}: expected one of {known}; export_gguf writes GGUF files")
    parent = open_model(model, revision, options.trust_remote_code)
    checkpoint = parent.checkpoint
    place = options.staging(checkpoint.path)
    Stage.check(out, **place)
    repository = prepare(options.push)
    packing = partial(packed_by_value, linear_class=linear_class)
    student = student_of(parent, parent.subject({}), parent.weights, to, packing)
    inputs = Inputs.of("export", {"model": checkpoint}, None, options, format=to, linear_class=linear_class)
    with Stage.open(
        out,
        job=inputs.job(),
        needed_bytes=student.costs.disk_bytes,
        **place,
    ) as stage:
        weights = student.written.published(student.weights, parent.family)
        stage.write_weights(weights, max_shard_size=options.max_shard_size, checksum=options.checksum)
        before = write_export_records(stage, parent, student, repository)
        stage.confirm(inputs.check)
        made = Exported(stage.commit(), to, student.written.loads, before, student.costs)
    if repository:
        options.say(f"pushed to {repository.send(made.out)}")
    return made


def export_gguf(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str = "F16",
    float_type: str | None = None,
    pre: str | None = None,
    modelfile: bool = False,
    options: Options | None = None,
    revision: str | None = None,
) -> GGUF:
    """Write `model` as the GGUF file `out`, for llama.cpp; `type`, `float_type` and `pre` as in `Asked`.

    modelfile: write OUT.Modelfile beside it, too, for Ollama.

    Raises:
        SurgeryError: bad input, or something that llama.cpp cannot run; nothing is written.
    """
    model, out, options = os.fspath(model), os.fspath(out), options or Options()
    parent = open_model(model, revision, options.trust_remote_code)
    if parent.tower:
        raise SurgeryError(
            f"{model}: format gguf holds text models alone, this one is vision-language ({parent.model_type}); "
            f"formats that can: {', '.join(forms_of_towers())}"
        )
    beside = Path(out).expanduser().with_suffix(".Modelfile") if modelfile else None
    if beside and os.path.lexists(beside) and not options.overwrite:
        raise SurgeryError(f"{beside}: exists; pass --overwrite to replace it, or choose another output")
    repository = prepare(options.push, single_file=True)
    origin, heritage = origin_of(parent.checkpoint), inherited(parent.checkpoint)
    inputs = Inputs.of("export", {"model": parent.checkpoint}, None, options)
    inputs.watch("tokenizer", parent.checkpoint.own_tokenizer_files())
    subject, weights = without_empty_layers(parent.subject({}), parent.weights)
    base = (origin.hub_id,) if origin.hub_id else heritage.base_models
    made = write_gguf(
        out,
        Model(parent.config, parent.family, subject.spec, weights, parent.checkpoint.path, options.trust_remote_code),
        Asked(type, float_type, pre, name=Path(parent.name).stem, heritage=replace(heritage, base_models=base)),
        place={"overwrite": options.overwrite, "sources": options.reads},
        check=inputs.check,
    )
    along: dict[str, bytes] = {}
    if beside:
        along[beside.name] = _modelfile(parent.checkpoint, made.path, heritage.license).encode()
        write_whole(beside, along[beside.name], overwrite=options.overwrite)
    if repository:
        if not repository.readme:
            along["README.md"] = gguf_card(repository.name, made.path.name, made.type, origin, heritage).encode()
        options.say(f"pushed to {repository.send(made.path, along)}")
    return made


def _modelfile(checkpoint: Checkpoint, file: Path, license: str | None) -> str:
    """The Modelfile of a GGUF file that was made from a checkpoint."""
    tokenizer = load_tokenizer(str(checkpoint.path), trust_remote_code=checkpoint.trust_remote_code)
    found = [each for each in checkpoint.companions.files if each.name == GENERATION]
    generation = json_object(found[0].read().decode(errors="replace"), GENERATION) if found else {}
    return modelfile_of(file, tokenizer, generation, license)


__all__ = ["Exported", "export", "export_gguf"]
