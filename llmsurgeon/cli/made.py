"""What a plan and a run's outcome look like, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from shlex import quote
from typing import TYPE_CHECKING, Any

from llmsurgeon.cli import console, tell
from llmsurgeon.errors import GateFailed

if TYPE_CHECKING:
    from llmsurgeon.evaluation.decoders import Evaluation
    from llmsurgeon.evaluation.encoders import EncoderEvaluation
    from llmsurgeon.planning.estimate import Estimate
    from llmsurgeon.planning.plan import Planned
    from llmsurgeon.run import Outcome


def shown(work: Callable[[], Outcome | None], show: Callable[[Outcome], None]) -> None:
    """Show what `work` makes, be it a model that misses its gate."""
    try:
        outcome = work()
    except GateFailed as error:
        show(error.outcome)
        raise
    if outcome is not None:
        show(outcome)


def plan_report(planned: Planned) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "model": planned.parent.name,
        "format": planned.written.format,
        "why": planned.written.why,
        "loads": planned.written.loads,
        "before": planned.before.to_dict(),
        "after": planned.after.to_dict(),
        "peak_edit_bytes": planned.peak_bytes,
        "healing_bytes": planned.healing_bytes,
        "stream_bytes": planned.stream_bytes,
        "steps": [step.model_dump(mode="json") for step in planned.recipe.steps],
        "calibration": planned.text_shares,
        "blocks": [list(layer.parents) for layer in planned.spec.layers],
        "notes": list(planned.notes),
    }


def outcome_report(outcome: Outcome) -> dict[str, Any]:
    """What a run made, as JSON."""
    return {
        "out": str(outcome.out),
        **plan_report(outcome.planned),
        "evaluation": outcome.evaluation.to_dict() if outcome.evaluation else None,
        "gate_missed": list(outcome.gate),
        "warning": warning(outcome),
    }


def warning(outcome: Outcome) -> str | None:
    """What is to be said where quality has collapsed."""
    from llmsurgeon.report.card import collapse

    return collapse(outcome.evaluation.to_dict() if outcome.evaluation else None)


def print_plan(planned: Planned, notes: bool = False, estimate: Estimate | None = None) -> None:
    """The plan as tables; with `notes`, which otherwise stand in the model card, with its remarks; what a run takes."""
    from rich.table import Table

    from llmsurgeon.model.costs import human

    out = console()
    table = Table(title=f"Plan for {planned.parent.name}", title_justify="left")
    for column in ("", "parent", "result", "change"):
        table.add_column(column, justify="right" if column else "left")
    labels = {
        "blocks": "blocks",
        "attentions": "attentions",
        "ffns": "FFNs",
        "parameters": "parameters",
        "flops_per_token": "FLOPs a token",
        "kv_bytes_per_token": "KV bytes a token",
        "disk_bytes": "disk bytes",
    }
    for key, label in labels.items():
        before, after = getattr(planned.before, key), getattr(planned.after, key)
        change = f"{100 * (after / before - 1):+.1f} %" if before else ""
        table.add_row(label, human(before), human(after), change)
    out.print(table)
    for step in planned.recipe.steps:
        shown = ", ".join(
            f"{k}={_short(v)}" for k, v in step.model_dump(mode="json", exclude_defaults=True).items() if k != "op"
        )
        out.print(f"  {step.op}: {shown}", highlight=False)
    for note in planned.notes if notes else ():
        out.print(f"  {note}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"format: {planned.written.format} ({planned.written.why})", highlight=False, soft_wrap=True)
    out.print(planned.written.loads, highlight=False, soft_wrap=True)
    out.print(f"largest edit in memory: {human(planned.peak_bytes)}B", highlight=False)
    if planned.text_shares:
        told = ", ".join(f"{100 * share:.0f} % {source}" for source, share in planned.text_shares.items())
        out.print(f"calibration text: {told}", highlight=False, soft_wrap=True)
    if planned.healing_bytes:
        out.print(f"closed-form fits in memory: about {human(planned.healing_bytes)}B", highlight=False)
    if planned.stream_bytes:
        out.print(f"hidden states of the text: {human(planned.stream_bytes)}B each time; {_place()}", highlight=False)
    if estimate:
        out.print(f"on this machine: {_takes(estimate)}", highlight=False, soft_wrap=True)


def _takes(estimate: Estimate) -> str:
    """What a run takes, in a line."""
    from llmsurgeon.model.costs import human

    hours = f"{estimate.seconds / 3600:.3g} hours"
    sizes = f"{human(estimate.bytes_read)}B read, {human(estimate.bytes_written)}B written"
    left_out = f"; not counted: {', '.join(estimate.without)}" if estimate.without else ""
    return f"about {hours}, {sizes}, {human(estimate.peak_memory_bytes)}B of memory at most{left_out}"


def _place() -> str:
    """Where hidden states go that memory does not hold."""
    import tempfile

    from llmsurgeon.model.costs import human
    from llmsurgeon.walk.memory import room

    free = room()
    bound = f"half of the {human(free.bytes)}B that are free" if free else "what memory holds"
    return f"above {bound} they go into a file in {tempfile.gettempdir()} (TMPDIR)"


def kinds_lines(evaluation: Evaluation | EncoderEvaluation) -> list[str]:
    """A line for each kind of text that was judged, and for those that fare much worse than the rest."""
    from llmsurgeon.evaluation.kinds import much_worse

    lines = [f"  {kind}: {figures.sentence()}" for kind, figures in evaluation.kinds.items()]
    return lines + much_worse({kind: figures.to_dict() for kind, figures in evaluation.kinds.items()})


def print_outcome(outcome: Outcome) -> None:
    """What came of the plan, in a few lines."""
    if outcome.evaluation:
        tell(f"held-out calibration text: {outcome.evaluation.sentence()}")
        for line in kinds_lines(outcome.evaluation):
            tell(line)
    else:
        command = f"llmsurgeon eval {quote(str(outcome.out))} --against {quote(outcome.planned.parent.name)}"
        tell(f"quality: not measured; {command} does")
    if collapsed := warning(outcome):
        tell(f"WARNING: {collapsed}")
    tell(f"wrote {outcome.out}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
