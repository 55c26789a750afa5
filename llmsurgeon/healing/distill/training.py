"""The training loop: accelerate does the work, this decides when to step, judge, save and stop.

One process or several: every process draws the same rows and trains on its share of them. Everything that a resumed run
needs is in one folder: `state-N` (accelerate's checkpoint at step N, with `loop.json`), `best-N.safetensors`,
`loss.jsonl`, and at the end `result.json`.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.atomic import fsync
from llmsurgeon.checkpoint.kept import forget, keep, kept, whole, writing
from llmsurgeon.checkpoint.manifest import file_sha256
from llmsurgeon.checkpoint.staging import HOW_FAR
from llmsurgeon.errors import Stopped, SurgeryError
from llmsurgeon.healing.distill.data import Corpus
from llmsurgeon.healing.distill.signals import as_before, on_stop
from llmsurgeon.operations.distill import check_optimizer
from llmsurgeon.progress import Progress, remark

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmsurgeon.operations.distill import Distill

# The loss has diverged where its median over so many steps is this many times the lowest such median.
WINDOW, DIVERGED = 20, 3.0
LOOP, SUMS, LOG, RESULT = "loop.json", "sums.json", "loss.jsonl", "result.json"
ROOM = "the checkpoint before it is whole: free some space and start the same command again"


class Task(Protocol):
    """What is trained on, and by what it is judged."""

    corpus: Corpus
    ahead: int

    def prepare(self, numbers: np.ndarray) -> None:
        """Make ready what `batch` will want for these rows; called by the main process alone."""

    def batch(self, numbers: np.ndarray, step: int, device: torch.device) -> dict[str, Tensor]:
        """The module's arguments for these rows."""

    def judge(self, module: nn.Module) -> dict[str, float]:
        """Measures on held-out text; the lower `value`, the better."""


@dataclass
class State:
    """Where a run is: with the weights and the optimizer, all that going on depends on."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    drawn: list[int] = field(default_factory=list)
    prepared: int = 0
    judged: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    recent: list[float] = field(default_factory=list)
    lowest: float = math.inf
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """What a run of the loop did.

    file: the trained tensors under the student's names, None where the student was best as it came.
    stopped: why it ended.
    judged: the measures on held-out text, the first before training.
    best_step: the step whose weights were kept.
    phases: seconds by what they were spent on.
    """

    file: str | None
    folder: str
    steps: int
    tokens: int
    seconds: float
    stopped: str
    judged: list[dict[str, float]]
    best_step: int | None
    phases: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run, everything included."""
        return self.tokens / max(self.seconds, 1e-9)


def engine(settings: Distill, device: str, low_precision: bool, logs: Path) -> Accelerator:
    """accelerate, as `accelerate launch` was told, else one process on `device`.

    Raises:
        SurgeryError: a tracker is unknown or not installed, or the device cannot compute in the precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import get_available_trackers

    # Saving a state it warns of tied heads, which are saved once and tied again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in settings.trackers:
        if tracker not in available:
            raise SurgeryError(
                f"distill.trackers: {tracker} is not one of those that accelerate finds installed "
                f"({', '.join(available) or 'none'})"
            )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or several()
    named = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    precision = named.get(settings.precision)
    if precision is None and not launched:
        precision = "bf16" if low_precision else "no"
    # Another step of the same process may have asked for another precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=settings.accumulate,
            cpu=on_cpu() if launched else device == "cpu",
            log_with=list(settings.trackers) or None,
            project_dir=str(logs) if settings.trackers else None,
        )
    except ValueError as error:
        raise SurgeryError(f"distill: accelerate cannot start: {error}") from error


def several() -> bool:
    """True where `accelerate launch` or torchrun started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_cpu() -> bool:
    """True where launched processes are to compute on the CPU: they were told to, or there is nothing else."""
    return (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()
    )


def optimizer_of(settings: Distill, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or the class that the recipe names by its dotted path, of a library that it may name.

    Raises:
        SurgeryError: there is no such optimizer, or it cannot be made here.
    """
    moving = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in moving if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in moving if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
    try:
        library, _, name = check_optimizer(settings.optimizer).rpartition(".")
        made: Any = getattr(importlib.import_module(library), name)
        if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
            raise TypeError("it is not an optimizer of torch's kind")
        make: Any = made
        optimizer: torch.optim.Optimizer = make(groups, lr=settings.learning_rate)
    except Exception as error:  # what a library of others meets on a machine that it was not made for
        raise SurgeryError(f"distill.optimizer: {settings.optimizer} cannot be used: {error}") from error
    return optimizer


class Latent(nn.Module):
    """A module that is used as something coarser than what trains, to the share `share`; wholly so when judged."""

    share: float = 1.0


def coarse_share(settings: Distill, reached: float) -> float:
    """lambda of `Latent` modules and of BitLinears: from 0 to 1 over the first part of the run."""
    return min(1.0, reached / settings.ternary_warmup) if settings.ternary_warmup else 1.0


def learning_rate(settings: Distill, step: int, progress: float) -> float:
    """Linear warm-up over the first steps, then a cosine down to `final_learning_rate` of the peak."""
    warm = min(1.0, (step + 1) / (settings.warmup + 1))
    low = settings.final_learning_rate
    return settings.learning_rate * warm * (low + (1 - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


class Trainer:
    """Trains a module whose forward gives its losses.

    Args:
        folder: of this job alone; what is found there is gone on from.
        prefix: what the module's names have in front of the student's.
        began: when the time budget began (`time.monotonic()`); now, if it is not given.
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        settings: Distill,
        accelerator: Accelerator,
        folder: Path,
        *,
        prefix: str = "",
        title: str = "distill",
        began: float | None = None,
        limits: tuple[int | None, int | None, float | None] | None = None,
    ) -> None:
        self.task, self.settings, self.accelerator, self.folder = task, settings, accelerator, folder
        self.title, self.prefix, self.limits = title, prefix, limits or settings.limits
        self.state = State(seconds=time.monotonic() - began if began is not None else 0.0)
        everything: list[Any] = list(module.modules())
        self.latent = [part for part in everything if hasattr(part, "share")]
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.length = task.corpus.sources[0].tokens.shape[1]
        self.rows_a_step = settings.batch * settings.accumulate * accelerator.num_processes
        # DeepSpeed wants to know what it cannot read from a data loader.
        if plugin := getattr(accelerator.state, "deepspeed_plugin", None):
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch
        self.module, self.optimizer = accelerator.prepare(module, optimizer_of(settings, module))
        self.moving = [p for p in self.module.parameters() if p.requires_grad]
        self.module.train()
        self._signal = 0

    def run(self) -> Training:
        """Train until a limit is reached, and return what was made.

        Raises:
            Stopped: on SIGTERM, once the state is saved.
            SurgeryError: the loss is not finite or diverges before anything good was saved.
        """
        result = self.folder / RESULT
        if (training := trained(result)) is not None:
            return training
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        if self.settings.trackers:
            self.accelerator.init_trackers("llmsurgeon", config=_flat(self.settings))
        with self._signals(), Progress(self.title, self.limits[1], "tokens") as self.progress:
            stopped = self._loop()
        training = self._finish(stopped)
        if self.settings.trackers:
            self.accelerator.end_training()
        return training

    def _loop(self) -> str:
        """Steps until there is a reason to stop; the reason."""
        state, evaluations = self.state, self.settings.evaluations
        self._clock = time.monotonic() - state.seconds
        self._saved_at = state.seconds
        if evaluations and not state.judged:
            self._judge()
        while True:
            reached = self._reached()
            if evaluations and reached >= len(state.judged) / evaluations and state.judged[-1]["step"] < state.step:
                self._judge()
                if self._patience_is_out():
                    return f"no better for {self.settings.patience} evaluations"
            if reached >= 1:
                return "done"
            losses = self._step(reached)
            if not math.isfinite(losses["loss"]):
                return f"the loss was {losses['loss']} at step {state.step}"
            if self._diverges(losses["loss"]):
                return f"the loss diverged at step {state.step}"
            if self._signal or self._save_is_due():
                self._save()
            if self._signal:
                self._end_by(self._signal)

    def _reached(self) -> float:
        """How much of the run is done, 0 to 1, by the limit that is nearest."""
        steps, tokens, minutes = self.limits
        state = self.state
        shares = [state.step / steps if steps else 0, state.tokens / tokens if tokens else 0]
        return max(*shares, state.seconds / 60 / minutes if minutes else 0)

    def _step(self, reached: float) -> dict[str, float]:
        """One optimizer step over the global batch; its losses, mean over all processes."""
        settings, accelerator, state = self.settings, self.accelerator, self.state
        numbers = self._draw()
        share = numbers.reshape(settings.accumulate, accelerator.num_processes, settings.batch)
        rate = learning_rate(settings, state.step, reached)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for part in self.latent:
            part.share = coarse_share(settings, reached)
        sums: dict[str, Tensor] = {}
        norm: Any = None
        for mine in share[:, accelerator.process_index]:
            with accelerator.accumulate(self.module):
                with self._phase("batch"):
                    batch = self.task.batch(mine, state.step, accelerator.device)
                with self._phase("forward"):
                    losses = self.module(**batch)
                with self._phase("backward"):
                    accelerator.backward(losses["loss"])
                with self._phase("optimizer"):
                    if settings.clip and accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(self.moving, settings.clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / settings.accumulate
        state.step += 1
        state.tokens += len(numbers) * self.length
        means = accelerator.reduce(torch.stack(list(sums.values())), "mean")
        found = dict(zip(sums, means.tolist(), strict=True))
        self._tick()
        self._log({**found, "learning_rate": rate, **({} if norm is None else {"gradient_norm": float(norm)})})
        done = max(self._reached(), 1e-9)
        self.progress.reach(state.tokens, state.tokens / done, f"loss {found['loss']:.4f}")
        return found

    def _draw(self) -> np.ndarray:
        """The rows of the next step, for which everything is ready."""
        state, corpus = self.state, self.task.corpus
        before = sum(corpus.drawn)
        with self._phase("parent"):
            while state.prepared < before + self.rows_a_step:
                count = self.task.ahead
                ahead = corpus.upcoming(state.prepared - before + count)[-count:]
                if self.accelerator.is_main_process:
                    self.task.prepare(ahead)
                state.prepared += count
                self.accelerator.wait_for_everyone()
        return corpus.draw(self.rows_a_step)

    def _judge(self) -> None:
        """Measure on held-out text; keep the weights where they are the best so far."""
        state = self.state
        with self._phase("evaluation"), self.progress.paused():
            self.module.eval()
            measures = self.task.judge(self.module)
            self.module.train()
        values = [judged["value"] for judged in state.judged]
        self._tick()
        measures = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1), **measures}
        state.judged.append(measures)
        self._write_line({"evaluation": measures})
        if self.settings.trackers:
            self.accelerator.log({f"evaluation/{k}": v for k, v in measures.items()}, step=state.step)
        if math.isfinite(measures["value"]) and (not values or measures["value"] < min(values)):
            state.best_step = state.step
            if state.step:
                self._dump(self._best())

    def _patience_is_out(self) -> bool:
        values = [judged["value"] for judged in self.state.judged]
        patience = self.settings.patience
        return patience is not None and len(values) - 1 - values.index(min(values)) >= patience

    def _diverges(self, loss: float) -> bool:
        state = self.state
        if any(part.share < 1 for part in self.latent):
            # What the model computes gets coarser step by step: its loss may rise.
            state.recent, state.lowest = [loss], math.inf
            return False
        state.recent = [*state.recent, loss][-WINDOW:]
        if len(state.recent) < WINDOW:
            return False
        middle = median(state.recent)
        state.lowest = min(state.lowest, middle)
        return middle > DIVERGED * state.lowest

    def _save_is_due(self) -> bool:
        settings, state = self.settings, self.state
        if state.recent[-1] > DIVERGED * state.lowest:
            return False  # the checkpoint before is a better one to fall back on
        by_steps = settings.save_steps is not None and state.step % settings.save_steps == 0
        by_time = settings.save_minutes is not None and state.seconds - self._saved_at >= 60 * settings.save_minutes
        return by_steps or by_time

    def _save(self) -> None:
        """Write `state-N`, whole or not at all, and drop the one before."""
        accelerator, state = self.accelerator, self.state
        damaged = torch.tensor(float(not all(torch.isfinite(p).all() for p in self.moving)), device=accelerator.device)
        if accelerator.reduce(damaged).item():
            return  # the next step's loss will tell
        with self._phase("saving"), writing(self.folder, then=ROOM):
            target = self.folder / f"state-{state.step:08}"
            partial = target.with_suffix(".partial")
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                state.drawn = list(self.task.corpus.drawn)
                (partial / LOOP).write_text(json.dumps(asdict(state)))
                (partial / SUMS).write_text(json.dumps(sums_of(partial)))
                for path in (*partial.rglob("*"), partial):
                    fsync(path)  # the one before goes, and the power may
                if not target.exists():
                    partial.rename(target)
                (self.folder / HOW_FAR).write_text(f"{self._how_far()}\n")
                for old in self.folder.glob("state-*"):
                    if old != target:
                        shutil.rmtree(old, ignore_errors=True)
                self._drop_all_but_best()
            accelerator.wait_for_everyone()
        self._saved_at = state.seconds

    def _how_far(self) -> str:
        """For people who find the training unfinished."""
        steps, tokens, minutes = self.limits
        state = self.state
        of = [f" of {limit:,}" if limit else "" for limit in (steps, tokens)] + [f" of {minutes:g}" if minutes else ""]
        spent = f"{state.seconds / 60:.1f}{of[2]} minutes"
        return f"{self.title}: step {state.step:,}{of[0]}, {state.tokens:,}{of[1]} tokens, {spent}"

    def _resume(self) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        found = self._last_state()
        if found is not None:
            self._load(found)
        self._trim_log()
        # Groups of rows begin where they began in the run that was interrupted.
        self.task.corpus.drawn = list(self.state.drawn) or self.task.corpus.drawn

    def _last_state(self) -> Path | None:
        for path in sorted(self.folder.glob("state-*"), reverse=True):
            if path.suffix == ".partial":
                continue
            if is_whole(path):
                return path
            remark(f"{path}: is damaged (its files are not what was written); training goes on from before it")
        return None

    def _load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))
        self.state = State(**json.loads((folder / LOOP).read_text()))
        if self.state.best_step and not whole(self._best()):
            remark(f"{self._best()}: the best weights so far are damaged or gone; the best from here on count")
            self.state.best_step, self.state.judged = None, []

    def _trim_log(self) -> None:
        """Drop what an interrupted run logged after the checkpoint that this one starts from."""
        log = self.folder / LOG
        if not self.accelerator.is_main_process or not log.exists():
            return
        kept = []
        for line in log.read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # cut short by a kill, or damaged
                entry = json.loads(line)
                measured = entry.get("evaluation", entry)
                if measured["step"] <= self.state.step and ("evaluation" not in entry or measured in self.state.judged):
                    kept.append(line + "\n")
        new = log.with_suffix(".new")
        with writing(log, then=ROOM):
            new.write_text("".join(kept))
            new.replace(log)

    def _finish(self, stopped: str) -> Training:
        """Write the tensors of the best weights, or of the last ones where nothing was judged."""
        failed = stopped.startswith("the loss")
        if self.state.best_step is None and failed and (found := self._last_state()) is not None:
            self._load(found)
            self._dump(self._best(self.state.step))
            self.state.best_step = self.state.step
        elif self.state.best_step is None and not failed:
            self._dump(self._best(self.state.step))
            self.state.best_step = self.state.step
        state = self.state
        if failed and not state.best_step:
            raise SurgeryError(
                f"{self.title}: {stopped}, and no checkpoint before it was better than the student as it came; lower "
                "distill.learning_rate (or clip), or train in another precision"
            )
        training = Training(
            file=str(self._best()) if state.best_step else None,
            folder=str(self.folder),
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            stopped=stopped,
            judged=state.judged,
            best_step=state.best_step,
            phases={name: round(seconds, 2) for name, seconds in state.phases.items()},
        )
        if self.accelerator.is_main_process:
            keep(self.folder / RESULT, lambda path: path.write_text(json.dumps(asdict(training))))
            for old in self.folder.glob("state-*"):
                shutil.rmtree(old, ignore_errors=True)
            self._drop_all_but_best()
        self.accelerator.wait_for_everyone()
        return training

    def _best(self, step: int | None = None) -> Path:
        """Where the weights of a step are kept, of the best step if none is given."""
        return self.folder / f"best-{self.state.best_step if step is None else step}.safetensors"

    def _drop_all_but_best(self) -> None:
        for old in self.folder.glob("best-*.safetensors"):
            if old != self._best():
                forget(old)

    def _dump(self, path: Path) -> None:
        """Write the tensors that train, under the student's names."""
        from safetensors.torch import save_file

        state = self.accelerator.get_state_dict(self.module)
        if self.accelerator.is_main_process:
            tensors = {n.removeprefix(self.prefix): state[n].detach().cpu().contiguous() for n in self.names}
            keep(path, lambda partial: save_file(tensors, partial))
        self.accelerator.wait_for_everyone()

    def _log(self, values: dict[str, float]) -> None:
        state = self.state
        line = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 2), **values}
        self._write_line(line)
        if self.settings.trackers:
            self.accelerator.log(line, step=state.step)

    def _write_line(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with writing(self.folder / LOG, then=ROOM), (self.folder / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.state.phases[name] = self.state.phases.get(name, 0.0) + time.monotonic() - start

    def _tick(self) -> None:
        """Look at the clock; where there are several processes all of them hear of each other's signals, and go by the
        main process's clock, so that they decide alike."""
        self.state.seconds = time.monotonic() - self._clock
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([[self._signal, self.state.seconds]], device=self.accelerator.device)
            everyone: Tensor = self.accelerator.gather(mine)
            self.state.seconds, self._signal = everyone[0, 1].item(), int(everyone[:, 0].max().item())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the step that they find it in."""

        def note(number: int, before: dict[int, Any]) -> None:
            self._signal = number
            as_before(number, before)  # a second one does what it always does

        with on_stop(note):
            yield

    def _end_by(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(
            f"{self.title}: stopped by SIGTERM at step {self.state.step}; its state is saved, and the same command "
            "started again goes on from there"
        )


def trained(result: Path) -> Training | None:
    """What an earlier run's training made, where its result and its weights are there and whole."""
    if not kept(result):
        return None
    training = Training(**json.loads(result.read_text()))
    best = result.parent / f"best-{training.best_step}.safetensors"
    if not training.best_step or kept(best):
        return training
    forget(result)
    return None


def sums_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def is_whole(folder: Path) -> bool:
    """True where the files of a saved state are those that were written."""
    try:
        noted = json.loads((folder / SUMS).read_text())
    except (OSError, ValueError):
        return False
    return bool(noted == sums_of(folder))


def _flat(settings: Distill) -> dict[str, Any]:
    """The settings as trackers take them."""
    plain = settings.model_dump(mode="json", exclude_none=True)
    return {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in plain.items()}
