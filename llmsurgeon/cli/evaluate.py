"""`llmsurgeon eval`: is the model still good?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsurgeon.cli import console, say
from llmsurgeon.cli.options import (
    TrustRemoteCode,
    dtype_of,
    length_option,
    text_file,
    tokens_option,
    usable_device,
)
from llmsurgeon.errors import CheckpointError, SurgeryError

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmsurgeon.evaluation.bits_per_byte import BitsPerByte
    from llmsurgeon.evaluation.decoders import Evaluation
    from llmsurgeon.evaluation.encoders import EncoderEvaluation
    from llmsurgeon.model.families import Family

# Text sampled for analysis and refit uses seed 0; judging a model on the text it was fitted to would flatter it.
SEED = 1
SEQUENCE_LENGTH = 512


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("eval")(evaluate_command)


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    against: Annotated[str | None, typer.Option(help="The parent: adds KL, top-1 agreement and the ratio.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Text to measure on: .txt, .jsonl or .parquet.", callback=text_file)
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub dataset to measure on, NAME[:CONFIG][:SPLIT].")] = None,
    tokens: Annotated[int, tokens_option("How many tokens.")] = 32768,
    seq_len: Annotated[
        int | None, length_option("Tokens in a window; default: 512, or the models' positions if fewer.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, comma separated (needs the eval extra).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...", callback=usable_device)] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity, and against a parent KL divergence and top-1 agreement, with 95 % confidence intervals.

    Without --text or --dataset the text is sampled from the parent (from MODEL where no parent is given). Of an encoder
    (text needed): the cosine of hidden and pooled states to the parent's, and with a masked-LM head how both predict
    masked tokens.
    """
    from llmsurgeon.evaluation.decoders import evaluate
    from llmsurgeon.evaluation.encoders import encoder_family, evaluate_encoder, masking_of, positions_of
    from llmsurgeon.evaluation.tasks import check_tasks_available, run_tasks
    from llmsurgeon.formats.loading import load_model, load_tokenizer
    from llmsurgeon.text.calibration import Calibration, calibration_tokens

    if tasks:
        check_tasks_available()
    if seq_len is not None:
        Calibration(text, dataset, tokens, seq_len)  # what cannot be is said before a model is loaded
    student = load_model(model, dtype=dtype_of(dtype), device=device, revision=revision)
    encoder = encoder_family(student)
    if encoder:
        _check_encoder(encoder, model, against, text or dataset, tasks)
    parent = load_model(against, dtype=dtype_of(dtype), device=device) if against else None
    limits = [limit for each in (student, parent) if each is not None and (limit := positions_of(each))]
    length = min([SEQUENCE_LENGTH, *limits]) if seq_len is None else seq_len
    source = Calibration(text, dataset, tokens, length, seed=SEED)
    load = partial(load_tokenizer, trust_remote_code=trust_remote_code)
    tokenizer = load(against) if against else load(model, revision)
    across = parent is not None and parent.config.vocab_size != student.config.vocab_size
    if encoder and across and against:
        parent, tokenizer = _trimmed_alike(model, revision, against, dtype_of(dtype), device), load(model, revision)
    elif against and not across:
        _check_same_tokens(lambda: load(model, revision), model, against, tokenizer)
    sampled = student if parent is None else parent
    windows = calibration_tokens(against or model, tokenizer, **asdict(source), model=sampled)
    described = source.describe(windows, "text", "the parent" if against else "the model itself")
    say(described)
    result: Any
    if encoder:
        result = evaluate_encoder(student, windows, parent, masking_of(tokenizer, windows, student, parent))
    elif parent is not None and across:
        result = _across(student, parent, load(model, revision), tokenizer, windows)
    else:
        result = evaluate(student, windows, parent)
    report = {"model": model, "parent": against, "text": described.removeprefix("text: "), **result.to_dict()}
    if tasks:
        names = [name.strip() for name in tasks.split(",")]
        report["tasks"] = run_tasks(student, tokenizer, names)
        report["parent_tasks"] = run_tasks(parent, tokenizer, names) if parent is not None else None
    if as_json:
        print(json.dumps(report))
        return

    console().print(_encoder_table(result) if encoder else _table(result))
    if tasks:
        console().print(_task_table(report["tasks"], report["parent_tasks"]))


def _trimmed_alike(
    model: str, revision: str | None, against: str, dtype: torch.dtype | None, device: str
) -> PreTrainedModel:
    """The parent with the tokens of `model`, whose vocabulary was trimmed, alone."""
    from llmsurgeon.checkpoint.source import open_checkpoint
    from llmsurgeon.formats.loading import model_of
    from llmsurgeon.vocabulary.trimmed import trimmed_like

    alike = trimmed_like(open_checkpoint(model, revision=revision), open_checkpoint(against))
    return model_of(alike, dtype=dtype, device=device)


def _across(
    student: PreTrainedModel,
    parent: PreTrainedModel,
    mine: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    windows: Tensor,
) -> Evaluation:
    """Models with different tokenizers on what the parent's `windows` say."""
    import torch

    from llmsurgeon.evaluation.bits_per_byte import passages, texts_of
    from llmsurgeon.evaluation.decoders import evaluate_across
    from llmsurgeon.text.calibration import window_start
    from llmsurgeon.vocabulary.keep import same_tokens

    limits = [getattr(each.config, "max_position_embeddings", None) for each in (student, parent)]
    limit = min((each for each in limits if each), default=None)
    found = passages(texts_of(windows, theirs), mine, theirs, window_start(mine), window_start(theirs), limit)
    kept = None
    try:
        rows = same_tokens(mine.get_vocab(), theirs.get_vocab(), student.config.vocab_size, "other tokens")
        kept = torch.tensor(rows)
    except SurgeryError as error:
        say(f"only bits per byte are measured: {error}")
    return evaluate_across(student, parent, found, kept)


def _check_same_tokens(
    load: Callable[[], PreTrainedTokenizerBase], model: str, against: str, theirs: PreTrainedTokenizerBase
) -> None:
    """Raise SurgeryError where the two models have as many tokens, but others."""
    try:
        mine = load().get_vocab()
    except CheckpointError:  # the model came without a tokenizer; the parent's reads the text anyway
        return
    parents = theirs.get_vocab()
    alike = sum(mine.get(token) == number for token, number in parents.items())
    # A file converted from another format may name a few special tokens otherwise.
    if alike < 0.9 * len(parents):
        raise SurgeryError(
            f"{model}: {alike:,} of the {len(parents):,} tokens of {against} have the same number in its tokenizer: "
            "KL and top-1 agreement need the same tokenizer; compare with the model it was cut from"
        )


def _check_encoder(family: Family, model: str, against: str | None, text: str | None, tasks: str | None) -> None:
    """Raise SurgeryError for what an encoder cannot be asked."""
    if not text:
        raise SurgeryError(
            f"{model}: {family.model_type} is an encoder and cannot sample text from itself; "
            "give --text FILE or --dataset NAME"
        )
    if tasks:
        raise SurgeryError(f"{model}: --tasks needs a model that predicts the next token, {family.model_type} does not")
    if not against and not family.head:
        raise SurgeryError(
            f"{model}: {family.model_class} has no masked-LM head, so only its agreement with a parent can be "
            "measured; give --against PARENT"
        )


def _table(result: Evaluation) -> Table:
    rows = {
        "perplexity": "perplexity",
        "parent's perplexity": "parent_perplexity",
        "perplexity ratio": "perplexity_ratio",
        "KL(parent || model), nats a token": "kl",
        "top-1 agreement": "top1_agreement",
    }
    table = _rows_table(f"{result.tokens:,} predicted tokens, windows of {result.sequence_length}", result, rows)
    if result.bits:
        bits = {
            "bits per byte": "bits_per_byte",
            "parent's bits per byte": "parent_bits_per_byte",
            "bits per byte, ratio": "ratio",
            "perplexity per word": "word_perplexity",
            "parent's perplexity per word": "parent_word_perplexity",
            "more tokens of the same text, share": "more_tokens",
        }
        _add_rows(table, result.bits, bits)
    if result.outside_mass is not None:
        table.add_row("parent's probability on tokens that are gone", f"{result.outside_mass:.4g}", "")
    return table


def _encoder_table(result: EncoderEvaluation) -> Table:
    rows = {
        "cosine of hidden states to the parent's": "hidden_cosine",
        "cosine of mean-pooled states to the parent's": "pooled_cosine",
        "masked tokens: perplexity": "masked_perplexity",
        "masked tokens: parent's perplexity": "parent_masked_perplexity",
        "masked tokens: perplexity ratio": "masked_perplexity_ratio",
        "masked tokens: KL(parent || model), nats": "masked_kl",
        "masked tokens: top-1 agreement": "masked_top1_agreement",
    }
    masked = f", {result.masked_tokens:,} of them masked" if result.masked_tokens else ""
    return _rows_table(f"{result.tokens:,} tokens, windows of {result.sequence_length}{masked}", result, rows)


def _rows_table(title: str, result: Evaluation | EncoderEvaluation, rows: dict[str, str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    _add_rows(table, result, rows)
    return table


def _add_rows(table: Table, result: Evaluation | EncoderEvaluation | BitsPerByte, rows: dict[str, str]) -> None:
    for label, field in rows.items():
        value, interval = getattr(result, field), getattr(result, f"{field}_interval", None)
        if value is not None:
            table.add_row(label, f"{value:.4g}", f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "")


def _task_table(tasks: dict[str, dict], parent: dict[str, dict] | None) -> Table:
    from rich.table import Table

    table = Table()
    for column in ("task", "metric", "model", *(["parent"] if parent else [])):
        table.add_column(column, justify="right" if column in ("model", "parent") else "left")
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric, f"{value:.4f}", *([f"{parent[task][metric]:.4f}"] if parent else []))
    return table
