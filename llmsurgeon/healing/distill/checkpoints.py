"""The files that a training goes on from: whole or not there, and believed only where they are what was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgeon.checkpoint.atomic import fsync
from llmsurgeon.checkpoint.checksums import file_sha256
from llmsurgeon.checkpoint.journal import HOW_FAR
from llmsurgeon.checkpoint.kept import forget, keep, whole
from llmsurgeon.healing.distill.training import Run, State
from llmsurgeon.progress import remark

if TYPE_CHECKING:
    from accelerate import Accelerator

LOOP, SUMS = "loop.json", "sums.json"


class Checkpoints:
    """`state-N`, of which one is kept, and `best-N.safetensors`, in the folder of a run.

    names: of the parameters that train, in the module.
    """

    def __init__(self, run: Run, accelerator: Accelerator, names: Sequence[str]) -> None:
        self.run, self.folder, self.accelerator, self.names = run, run.folder, accelerator, names

    def save(self, state: State) -> None:
        """Write `state-N`, whole or not at all, and drop the one before."""
        accelerator = self.accelerator
        target = self.folder / f"state-{state.step:08}"
        partial = target.with_suffix(".partial")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / LOOP).write_text(json.dumps(asdict(state)))
            (partial / SUMS).write_text(json.dumps(sums_of(partial)))
            for path in (*partial.rglob("*"), partial):
                fsync(path)  # the one before goes, and the power may
            if not target.exists():
                partial.rename(target)
            (self.folder / HOW_FAR).write_text(f"{self.run.how_far(state)}\n")
            self.drop(target, self.best(state.best_step))
        accelerator.wait_for_everyone()

    def last(self) -> Path | None:
        """The last whole state, None where there is none."""
        for path in sorted(self.folder.glob("state-*"), reverse=True):
            if path.suffix == ".partial":
                continue
            if is_whole(path):
                return path
            remark(f"{path}: is damaged (its files are not what was written); training goes on from before it")
        return None

    def load(self, folder: Path) -> State:
        """Weights and optimizer as a state has them. Returns where the run was."""
        self.accelerator.load_state(str(folder))
        state = State(**json.loads((folder / LOOP).read_text()))
        best = self.best(state.best_step)
        if state.best_step and not whole(best):
            remark(f"{best}: the best weights so far are damaged or gone; the best from here on count")
            state.best_step, state.judged = None, []
        return state

    def best(self, step: int | None) -> Path:
        """Where the weights of a step are kept."""
        return self.folder / f"best-{step}.safetensors"

    def dump(self, module: Any, step: int) -> None:
        """Write the tensors that train as they are at a step, under the student's names."""
        from safetensors.torch import save_file

        weights = self.accelerator.get_state_dict(module)
        if self.accelerator.is_main_process:
            prefix = self.run.prefix
            tensors = {n.removeprefix(prefix): weights[n].detach().cpu().contiguous() for n in self.names}
            keep(self.best(step), lambda partial: save_file(tensors, partial))
        self.accelerator.wait_for_everyone()

    def drop(self, state: Path | None, best: Path) -> None:
        """Remove all states and best weights but these."""
        for old in self.folder.glob("state-*"):
            if old != state:
                shutil.rmtree(old, ignore_errors=True)
        for old in self.folder.glob("best-*.safetensors"):
            if old != best:
                forget(old)


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
