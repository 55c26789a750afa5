"""The processes of a training: started by `accelerate launch` there are several, and the main one alone writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.distill.crew import stop_with_launcher
from llmsurgeon.healing.distill.engine import on_cpu, several
from llmsurgeon.progress import set_quiet


@dataclass
class World:
    """The processes of this run; one, unless `accelerate launch` started more."""

    main: bool = True
    state: Any = None

    def __post_init__(self) -> None:
        if several():
            from accelerate import PartialState

            self.state = PartialState(cpu=on_cpu())
            self.main = bool(self.state.is_main_process)
            stop_with_launcher()
            if not self.main:
                set_quiet(True)

    @contextmanager
    def stage(self, out: str, **options: Any) -> Iterator[tuple[Stage | None, Path]]:
        """(the stage in the main process, the scratch folder in all). What refuses in one refuses in all."""
        if self.state is None:
            with Stage.open(out, **options) as stage:
                yield stage, stage.scratch
            return
        opened: list[Stage] = []

        def open_it() -> str:
            opened.append(Stage.open(out, **options))
            return str(opened[0].scratch)

        try:
            scratch = Path(self.main_alone(open_it))
            yield (opened[0] if opened else None), scratch
        finally:
            for stage in opened:
                stage.close()

    def main_alone(self, work: Callable[[], Any]) -> Any:
        """What `work` gives in the main process, in all of them. A SurgeryError there is one everywhere."""
        if self.state is None:
            return work()
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = work()
            except SurgeryError as error:
                told[1] = str(error)
        broadcast_object_list(told)
        if told[1] is not None:
            raise SurgeryError(told[1])
        return told[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does this before the others do."""
        if self.state is None:
            yield
        else:
            with self.state.main_process_first():
                yield
