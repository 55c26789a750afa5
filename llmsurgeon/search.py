"""`search`: the best model under a budget. Options scored, one a layer chosen, made, timed, and chosen again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from llmsurgeon.checkpoint.out_place import existing
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.formats.loading import dtype_of
from llmsurgeon.model.parts import Touch
from llmsurgeon.operations import OPERATIONS
from llmsurgeon.planning.inputs import Inputs
from llmsurgeon.planning.opened import OpenedCheckpoint, open_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.texts import Texts
from llmsurgeon.processes.first import from_first, only_first, seen_by_all
from llmsurgeon.processes.world import join
from llmsurgeon.progress import Say, silent
from llmsurgeon.recipe.recipe import calibration, dump
from llmsurgeon.report.search import html_found
from llmsurgeon.run import run
from llmsurgeon.searching.costs import Engine, Meter, meters, parse_targets
from llmsurgeon.searching.found import Found
from llmsurgeon.searching.making import Making, Place
from llmsurgeon.searching.report import described
from llmsurgeon.searching.seeking import Model, Seeker
from llmsurgeon.searching.setting import Work, scorer_of, work_of
from llmsurgeon.searching.space import Space, chosen_operations
from llmsurgeon.text.files import named_text

SEQUENCE_LENGTH = 256
# Of the minutes that a search may take, the share in which parts are timed, when scoring ends at the latest, and when
# choosing does: models are made then.
TIMING, SCORING, CHOOSING = 0.2, 0.7, 0.85
FILES = ("recipe.yaml", "report.html", "report.json", "scores.safetensors")


@dataclass(frozen=True)
class Wanted:
    """What a search is asked beside its model and targets, with what it is when nobody says.

    engine: "llama.cpp:q8_0", "transformers" ...; context: tokens that a sequence has read when it is timed;
        threads: of the CPU that it may use, all by default.
    text, dataset: what options are fitted and scored on; sampled from the model where neither is given. self_share: of
        it that the model writes beside a text or dataset, of all kinds; a quarter where it can.
    tokens: how many score, and how many others fit; refit_tokens: of the recipe, of which a search takes some;
        sequence_length: of the windows.
    allow, forbid: operations, by the names that recipes have for them; by default all may be used but trim_vocab, which
        changes the tokenizer. "all" allows that, too. It takes a text or dataset that tells which tokens stay.
    minutes: the search ends, with the best that it knows, about then; heal: minutes of training in the recipe.
    """

    engine: str | None = None
    context: int = 512
    threads: int | None = None
    batch: int = 8
    text: str | os.PathLike[str] | None = None
    dataset: str | None = None
    self_share: float | None = None
    tokens: int = 4096
    refit_tokens: int = 65_536
    sequence_length: int | None = None
    allow: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    minutes: float | None = None
    heal: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Preview:
    """What a search would choose among, and what that takes. measuring: what each target's meter has to measure."""

    space: Space
    work: Work
    measuring: tuple[str, ...] = field(default=())


def search(
    model: str | os.PathLike[str],
    targets: str | Sequence[str],
    out: str | os.PathLike[str],
    wanted: Wanted = Wanted(),
    *,
    make: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    discard_partial: bool = False,
    say: Say = silent,
) -> Found:
    """Search the best model under budgets, and write to the folder `out` the recipe that makes it, and what was found.

    `out` holds recipe.yaml, which `run` takes as it is, report.html, report.json and scores.safetensors, and
    tokens.json, the tokens that stay, where the recipe trims the vocabulary. What is measured is kept in the cache: a
    search that was killed goes on, and one for another target on the same text measures little anew. Several processes,
    where a launcher started them, share the models that are measured; the first one times in the engine, and writes.

    Args:
        model: a hub id, a folder or a GGUF file.
        targets: such as "decode=1.5x", "params=0.7x", "size=300MB"; several bound together.
        make: a folder for the model itself, which is what `run` makes of the recipe: the search has made it anyway,
            unless its time was up or the recipe trains, when the recipe is run at the end.
        overwrite: replace `out` and `make` if they hold nothing but what llmsurgeon wrote; discard_partial: delete what
            an unfinished run left beside them.

    Raises:
        SurgeryError: a target that cannot be read, or is out of reach, a model, a text or an engine that cannot be
            used, an `out` or a `make` that cannot be written.
    """
    join()
    clock = _Clock(wanted.minutes)
    opened = _opened(model, targets, wanted, say)
    inputs = Inputs.of("search", {"model": opened.parent.checkpoint}, None, Options())
    if wanted.text:
        inputs.watch_text("text", os.fspath(wanted.text))
    read = (opened.parent.checkpoint.path, *existing(named_text(wanted.text), wanted.dataset))
    options = replace(opened.options, overwrite=overwrite, discard_partial=discard_partial)
    staging = options.staging(*read)
    if make is not None:
        from_first(lambda: _check_make(make, out, staging))
    with only_first(lambda: Stage.open(os.fspath(out), job=inputs.job(), **staging)) as stage:
        making = _prepared(opened, wanted, clock, seen_by_all(lambda: stage.scratch), say)
        making = replace(making, home=None if make is None else Path(make))
        seeker = making.seeker
        alone = seeker.compare([1.0] * len(opened.meters))
        clock.lap("measure single operations")
        best, made = making.best(clock.in_time, say)
        clock.lap("choose and make")
        found = described(opened.found(clock.laps), seeker, best, made, alone)
        if stage is not None:
            stage.confirm(inputs.check)
            _write(stage, making, best, found)
            if made and make is not None and not wanted.heal:
                _place(made[0].folder, make, inputs.job(), staging)
            stage.commit()
    if make is not None and (not made or wanted.heal):
        run(Path(out) / "recipe.yaml", None, make, options, wanted.revision)
    return found


def _write(stage: Stage, making: Making, best: Model, found: Found) -> None:
    """The recipe, what it reads of its own, and the reports."""
    beside = {f"./{name}": content for name, content in making.files(best).items()}
    for name, content in beside.items():
        stage.write_file(Path(name).name, content)
    recipe = dump(making.recipe(best, Path()), stage.out, inside=beside, passed_on=False)
    stage.write_file("recipe.yaml", recipe)
    stage.write_file("report.html", html_found(found.plain(), recipe))
    stage.write_file("report.json", json.dumps(found.plain(), allow_nan=False) + "\n")
    stage.write_file("scores.safetensors", save(dict(making.seeker.scorer.store.values)))


def _check_make(make: str | os.PathLike[str], out: str | os.PathLike[str], staging: dict[str, Any]) -> None:
    """Raise SurgeryError where the model could not be written in the end."""
    Stage.check(os.fspath(make), **staging)
    places = [Path(os.path.realpath(each)) for each in (make, out)]
    if any(one in (other, *other.parents) for one, other in (places, places[::-1])):
        raise SurgeryError(
            f"{os.fspath(make)}: the model and the findings ({os.fspath(out)}) need folders of their own"
        )


def _place(made: Path, make: str | os.PathLike[str], job: dict[str, str], staging: dict[str, Any]) -> None:
    """Move the model that was made to where it is wanted."""
    with Stage.open(os.fspath(make), job=job, **staging) as stage:
        stage.take(made)
        stage.commit()


def _prepared(opened: _Opened, wanted: Wanted, clock: _Clock, scratch: Path, say: Say) -> Making:
    """What is measured once: what options cost, what the parent does on the text, what each option scores."""
    space = Space.of(opened.parent, opened.meters, opened.operations).priced(clock.of(TIMING))
    space.check_reach()
    clock.lap("costs")
    scorer = scorer_of(space, opened.texts, wanted.tokens, opened.options.batch, clock.before(CHOOSING))
    clock.lap("walk the parent")
    seeker = Seeker(space, scorer, clock.before(CHOOSING), say)
    seeker.score(clock.before(SCORING), lambda: _work(opened, space, wanted).seconds)
    clock.lap("score options")
    place = Place(opened.parent.name, wanted.revision, opened.texts.wanted, scratch)
    return Making(seeker, place, wanted.heal, opened.options)


def preview(
    model: str | os.PathLike[str], targets: str | Sequence[str], wanted: Wanted = Wanted(), say: Say = silent
) -> Preview:
    """What `search` would choose among, and what that takes: nothing but one layer is timed, nothing is written.

    Raises:
        SurgeryError: as `search`, but for what only measured costs tell.
    """
    opened = _opened(model, targets, wanted, say)
    space = Space.of(opened.parent, opened.meters, opened.operations)
    measuring = (meter.preparation(space.shapes, space.resized) for meter in opened.meters)
    return Preview(space, _work(opened, space, wanted), tuple(filter(None, measuring)))


def _work(opened: _Opened, space: Space, wanted: Wanted) -> Work:
    return work_of(space, opened.parent, wanted.tokens, opened.texts.wanted.sequence_length, opened.options)


@dataclass(frozen=True)
class _Opened:
    """A search before it measures anything."""

    parent: OpenedCheckpoint
    engine: str
    meters: list[Meter]
    operations: tuple[str, ...]
    texts: Texts
    options: Options

    def found(self, timings: dict[str, float]) -> Found:
        """What there is to say of it beside what it finds."""
        tokens = self.texts.windows
        return Found(
            model=self.parent.name,
            engine=self.engine,
            text=self.texts.description,
            tokens=tokens.numel(),
            sequence_length=tokens.shape[1],
            operations=self.operations,
            timings=timings,
        )


def _opened(model: str | os.PathLike[str], targets: str | Sequence[str], wanted: Wanted, say: Say) -> _Opened:
    bounds = parse_targets([targets] if isinstance(targets, str) else targets)
    operations = _told_by_text(chosen_operations(wanted.allow, wanted.forbid), wanted, say)
    device = chosen_device(wanted.device)
    engine = None
    if wanted.engine:
        engine = Engine.parse(wanted.engine, context=wanted.context, threads=wanted.threads, device=device)
    parent = open_model(os.fspath(model), wanted.revision, wanted.trust_remote_code)
    options = Options(
        device=device,
        dtype=dtype_of(wanted.dtype),
        batch=wanted.batch,
        trust_remote_code=wanted.trust_remote_code,
        say=say,
    )
    longest = min(SEQUENCE_LENGTH, parent.spec.max_positions or SEQUENCE_LENGTH)
    asked = calibration(
        text=named_text(wanted.text),
        dataset=wanted.dataset,
        tokens=max(wanted.refit_tokens, 4 * wanted.tokens),
        sequence_length=longest if wanted.sequence_length is None else wanted.sequence_length,
        self_share=wanted.self_share,
        seed=wanted.seed,
    )
    texts = Texts(parent, asked, asked.tokens, options)
    made = meters(bounds, engine, parent)
    return _Opened(parent, engine.written if engine else "none", made, operations, texts, options)


def _told_by_text(operations: tuple[str, ...], wanted: Wanted, say: Say) -> tuple[str, ...]:
    """The operations without those that only text of the user's can choose for, where there is none.

    What a model writes in some thousand tokens holds few of the words that it knows, and none that it finds unlikely:
    which of them other text needs it does not tell, nor what it costs that they are gone.

    Raises:
        SurgeryError: none is left.
    """
    if wanted.text or wanted.dataset:
        return operations
    left = tuple(name for name in operations if Touch.CUTS_VOCABULARY not in OPERATIONS[name].touches)
    dropped = ", ".join(name for name in operations if name not in left)
    reason = "text that is sampled from the model tells too little of which tokens other text needs; give --text FILE"
    if not left:
        raise SurgeryError(f"{dropped}: {reason}")
    if dropped:
        say(f"{dropped} is not used: {reason}")
    return left


class _Clock:
    """Time that is left, and what phases took."""

    def __init__(self, minutes: float | None) -> None:
        self.start = self.last = time.monotonic()
        self.seconds = None if minutes is None else 60 * minutes
        self.laps: dict[str, float] = {}

    def in_time(self) -> bool:
        """True while time is left."""
        return self.before(1.0)()

    def of(self, share: float) -> float | None:
        """Seconds that are this share of the time, None where it is not bounded."""
        return None if self.seconds is None else share * self.seconds

    def before(self, share: float) -> Callable[[], bool]:
        """What tells whether this share of the time is not over, by the first process's clock."""
        if self.seconds is None:
            return lambda: True
        end = self.start + share * self.seconds
        return lambda: from_first(lambda: time.monotonic() < end)

    def lap(self, phase: str) -> None:
        """A phase is over."""
        now = time.monotonic()
        self.laps[phase], self.last = round(now - self.last, 1), now
