"""`llmsurgeon eval`: is the model still good?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from llmsurgeon.boundary.limits import LONGEST_SEQUENCE
from llmsurgeon.cli import console, say, tell
from llmsurgeon.cli.options import (
    DEVICE,
    Dtype,
    TrustRemoteCode,
    length_option,
    text_file,
    text_files,
    tokens_option,
    usable_device,
    whole,
)
from llmsurgeon.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table

    from llmsurgeon.evaluate import Metrics
    from llmsurgeon.evaluation.bits_per_byte import BitsPerByte
    from llmsurgeon.evaluation.decoders import Evaluation
    from llmsurgeon.evaluation.encoders import EncoderEvaluation
    from llmsurgeon.evaluation.strided import Strided


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("eval")(evaluate_command)


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="Further files of --texts.", metavar="[TEXT]...", show_default=False),
    ] = None,
    against: Annotated[str | None, typer.Option(help="The parent: adds KL, top-1 agreement and the ratio.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Text to measure on: .txt, .jsonl or .parquet.", callback=text_file)
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(help="Several texts, each judged by itself: --texts a.txt b.txt.", callback=text_files),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub dataset to measure on, NAME[:CONFIG][:SPLIT].")] = None,
    tokens: Annotated[int, tokens_option("How many tokens.")] = 32768,
    seq_len: Annotated[
        int | None, length_option("Tokens in a window; default: 512, or the models' positions if fewer.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, comma separated (needs the eval extra).")] = None,
    tasks_output: Annotated[
        str | None, typer.Option(help="Folder for lm-eval's own files of results, NAME/results_TIME.json.")
    ] = None,
    stride: Annotated[
        int | None,
        whole("Perplexity as llama-perplexity --ppl-stride, too; 0: as it measures without.", 0, LONGEST_SEQUENCE),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE, callback=usable_device)] = "auto",
    dtype: Dtype = None,
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity, and against a parent KL divergence and top-1 agreement, with 95 % confidence intervals.

    Without --text, --texts or --dataset the text is sampled from the parent (from MODEL where no parent is given), of
    all kinds that it writes, and each kind has a row of its own. Of an encoder (text needed): the cosine of hidden and
    pooled states to the parent's, and with a masked-LM head how both predict masked tokens.
    """
    from llmsurgeon.evaluate import evaluate
    from llmsurgeon.evaluation.encoders import EncoderEvaluation
    from llmsurgeon.evaluation.kinds import much_worse

    if more and not texts:
        raise SurgeryError(f"eval takes one model, and {more[0]} is a second; texts to judge on follow --texts")
    found = evaluate(
        model,
        against,
        text=text,
        texts=[*(texts or ()), *(more or ())],
        dataset=dataset,
        tokens=tokens,
        sequence_length=seq_len,
        tasks=[name.strip() for name in tasks.split(",")] if tasks else (),
        tasks_output=tasks_output,
        stride=stride,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        say=say,
    )
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    measured = found.evaluation
    console().print(_encoder_table(measured) if isinstance(measured, EncoderEvaluation) else _decoder_table(measured))
    if measured.kinds:
        console().print(_kinds_table(measured))
        for line in much_worse({kind: figures.to_dict() for kind, figures in measured.kinds.items()}):
            tell(line)
    if found.strided:
        console().print(_strided_table(found.strided))
    if found.tasks:
        console().print(_task_table(found.tasks, found.parent_tasks))


def _decoder_table(result: Evaluation) -> Table:
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


def _kinds_table(result: Evaluation | EncoderEvaluation) -> Table:
    """A row for each kind of text."""
    from rich.table import Table

    columns = {
        "perplexity": "perplexity",
        "ratio": "perplexity_ratio",
        "KL": "kl",
        "top-1": "top1_agreement",
        "hidden cosine": "hidden_cosine",
        "pooled cosine": "pooled_cosine",
        "masked KL": "masked_kl",
    }
    figures = list(result.kinds.values())
    known = {label: name for label, name in columns.items() if getattr(figures[0], name, None) is not None}
    table = Table(title="by kind of text, 95 % intervals", title_justify="left")
    for column in ("kind", "tokens", *known):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, found in result.kinds.items():
        cells = [_cell(getattr(found, name), getattr(found, f"{name}_interval", None)) for name in known.values()]
        table.add_row(kind, f"{found.tokens:,}", *cells)
    return table


def _cell(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.4g}" + (f"\n{interval[0]:.4g} to {interval[1]:.4g}" if interval else "")


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


def _rows_table(title: str, result: Evaluation | EncoderEvaluation | Strided, rows: dict[str, str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    _add_rows(table, result, rows)
    return table


def _add_rows(
    table: Table, result: Evaluation | EncoderEvaluation | BitsPerByte | Strided, rows: dict[str, str]
) -> None:
    for label, field in rows.items():
        value, interval = getattr(result, field), getattr(result, f"{field}_interval", None)
        if value is not None:
            table.add_row(label, f"{value:.4g}", f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "")


def _strided_table(result: Strided) -> Table:
    how = f"the last {result.stride} of" if result.stride else "the second halves of"
    title = f"{result.tokens:,} predicted tokens of one stream, {how} windows of {result.window}"
    rows = {"perplexity": "perplexity", "parent's perplexity": "parent_perplexity"}
    return _rows_table(title, result, rows)


def _task_table(tasks: Metrics, parent: Metrics | None) -> Table:
    from rich.table import Table

    table = Table()
    for column in ("task", "metric", "model", *(["parent"] if parent else [])):
        table.add_column(column, justify="right" if column in ("model", "parent") else "left")
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, metric, f"{value:.4f}", *([f"{parent[task][metric]:.4f}"] if parent else []))
    return table
