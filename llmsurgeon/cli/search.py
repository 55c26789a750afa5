"""`llmsurgeon search`: the best model under a budget."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsurgeon.boundary.limits import MOST_MINUTES, check_threads
from llmsurgeon.cli import console, say, tell
from llmsurgeon.cli.options import (
    DEVICE,
    DISCARD,
    OVERWRITE,
    Batch,
    Dtype,
    Seed,
    SelfShare,
    TrustRemoteCode,
    length_option,
    short_name,
    text_file,
    tokens_option,
    usable_device,
)

if TYPE_CHECKING:
    from llmsurgeon.search import Preview
    from llmsurgeon.searching.found import Bound, Found


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("search")(search_command)


def search_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.", show_default=False)],
    target: Annotated[
        list[str],
        typer.Option(
            help="What to reach: decode=1.5x, prefill=1.2x, params=0.7x, flops=0.5x, size=300MB, memory=0.6x, kv=0.5x; "
            "may be given several times.",
            show_default=False,
        ),
    ],
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to write; default: MODEL-search.")] = None,
    make: Annotated[
        str | None,
        typer.Option(help="Folder for the model itself, too: what `run` would make of the recipe.", show_default=False),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="What will run the result: llama.cpp:q8_0, transformers ...")
    ] = None,
    context: Annotated[int, length_option("Tokens that a sequence has read when speed is timed.")] = 512,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of the engine; default: as many as there are.", callback=check_threads),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text like what the model will meet: .txt, .jsonl or .parquet.", callback=text_file),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Such text on the hub, NAME[:CONFIG][:SPLIT].")] = None,
    self_share: SelfShare = None,
    tokens: Annotated[int, tokens_option("How many tokens score each option; as many fit it.")] = 4096,
    refit_tokens: Annotated[
        int, tokens_option("How many tokens the recipe's refit reads, of which a search takes some.")
    ] = 65_536,
    seq_len: Annotated[
        int | None, length_option("Tokens in a sequence; default: 256, or the model's positions if fewer.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="An operation that may be used; default: all but trim_vocab; all: that, too, where there is a text."
        ),
    ] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="An operation that may not.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="End, with the best that is known, about then.", min=0.01, max=MOST_MINUTES)
    ] = None,
    heal: Annotated[
        float | None,
        typer.Option(help="Let the recipe end with so many minutes of training.", min=0.01, max=MOST_MINUTES),
    ] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help=DEVICE, callback=usable_device)] = "auto",
    dtype: Dtype = None,
    batch: Batch = 8,
    revision: Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the space and what scoring it takes.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    discard_partial: Annotated[bool, typer.Option("--discard-partial", help=DISCARD)] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the best model under a budget, and write the recipe that makes it.

    Each layer's options are scored after a closed-form fit of their own, one a layer is chosen by an integer program,
    whole models are measured, and the best is made and timed in the engine. What was measured is kept: a search that
    was killed goes on, and one for another target is quick.
    """
    from llmsurgeon.processes.world import first
    from llmsurgeon.search import Wanted, preview, search

    wanted = Wanted(
        engine=engine,
        context=context,
        threads=threads,
        batch=batch,
        text=text,
        dataset=dataset,
        self_share=self_share,
        tokens=tokens,
        refit_tokens=refit_tokens,
        sequence_length=seq_len,
        allow=tuple(allow or ()),
        forbid=tuple(forbid or ()),
        minutes=minutes,
        heal=heal,
        seed=seed,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        show_preview(preview(model, target, wanted, say), as_json)
        return
    folder = out or f"{short_name(model)}-search"
    found = search(
        model, target, folder, wanted, make=make, overwrite=overwrite, discard_partial=discard_partial, say=say
    )
    if not first():
        return  # it has written nothing, and has nothing to show
    if as_json:
        print(json.dumps(found.plain()))
        return
    show_found(found, Path(folder), model, make)


def show_preview(made: Preview, as_json: bool) -> None:
    """The options by operation, and what scoring them takes."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from llmsurgeon.progress import spoken

    space, work = made.space, made.work
    kinds: dict[str, dict[str, None]] = {}
    layers: dict[str, set[int]] = {}
    for option in space.options:
        for offer in option.offers if option.single else ():
            kinds.setdefault(offer.steps[-1].op, {})[offer.name] = None
            layers.setdefault(offer.steps[-1].op, set()).update(offer.layers)
    report: dict[str, Any] = {
        "layers": len(space.parent.spec.layers),
        "options": work.options,
        "scored": work.scored,
        "layer_evaluations": work.evaluations,
        "seconds": round(work.seconds),
        "measuring": list(made.measuring),
        "operations": {op: list(names) for op, names in kinds.items()},
        "targets": [meter.target.written for meter in space.meters],
    }
    if as_json:
        print(json.dumps(report))
        return
    table = Table(title=f"{space.parent.name}: {report['layers']} layers", title_justify="left", box=SIMPLE_HEAD)
    for column in ("operation", "layers", "choices"):
        table.add_column(column)
    for op, names in kinds.items():
        some = list(names)
        shown = ", ".join(some[:6]) + (f" and {len(some) - 6} more" if len(some) > 6 else "")
        table.add_row(op, str(len(layers[op])) if layers[op] else "the table", shown)
    console().print(table)
    tell(f"{work.options} options, {work.scored} of them scored by {work.evaluations:,} evaluations of a layer")
    tell(f"about {spoken(work.seconds)} of scoring here, before choosing and making")
    if any(option.rows for option in space.options):
        tell(
            "the vocabulary may shrink: whoever runs the result takes its tokenizer along; --forbid trim_vocab keeps it"
        )
    for line in made.measuring:
        tell(line)


def amount(bound: Bound, cost: float) -> str:
    """A cost in the unit of its target, of which seconds are told in milliseconds."""
    from llmsurgeon.model.costs import human

    if bound.name in ("decode", "prefill"):
        return f"{1000 * cost:.3g} ms {bound.unit}"
    return human(cost, bound.unit) if bound.unit == "B" else f"{human(cost)} {bound.unit}"


def show_found(found: Found, folder: Path, model: str, make: str | None) -> None:
    """What was reached, and what lies in the folder now."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = found.model if found.engine == "none" else f"{found.model}, {found.engine}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("layers", "what stands there", f"{found.short} alone"):
        table.add_column(column, justify="left")
    for chosen in found.layers:
        if chosen.kl or chosen.name != "as it is":
            ends = dict.fromkeys((chosen.layers[0], chosen.layers[-1]))
            table.add_row("-".join(map(str, ends)), chosen.name, f"{chosen.kl:.4f}")
    console().print(table)
    if found.table:
        tell(f"vocabulary: {found.table.rows:,} of {found.table.parent:,} rows, KL alone {found.table.kl:.4f}")
    for bound in found.bounds:
        measured = "not measured" if bound.measured is None else f"measured {amount(bound, bound.measured)}"
        told = f"at most {amount(bound, bound.budget)}, predicted {amount(bound, bound.predicted)}, {measured}"
        tell(f"{bound.target}: {bound.ratio:.3g}x; {told}")
    for point in found.points:
        if point.kind == "made":
            told = "" if point.perplexity is None else f", perplexity {point.perplexity:.3f} times the parent's"
            told += "" if point.pooled is None else f", pooled states at a cosine of {point.pooled:.4f} to the parent's"
            on = "text that fitted and chose nothing" if point.held_out else "the text that chose"
            tell(f"made: {found.short} {point.kl:.4f} on {on}{told}")
    for note in found.notes:
        tell(note)
    for name in sorted(path.name for path in folder.iterdir()):
        tell(f"wrote {folder / name}")
    if make:
        tell(f"wrote {make}")
        tell(f"next: llmsurgeon eval {shlex.quote(make)} --against {shlex.quote(model)} --text FILE")
    else:
        tell(f"next: llmsurgeon run {shlex.quote(str(folder / 'recipe.yaml'))} -o OUT")
