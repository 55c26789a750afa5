"""`analyze`: what can go. Every score of a model, measured, and a recipe that follows from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from llmsurgeon.analysis.attention_order import default_count, runs_of, search_attentions
from llmsurgeon.analysis.ffn_dependency import ffn_dependency
from llmsurgeon.analysis.greedy import SEARCH_TOKENS
from llmsurgeon.analysis.measure import measure
from llmsurgeon.analysis.result import Analysis
from llmsurgeon.analysis.score import few
from llmsurgeon.checkpoint.out_place import existing
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.formats.loading import dtype_of
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.planning.inputs import Inputs
from llmsurgeon.planning.opened import open_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.texts import Texts
from llmsurgeon.processes.first import only_first
from llmsurgeon.processes.world import join
from llmsurgeon.progress import Say, silent
from llmsurgeon.recipe.recipe import calibration
from llmsurgeon.report.analysis import html_report
from llmsurgeon.text.files import named_text

SEQUENCE_LENGTH = 256
REFIT_TOKENS = 65_536  # the refit of the suggested recipe wants more text than the scores do


def analyze(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    self_share: float | None = None,
    tokens: int = 8192,
    sequence_length: int | None = None,
    drop: int | None = None,
    max_run: int = 3,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    batch: int = 8,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Say = silent,
) -> Analysis:
    """Measure `model` (hub id, folder or GGUF file) and write to the folder `out` what can go, and a recipe for it.

    Layers are read one at a time, so the model may be larger than memory; several processes, where a launcher started
    them, share the text, and the first one writes. Without `text` (a .txt, .jsonl or .parquet
    file) and `dataset` (NAME[:CONFIG][:SPLIT] on the hub) the calibration text is sampled from the model itself. `out`
    holds report.html, report.json (docs/report.md), scores.safetensors and suggested.yaml, which `run` takes as it is.

    Args:
        self_share: the share that the model writes beside `text` or `dataset`, of all kinds; None: 0.25, of encoders 0.
        tokens: how many to measure on, in windows of `sequence_length`: 256, or as many as the model has positions.
        drop: attentions to drop; None: about a quarter of the layers.
        max_run: the longest run of FFNs to fuse.
        seed: of sampled text.
        device: "auto" (a card where there is one), "cpu", "cuda" ...
        dtype: "float32", "bfloat16" or "float16"; None: the checkpoint's own, or
            float32 on a CPU without bfloat16.
        batch: sequences that go through a layer together.
        revision: of `model`, on the hub; trust_remote_code: let code that its tokenizer brings along run.
        overwrite: replace `out` if it holds nothing but what llmsurgeon wrote.
        say: is told what is measured on, and what cannot be had.

    Raises:
        RecipeError: a number of tokens, a length or a seed that cannot be.
        SurgeryError: a model or a text that cannot be read, an `out` that cannot be written, nothing that can go.
    """
    join()
    text = named_text(text)
    options = Options(device=chosen_device(device), dtype=dtype_of(dtype), batch=batch, say=say)
    parent = open_model(os.fspath(model), revision, trust_remote_code)
    longest = min(SEQUENCE_LENGTH, parent.spec.max_positions or SEQUENCE_LENGTH)
    length = longest if sequence_length is None else sequence_length
    given = {"text": text, "dataset": dataset, "self_share": self_share, "sequence_length": length}
    wanted = calibration(**given, tokens=tokens, seed=seed)
    refit_on = {**given, "tokens": max(tokens, REFIT_TOKENS)}
    inputs = Inputs.of("analyze", {"model": parent.checkpoint}, None, Options())
    if text:
        inputs.watch_text("text", text)
    # Opened before anything is measured: a folder that cannot be written is heard of at once.
    read = (parent.checkpoint.path, *existing(text, dataset))
    with only_first(lambda: Stage.open(os.fspath(out), job=inputs.job(), overwrite=overwrite, sources=read)) as stage:
        texts = Texts(parent, wanted, tokens, options)
        count = default_count(len(parent.spec.layers)) if drop is None else drop
        found = suggest(texts, count, max_run, refit_on)
        if stage is not None:
            stage.confirm(inputs.check)
            write(stage, found)
    return found


def suggest(texts: Texts, count: int, max_run: int, refit_on: Mapping[str, Any]) -> Analysis:
    """Measure every score, choose `count` attentions together with the runs they make, and measure M for what is left.

    Raises:
        SurgeryError: more attentions wanted than the model has, or none can go.
    """
    layers = len(texts.parent.spec.layers)
    if not 1 <= count < layers:
        raise SurgeryError(f"--drop {count}: expected 1 to {layers - 1}, the model has {layers} attentions")
    windows, runner, batch = texts.windows, texts.runner, texts.options.batch
    family = runner.family
    measured = measure(runner, windows, batch)
    sample = few(windows, SEARCH_TOKENS)
    fuses = FuseFFN.declined(family) is None
    attention_kl = measured.scores["attention_kl"].mean
    choices = search_attentions(runner, sample, count, max_run, fuse=fuses, batch=batch, attention_kl=attention_kl)
    if not choices:
        raise SurgeryError(f"no attention can go with runs of at most {max_run} blocks; raise --max-run (2 or more)")
    if len(choices) < count:
        texts.options.say(f"only {len(choices)} of {count} attentions can go with runs of at most {max_run} blocks")
    dropped = tuple(choice.layer for choice in choices)
    return Analysis(
        model=texts.parent.name,
        family=family.model_type,
        layers=layers,
        tokens=windows.numel(),
        sequence_length=windows.shape[1],
        text=texts.description,
        measurements=measured,
        choices=tuple(choices),
        dropped=dropped,
        runs=runs_of(frozenset(dropped), layers) if fuses else (),
        ffn_dependency=ffn_dependency(runner, sample, frozenset(dropped), batch),
        refit_on=refit_on,
        distance="cosine" if family.encoder else "kl",
        fuses=fuses,
    )


def write(stage: Stage, analysis: Analysis) -> None:
    """Write the four files of an analysis and make its folder appear.

    Raises:
        SurgeryError: the disk fails, or the folder has come to hold something meanwhile.
    """
    report, recipe = analysis.report(), analysis.recipe(Path(stage.out))
    stage.write_file("report.json", json.dumps(report, allow_nan=False) + "\n")
    stage.write_file("scores.safetensors", save(analysis.tensors()))
    stage.write_file("suggested.yaml", recipe)
    stage.write_file("report.html", html_report(report, recipe))
    stage.commit()
