"""`evaluate`: is a model still good? Its figures on text, beside its parent's where one is named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.evaluation.layerwise import pair_of
from llmsurgeon.evaluation.pair import Pair, check_encoder
from llmsurgeon.evaluation.strided import Strided, stream, strided
from llmsurgeon.evaluation.tasks import check_tasks_available, run_tasks
from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.formats.loading import dtype_of
from llmsurgeon.processes.first import from_first
from llmsurgeon.processes.world import count
from llmsurgeon.progress import Say, silent
from llmsurgeon.text.files import file_text, named_text
from llmsurgeon.text.wanted import Calibration, Source

# Text sampled for analysis and refit uses seed 0; judging a model on the text it was fitted to would flatter it.
SEED = 1
SEQUENCE_LENGTH = 512
# Metric -> value, of a task of the evaluation harness.
Metrics = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` measured.

    text: how many tokens there were, and where they come from.
    evaluation: perplexity and, against a parent, KL, agreement and ratios; of an encoder cosines and masked tokens.
    tasks, parent_tasks: metrics of the evaluation harness, by task; None where none was asked for.
    strided: perplexity as llama.cpp measures it, where it was asked for.
    """

    model: str
    parent: str | None
    text: str
    evaluation: Evaluation | EncoderEvaluation
    tasks: Metrics | None = None
    parent_tasks: Metrics | None = None
    strided: Strided | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `eval --json` prints."""
        more: dict[str, Any] = {} if self.strided is None else {"strided": self.strided.to_dict()}
        if self.tasks is not None:
            more |= {"tasks": self.tasks, "parent_tasks": self.parent_tasks}
        return {"model": self.model, "parent": self.parent, "text": self.text, **self.evaluation.to_dict(), **more}


def evaluate(
    model: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    text: str | os.PathLike[str] | None = None,
    texts: Sequence[str | os.PathLike[str]] = (),
    dataset: str | None = None,
    tokens: int = 32_768,
    sequence_length: int | None = None,
    tasks: Sequence[str] = (),
    tasks_output: str | os.PathLike[str] | None = None,
    stride: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Say = silent,
) -> Evaluated:
    """Measure `model` (hub id, folder or GGUF file) on text, and against its parent where `against` names one.

    Models that memory does not hold are walked layer by layer; they want text.
    Without `text` (a .txt, .jsonl or .parquet file) and `dataset` (NAME[:CONFIG][:SPLIT] on the hub) the text is
    sampled from the parent, or from the model where there is none, of every kind that it writes. Each kind has figures
    of its own, and so has each of several files. Intervals are of 95 % confidence, over windows.

    Args:
        texts: several files in place of one, each of which gets the same part of the tokens.
        tokens: how many to measure on, in windows of `sequence_length`: 512, or as many as the models have positions.
        tasks: names of tasks of lm-eval, the evaluation harness, which the extra `eval` installs.
        tasks_output: a folder for the harness's own files of results.
        stride: measure perplexity over one stream of the text, too, as llama-perplexity does; 0: without a stride.
        device: "auto" (a card where there is one), "cpu", "cuda" ...
        dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's own, or
            float32 on a CPU without bfloat16.
        revision: of `model`, on the hub.
        trust_remote_code: let code that a tokenizer brings along run.
        say: is told what is measured on, and what cannot be.

    Raises:
        SurgeryError: a model, a text or a size that cannot be; two models that cannot be compared.
    """
    model, against = os.fspath(model), None if against is None else os.fspath(against)
    text = named_text(text)
    several = tuple(Source(named_text(each)) for each in texts)
    pair = pair_of(Pair(model, against, dtype_of(dtype), chosen_device(device), revision, trust_remote_code))
    if tasks:
        check_tasks_available()
        if count() > 1:
            raise SurgeryError("--tasks run in one process: start eval without torchrun or accelerate launch")
    if stride is not None and (text is None or pair.encoder):
        raise SurgeryError("--stride is for a decoder on a text: give --text FILE")
    if sequence_length is not None:
        Calibration(text, dataset, tokens, sequence_length, texts=several)  # what cannot be is said at once
    if pair.encoder:
        check_encoder(pair.encoder, model, against, bool(text or dataset or several), tasks)
    length = min([SEQUENCE_LENGTH, *pair.positions]) if sequence_length is None else sequence_length
    source = Calibration(text, dataset, tokens, length, seed=SEED, texts=several)
    windows = from_first(lambda: pair.sequences(source))
    described = source.describe(windows, "text", "the parent" if against else "the model itself")
    say(described)
    evaluation = pair.judge(windows, say)
    made = Evaluated(model, against, described.removeprefix("text: "), evaluation)
    if stride is not None and text is not None:
        tokens_T = stream(file_text(text), pair.tokenizer, tokens, text)
        same = pair.parent if isinstance(evaluation, Evaluation) and evaluation.bits is None else None
        made = replace(made, strided=strided(pair.student, tokens_T, pair.tokenizer, length, stride, same))
    if not tasks:
        return made
    output = None if tasks_output is None else Path(tasks_output).expanduser()
    theirs = None
    if pair.parent is not None:
        theirs = run_tasks(pair.parent, pair.tokenizer, tasks, name=str(against), output=output)
    mine = run_tasks(pair.student, pair.tokenizer, tasks, name=model, output=output)
    return replace(made, tasks=mine, parent_tasks=theirs)
