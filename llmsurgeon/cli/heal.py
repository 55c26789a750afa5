"""`llmsurgeon heal`: a student and its parent in, a better student out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmsurgeon.cli import console, say, tell
from llmsurgeon.cli.convert import built, load
from llmsurgeon.cli.made import kinds_lines, plan_report, print_plan, shown, warning
from llmsurgeon.cli.options import (
    DEVICE,
    DISCARD,
    DTYPE_DEFAULT,
    OVERWRITE,
    ChecksumKind,
    Private,
    PushToHub,
    SelfShare,
    TrustRemoteCode,
    recipe_paths,
    short_name,
    target_of,
    text_file,
    usable_device,
)

if TYPE_CHECKING:
    from llmsurgeon.run import Outcome


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("heal")(heal_command)


def heal_command(
    student: Annotated[str, typer.Argument(help="The checkpoint to heal: folder or hub id.", show_default=False)],
    parent: Annotated[str, typer.Option(help="The model that it was cut from: folder, hub id or GGUF file.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Recipe whose distill steps are done; default: one, as it is.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder to write; default: STUDENT-healed.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to train; default: the recipe's, else 30.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Override: distill.tokens=500000, calibration.seed=1 ...")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text to train on: .txt, .jsonl or .parquet.", callback=text_file)
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub dataset to train on, NAME[:CONFIG][:SPLIT].")] = None,
    self_share: SelfShare = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the parent on the hub.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check models and recipe and print the plan; train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Refuse to begin anew: go on with what was killed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    discard_partial: Annotated[bool, typer.Option("--discard-partial", help=DISCARD)] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a weight file.")] = "5GB",
    checksum: ChecksumKind = "blake3",
    device: Annotated[
        str, typer.Option(help=f"{DEVICE} Under accelerate launch: what it was told.", callback=usable_device)
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help=f"Dtype that the parent runs in; {DTYPE_DEFAULT}")] = None,
    trust_remote_code: TrustRemoteCode = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Heal a cut model by distillation from its parent, in one process or by accelerate launch -m llmsurgeon heal.

    Without --text or --dataset it trains on text sampled from the parent. A run that was killed or stopped goes on
    when the same command is given again.
    """
    from llmsurgeon.formats.loading import dtype_of
    from llmsurgeon.heal import heal, prepare
    from llmsurgeon.run import Options

    push = target_of(push_to_hub, private)
    numbers = {"distill.minutes": minutes, "calibration.self_share": self_share}
    changes = [*(sets or ()), *(f"{key}={value}" for key, value in numbers.items() if value is not None)]
    given = (changes, text, dataset)
    wanted = load(recipe, *given) if recipe else built([{"op": "distill"}], *given)
    if dry_run:
        _, _, planned = prepare(student, parent, wanted, revision, trust_remote_code)
        print(json.dumps(plan_report(planned))) if as_json else print_plan(planned, notes=True)
        return
    options = Options(
        device,
        dtype_of(dtype),
        overwrite,
        max_shard_size,
        discard_partial=discard_partial,
        reads=recipe_paths(recipe),
        trust_remote_code=trust_remote_code,
        push=push,
        say=say,
        checksum=checksum,
    )
    target = out or f"{short_name(student)}-healed"
    work = partial(heal, student, parent, wanted, target, options, revision=revision, resume=resume)
    shown(work, lambda made: print(json.dumps(heal_report(made))) if as_json else print_healed(made))


def heal_report(outcome: Outcome) -> dict[str, Any]:
    """What was made, as JSON."""
    return {
        "out": str(outcome.out),
        "parent": outcome.planned.parent.name,
        "format": outcome.planned.written.format,
        **{op: result.record() for op, result in outcome.results.items()},
        "evaluation": outcome.evaluation.to_dict() if outcome.evaluation else None,
        "gate_missed": list(outcome.gate),
        "warning": warning(outcome),
    }


def print_healed(outcome: Outcome) -> None:
    """What was made, in a few lines."""
    out = console()
    for line in (line for result in outcome.results.values() for line in result.lines()):
        out.print(line, highlight=False, soft_wrap=True)
    if outcome.evaluation:
        for line in (f"held-out text: {outcome.evaluation.sentence()}", *kinds_lines(outcome.evaluation)):
            out.print(line, highlight=False, soft_wrap=True)
    if collapsed := warning(outcome):
        tell(f"WARNING: {collapsed}")
    out.print(f"wrote {outcome.out} (curves: {Path(outcome.out) / 'report.html'})", highlight=False, soft_wrap=True)
