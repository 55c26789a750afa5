"""The planned student healed, step after step, and judged on text that fitted nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from llmsurgeon.checkpoint.kept import writing
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.bits_per_byte import scored_by
from llmsurgeon.evaluation.decoders import Evaluation
from llmsurgeon.evaluation.encoders import EncoderEvaluation
from llmsurgeon.evaluation.judge import judge, judge_whole, walked
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.models import filled_model
from llmsurgeon.healing.healers import HEALERS, HealingContext, Result
from llmsurgeon.healing.store import overlay
from llmsurgeon.operations import Step
from llmsurgeon.operations.base import HELD_OUT
from llmsurgeon.planning.plan import Planned
from llmsurgeon.planning.texts import Texts
from llmsurgeon.text.sequences import Sequences, held_out
from llmsurgeon.walk.runner import LayerRunner


@dataclass(frozen=True)
class Healed:
    """The student after healing, what each healing operation made of it, and how good it is on held-out text."""

    weights: Mapping[str, Tensor]
    results: Mapping[str, Result] = field(default_factory=dict)
    evaluation: Evaluation | EncoderEvaluation | None = None


def heal_and_judge(planned: Planned, texts: Texts, folder: Path, logs: Path) -> Healed:
    """Do the healing steps, and judge on held-out text where something needs text or one is given.

    Each step fits nothing to what judges in the end, nor to the share of the sequences that it holds out itself.
    `folder` keeps what is done through a kill; trackers write to `logs`.
    """
    # Whoever gives text should hear what the cut did to it.
    given = planned.recipe.calibration.sources
    if not planned.heals and planned.recipe.gate is None and not given:
        return Healed(planned.weights)
    sequences = texts.sequences
    judges = held_out(sequences.kinds, judging_share(planned.heals))
    context, results = _context(planned, texts, judges, folder, logs), dict[str, Result]()
    for place, step in enumerate(planned.heals):
        store = folder / f"{step.op}-{place}"
        with writing(store):
            store.mkdir(exist_ok=True)
        seen, held = set_aside(sequences, judges, step)
        here = replace(context, windows=seen.tokens, kinds=seen.kinds, held_out=held, folder=store)
        made = HEALERS[step.op](here, step)
        context = replace(context, weights=overlay(context.weights, made.files))
        results[step.op] = made.behind(results[step.op]) if step.op in results else made
    evaluation = _judged(planned, texts, context.weights, sequences[judges])
    return Healed(context.weights, {op: results[op] for op in HEALERS if op in results}, evaluation)


def judging_share(steps: Sequence[Step]) -> float:
    """The share of the sequences that judges the result: the largest that a step holds out."""
    return max((share for step in steps if (share := step.withholds()) is not None), default=HELD_OUT)


def set_aside(windows: Sequences, judges: Tensor, step: Step) -> tuple[Sequences, Tensor]:
    """(the sequences that a step works with, the mask of those that choose and judge there and fit nothing).

    The second are the share that the step holds out. Of those that judge the result, mask `judges` [S], it sees no
    others. A step without a share of its own goes by `judges`.

    Raises:
        SurgeryError: nothing would be left to fit to.
    """
    share = step.withholds()
    if share is None:
        return windows, judges
    own = held_out(windows.kinds, share)
    seen = own | ~judges
    if own[seen].all():
        raise SurgeryError(
            f"{step.op}: {len(windows)} calibration sequences leave none to fit to, with held_out {share} of its own "
            "and another step's beside it; raise calibration tokens, or give both steps the same held_out"
        )
    return windows[seen], own[seen]


def _context(planned: Planned, texts: Texts, judges: Tensor, folder: Path, logs: Path) -> HealingContext:
    """The planned student beside its parent, before the first step that heals."""
    return HealingContext(
        parent=texts.runner,
        parent_config=planned.parent.config,
        parent_spec=planned.parent.spec,
        fingerprint=texts.parent_key,
        config=normalised(planned.written.student),
        spec=planned.spec,
        weights=planned.weights,
        windows=texts.windows,
        kinds=texts.sequences.kinds,
        held_out=judges,
        training=texts.training,
        folder=folder,
        logs=logs,
        device=texts.options.device,
        batch=texts.options.batch,
        say=texts.options.say,
    )


def _judged(
    planned: Planned, texts: Texts, weights: Mapping[str, Tensor], text: Sequences
) -> Evaluation | EncoderEvaluation:
    """The student beside its parent on `text`."""
    batch = texts.options.batch
    if planned.spec.block_transformer:
        whole = filled_model(planned.written.student, weights, texts.dtype, texts.options.device)
        found = judge_whole(whole, texts.runner, text, batch)
        return replace(found, bits=texts.bits(scored_by(whole), text.tokens))
    config = normalised(planned.written.student)
    student = LayerRunner(config, weights, texts.dtype, texts.options.device, texts.runner.padding)
    judged = judge(student, texts.runner, text, texts.tokenizer, batch)
    if isinstance(judged, Evaluation):
        return replace(judged, bits=texts.bits(walked(student, batch), text.tokens))
    return judged
