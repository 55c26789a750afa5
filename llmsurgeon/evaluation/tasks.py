"""Benchmark tasks through EleutherAI's lm-evaluation-harness, an optional extra."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgeon.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch: int = 1,
    limit: int | None = None,
    name: str = "model",
    output: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of each task, as the harness names them ({"arc_easy": {"acc,none": 0.61, ...}}).

    limit: caps the documents a task. output: a folder that gets the harness's own file of results, as `lm_eval
    --output_path` writes it: OUTPUT/NAME/results_TIME.json, with the model called `name`.

    Raises:
        SurgeryError: the harness is absent or does not know a task.
    """
    check_tasks_available()
    # The harness prints; stdout belongs to the report.
    with contextlib.redirect_stdout(sys.stderr):
        import lm_eval
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        unknown = sorted(set(tasks) - set(manager.all_tasks))
        if unknown:
            raise SurgeryError(f"unknown task: {', '.join(unknown)}; `lm-eval ls tasks` lists what there is")
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        tracker = EvaluationTracker(output_path=str(output)) if output else None
        results = lm_eval.simple_evaluate(
            model=harness,
            # Of a model that is loaded, this is its name alone.
            model_args=f"pretrained={name.replace(',', '_')}",
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            evaluation_tracker=tracker,
            log_samples=False,
        )
        if tracker:
            tracker.save_results_aggregated(results=dict(results))
    # Some metrics come as numpy scalars, which json does not write.
    return {
        task: {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        for task, metrics in results["results"].items()
    }


def check_tasks_available() -> None:
    """Raise SurgeryError unless lm-eval can be imported; call it before long work."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise SurgeryError('--tasks needs lm-evaluation-harness: pip install "llmsurgeon[eval]"')
