"""`llmsurgeon run`, and the commands that are a recipe made of flags: checkpoint in, checkpoint out."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from llmsurgeon.cli import output, say
from llmsurgeon.cli.made import outcome_report, plan_report, print_outcome, print_plan, shown
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
    length_option,
    recipe_paths,
    short_name,
    target_of,
    text_file,
    tokens_option,
    usable_device,
)
from llmsurgeon.errors import RecipeError, SurgeryError

if TYPE_CHECKING:
    from llmsurgeon.recipe.recipe import Recipe
    from llmsurgeon.run import Outcome

Out = Annotated[
    str | None, typer.Option("--out", "-o", help="Folder to write; default: MODEL's name with the recipe's.")
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override: step.key=value, calibration.tokens=8192 ...")]
Text = Annotated[str | None, typer.Option(help="Calibration text: .txt, .jsonl or .parquet.", callback=text_file)]
Dataset = Annotated[str | None, typer.Option(help="Calibration dataset on the hub, NAME[:CONFIG][:SPLIT].")]
Tokens = Annotated[int | None, tokens_option("Calibration tokens; default: the recipe's.")]
SeqLen = Annotated[int | None, length_option("Tokens in a calibration sequence; default: the recipe's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; config.json alone is enough.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)]
Discard = Annotated[bool, typer.Option("--discard-partial", help=DISCARD)]
ShardSize = Annotated[str, typer.Option(help="Largest size of a weight file.")]
Device = Annotated[str, typer.Option(help=f"Where calibration runs. {DEVICE}", callback=usable_device)]
Dtype = Annotated[str | None, typer.Option(help=f"Dtype of calibration: float32, bfloat16; {DTYPE_DEFAULT}")]
Revision = Annotated[str | None, typer.Option(help="Revision of MODEL on the hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model = Annotated[str | None, typer.Argument(help="Hub id, folder or GGUF file; default: the recipe's model.")]
RecipeFile = Annotated[str | None, typer.Option("--recipe", "-r", help="Recipe file, or name of a built-in recipe.")]


@dataclass(frozen=True)
class Job:
    """What the commands that run a recipe have in common, as it was given."""

    model: str | None
    out: str | None
    dry_run: bool
    overwrite: bool
    discard_partial: bool
    max_shard_size: str
    checksum: str
    device: str
    dtype: str | None
    revision: str | None
    trust_remote_code: bool
    push_to_hub: str | None
    private: bool
    as_json: bool
    recipe: str | None = None


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    shared = [parameter for parameter in parameters_of(_shared) if parameter.name not in ("context", "recipe")]
    signed(run_command, [parameters_of(run_command)[0], *shared])
    app.command("run")(run_command)


def add_verb(
    app: typer.Typer, verb: str, ops: set[str], steps: Callable[..., list[dict[str, Any]]], label: str
) -> None:
    """Add a command that runs a recipe with a step of `ops`, or the recipe whose steps flags of its own stand for.

    steps: takes those flags and gives the steps; its docstring is the command's help.
    label: of OUT's default name where there is no recipe; may name flags in braces.
    """

    def command(context: typer.Context, **values: Any) -> None:
        flags = {name: values.pop(name) for name in inspect.signature(steps).parameters}
        recipe, calibration = values.pop("recipe"), calibration_of(values)
        if recipe:
            loaded = load(recipe, *calibration)
            must_have(context, loaded, ops, verb)
        else:
            loaded = built(steps(**flags), *calibration)
        go(loaded, Path(recipe or label.format(**flags)).stem, Job(**values, recipe=recipe))

    shared = parameters_of(_shared)
    signed(command, [*shared[:4], *parameters_of(steps), *shared[4:]])
    command.__doc__ = steps.__doc__
    app.command(verb)(command)


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """A function's parameters, their annotations resolved."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]


def signed(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Give a command the parameters that Typer is to read from its signature."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _shared(
    context: typer.Context,
    model: Model = None,
    recipe: RecipeFile = None,
    out: Out = None,
    sets: Sets = None,
    text: Text = None,
    dataset: Dataset = None,
    self_share: SelfShare = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    discard_partial: Discard = False,
    max_shard_size: ShardSize = "5GB",
    checksum: ChecksumKind = "blake3",
    device: Device = "auto",
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    as_json: AsJson = False,
) -> None:
    """What `run` and the verbs have in common; a verb has the first four before flags of its own, the rest behind."""


def run_command(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or name of a built-in recipe.", show_default=False)],
    **values: Any,
) -> None:
    """Run a recipe on a checkpoint and write the result as a new one."""
    calibration = calibration_of(values)
    go(load(recipe, *calibration), Path(recipe).stem, Job(**values, recipe=recipe))


def calibration_of(values: dict[str, Any]) -> tuple[list[str], str | None, str | None]:
    """Take out of a command's values what changes a recipe: (--set and numbers, --text, --dataset)."""
    flags = {"tokens": "tokens", "sequence_length": "seq_len", "self_share": "self_share"}
    numbers = {key: values.pop(flag) for key, flag in flags.items()}
    sets = [f"calibration.{key}={value}" for key, value in numbers.items() if value is not None]
    return [*(values.pop("sets") or ()), *sets], values.pop("text"), values.pop("dataset")


def load(recipe: str, sets: list[str], text: str | None, dataset: str | None) -> Recipe:
    """The recipe of a file or built in, with --set, --text and --dataset applied."""
    from llmsurgeon.recipe import recipe as recipes

    return with_text(recipes.load(recipe, sets), text, dataset)


def built(steps: list[dict[str, Any]], sets: list[str], text: str | None, dataset: str | None) -> Recipe:
    """The recipe that flags stand for, from its steps."""
    import yaml

    from llmsurgeon.recipe.recipe import loads

    def named(place: re.Match[str]) -> str:
        return f"{steps[int(place[1])]['op']}{place[2]}"

    try:
        recipe = loads(yaml.safe_dump({"version": 1, "steps": steps}), "flags", sets)
    except RecipeError as error:
        # Nobody has seen the file whose lines these are: say op.key, as --set would.
        problems = [re.sub(r"^flags:\d+: ", "", problem) for problem in error.problems]
        problems = [re.sub(r"^steps\[(\d+)\]([.:])", named, problem) for problem in problems]
        raise RecipeError(problems, "options") from None
    return with_text(recipe, text, dataset)


def with_text(recipe: Recipe, text: str | None, dataset: str | None) -> Recipe:
    """The recipe with the text that --text or --dataset names in place of its own."""
    if text and dataset:
        raise SurgeryError("give --text or --dataset, not both")
    if not (text or dataset):
        return recipe
    calibration = recipe.calibration.model_copy(update={"text": text, "dataset": dataset, "texts": None})
    return recipe.model_copy(update={"calibration": calibration})


def must_have(context: typer.Context, recipe: Recipe, ops: set[str], verb: str) -> None:
    """Raise SurgeryError where no step of the recipe is one of `ops`, which `verb` stands for, or where flags that make
    up steps stand beside it."""
    sources = {option: context.get_parameter_source(option.name or "") for option in context.command.params}
    given = [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    flags = [option.opts[0] for option in given if option.name not in inspect.signature(_shared).parameters]
    if flags:
        raise SurgeryError(
            f"{', '.join(flags)} beside --recipe: the recipe already says what to do; change it by --set STEP.KEY=VALUE"
        )
    if not any(step.op in ops for step in recipe.steps):
        found = ", ".join(step.op for step in recipe.steps)
        raise SurgeryError(
            f"this recipe has no step for `{verb}`: its steps are {found}, `{verb}` wants one of "
            f"{', '.join(sorted(ops))}; `llmsurgeon run` runs any recipe"
        )


def go(recipe: Recipe, label: str, job: Job) -> None:
    """Plan or run a recipe as the command line asks and print what came of it; `label` is part of OUT's default."""
    from llmsurgeon.formats.loading import dtype_of
    from llmsurgeon.planning.estimate import estimated
    from llmsurgeon.planning.options import model_of
    from llmsurgeon.run import Options, preview, run

    name, push = model_of(job.model, recipe), target_of(job.push_to_hub, job.private)
    target = job.out or f"{short_name(name)}-{label}"
    if job.dry_run:
        planned = preview(recipe, name, job.revision, job.trust_remote_code)
        takes = estimated(planned, target, dtype_of(job.dtype), job.device)
        report = {**plan_report(planned), "estimate": takes.to_dict()}
        print(json.dumps(report)) if job.as_json else print_plan(planned, notes=True, estimate=takes)
        return
    options = Options(
        job.device,
        dtype_of(job.dtype),
        job.overwrite,
        job.max_shard_size,
        discard_partial=job.discard_partial,
        reads=recipe_paths(job.recipe),
        trust_remote_code=job.trust_remote_code,
        push=push,
        say=say,
        checksum=job.checksum,
    )
    if not (job.as_json or output.quiet):
        options = replace(options, planned=print_plan)

    def show(outcome: Outcome) -> None:
        print(json.dumps(outcome_report(outcome))) if job.as_json else print_outcome(outcome)

    shown(lambda: run(recipe, name, target, options, job.revision), show)
