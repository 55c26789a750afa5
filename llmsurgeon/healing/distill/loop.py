"""The training loop: accelerate does the work, this decides when to step, judge, save and stop.

One process or several: every process draws the same rows and trains on its share of them. Everything that a resumed run
needs is in one folder (training.py, checkpoints.py, log.py).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmsurgeon.checkpoint.kept import keep, writing
from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.distill.checkpoints import Checkpoints
from llmsurgeon.healing.distill.clock import Clock
from llmsurgeon.healing.distill.log import Log
from llmsurgeon.healing.distill.schedule import coarse_share, learning_rate, optimizer_of
from llmsurgeon.healing.distill.training import RESULT, ROOM, Run, State, Task, Training, trained
from llmsurgeon.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmsurgeon.operations.distill import Distill


class Trainer:
    """Trains a module whose forward gives its losses, `loss` among them, which is minimised."""

    def __init__(self, module: nn.Module, task: Task, settings: Distill, accelerator: Accelerator, within: Run) -> None:
        self.task, self.settings, self.accelerator, self.within = task, settings, accelerator, within
        began = within.began
        self.state = State(seconds=time.monotonic() - began if began is not None else 0.0)
        everything: list[Any] = list(module.modules())
        self.latent = [part for part in everything if hasattr(part, "share")]
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.checkpoints, self.log = (
            Checkpoints(within, accelerator, names),
            Log(within.folder, settings, accelerator),
        )
        # DeepSpeed wants to know what it cannot read from a data loader.
        if plugin := getattr(accelerator.state, "deepspeed_plugin", None):
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch
        self.module, self.optimizer = accelerator.prepare(module, optimizer_of(settings, module))
        self.moving = [p for p in self.module.parameters() if p.requires_grad]
        self.module.train()
        self.clock = Clock(self.state, accelerator)

    def run(self) -> Training:
        """Train until a limit is reached, and return what was made.

        Raises:
            Stopped: on SIGTERM, once the state is saved.
            SurgeryError: the loss is not finite or diverges before anything good was saved.
        """
        folder = self.within.folder
        if (training := trained(folder / RESULT)) is not None:
            return training
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.log.begin()
        with self.clock.signals(), Progress(self.within.title, self.within.limits[1], "tokens") as self.progress:
            stopped = self._loop()
        training = self._finish(stopped)
        self.log.end()
        return training

    def _loop(self) -> str:
        """Steps until there is a reason to stop; the reason."""
        state, evaluations = self.state, self.settings.evaluations
        self.clock.start()
        self._saved_at = state.seconds
        if evaluations and not state.judged:
            self._judge()
        while True:
            reached = state.reached(self.within.limits)
            if evaluations and reached >= len(state.judged) / evaluations and state.judged[-1]["step"] < state.step:
                self._judge()
                if state.patience_is_out(self.settings.patience):
                    return f"no better for {self.settings.patience} evaluations"
            if reached >= 1:
                return "done"
            losses = self._step(reached)
            if not math.isfinite(losses["loss"]):
                return f"the loss was {losses['loss']} at step {state.step}"
            # What the model computes may get coarser step by step: its loss may rise then.
            if state.diverges(losses["loss"], any(part.share < 1 for part in self.latent)):
                return f"the loss diverged at step {state.step}"
            if self.clock.signal or state.saving_is_due(self.settings, self._saved_at):
                self._save()
            if self.clock.signal:
                self.clock.end(self.within.title)

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
                with self.clock.phase("batch"):
                    batch = self.task.batch(mine, state.step, accelerator.device)
                with self.clock.phase("forward"):
                    losses = self.module(**batch)
                with self.clock.phase("backward"):
                    accelerator.backward(losses["loss"])
                with self.clock.phase("optimizer"):
                    if settings.clip and accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(self.moving, settings.clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / settings.accumulate
        state.step += 1
        state.tokens += len(numbers) * self.task.corpus.sources[0].tokens.shape[1]
        means = accelerator.reduce(torch.stack(list(sums.values())), "mean")
        found = dict(zip(sums, means.tolist(), strict=True))
        self.clock.tick()
        gradient = {} if norm is None else {"gradient_norm": float(norm)}
        self.log.step(state, {**found, "learning_rate": rate, **gradient})
        done = max(state.reached(self.within.limits), 1e-9)
        self.progress.reach(state.tokens, state.tokens / done, f"loss {found['loss']:.4f}")
        return found

    def _draw(self) -> np.ndarray:
        """The rows of the next step, for which everything is ready."""
        state, corpus = self.state, self.task.corpus
        rows = self.settings.batch * self.settings.accumulate * self.accelerator.num_processes
        before = sum(corpus.drawn)
        with self.clock.phase("parent"):
            while state.prepared < before + rows:
                count = self.task.ahead
                ahead = corpus.upcoming(state.prepared - before + count)[-count:]
                if self.accelerator.is_main_process:
                    self.task.prepare(ahead)
                state.prepared += count
                self.accelerator.wait_for_everyone()
        return corpus.draw(rows)

    def _judge(self) -> None:
        """Measure on held-out text; keep the weights where they are the best so far."""
        state = self.state
        with self.clock.phase("evaluation"), self.progress.paused():
            self.module.eval()
            measures = self.task.judge(self.module)
            self.module.train()
        values = [judged["value"] for judged in state.judged]
        self.clock.tick()
        measures = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 1), **measures}
        state.judged.append(measures)
        self.log.evaluation(state, measures)
        if math.isfinite(measures["value"]) and (not values or measures["value"] < min(values)):
            state.best_step = state.step
            if state.step:
                self.checkpoints.dump(self.module, state.step)

    def _save(self) -> None:
        """Save the state, where the weights are finite."""
        accelerator, state = self.accelerator, self.state
        damaged = torch.tensor(float(not all(torch.isfinite(p).all() for p in self.moving)), device=accelerator.device)
        if accelerator.reduce(damaged).item():
            return  # the next step's loss will tell
        with self.clock.phase("saving"), writing(self.within.folder, then=ROOM):
            state.drawn = list(self.task.corpus.drawn)
            self.checkpoints.save(state)
        self._saved_at = state.seconds

    def _resume(self) -> None:
        """Go on from the last whole checkpoint, if there is one."""
        if (found := self.checkpoints.last()) is not None:
            self._load(found)
        self.log.trim(self.state)
        # Groups of rows begin where they began in the run that was interrupted.
        self.task.corpus.drawn = list(self.state.drawn) or self.task.corpus.drawn

    def _load(self, found: Any) -> None:
        self.state = self.clock.state = self.checkpoints.load(found)

    def _finish(self, stopped: str) -> Training:
        """Write the tensors of the best weights, or of the last ones where nothing was judged."""
        failed = stopped.startswith("the loss")
        found = self.checkpoints.last() if self.state.best_step is None and failed else None
        if found is not None:
            self._load(found)
        state = self.state
        if found is not None or (state.best_step is None and not failed):
            self.checkpoints.dump(self.module, state.step)
            state.best_step = state.step
        if failed and not state.best_step:
            raise SurgeryError(
                f"{self.within.title}: {stopped}, and no checkpoint before it was better than the student as it "
                "came; lower distill.learning_rate (or clip), or train in another precision"
            )
        best = self.checkpoints.best(state.best_step)
        training = Training(
            file=str(best) if state.best_step else None,
            folder=str(self.within.folder),
            steps=state.step,
            tokens=state.tokens,
            seconds=state.seconds,
            stopped=stopped,
            judged=state.judged,
            best_step=state.best_step,
            phases={name: round(seconds, 2) for name, seconds in state.phases.items()},
        )
        if self.accelerator.is_main_process:
            keep(self.within.folder / RESULT, lambda path: path.write_text(json.dumps(asdict(training))))
            self.checkpoints.drop(None, best)
        self.accelerator.wait_for_everyone()
        return training
