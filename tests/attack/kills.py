"""Kills at every call that changes the file system, in every verb that writes; then the same command again.

What must hold: OUT is what it was, or whole, at any moment; the same command again ends with the result of a run that
nobody disturbed, bit for bit; files of others are as they were; nothing is left beside OUT, in the cache that an
undisturbed run would not leave, or among the temporary files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from tests.attack.ground import SMALL
from tests.attack.scene import Ended, Scene, Verdict, judge

HEAL = """version: 1
calibration: {tokens: 256, sequence_length: 16, text: text.txt}
steps:
  - {op: distill, mode: MODE, steps: 4, sequence_length: 16, batch: 2, evaluations: 2, save_steps: 1}
"""
TEXT = ("--text", "text.txt")
SHORT = (*TEXT, "--tokens", "256", "--seq-len", "16")
SHARDS = ("--max-shard-size", "60KB")
# Files of somebody else, whose names are near to ours.
FOREIGN = ("OUT.replaced/thesis.txt", "OUT.old/thesis.txt", "OUT.partial.txt", "job.json", "scratch/thesis.txt")
# What Python's tempfile writes for an instant to see whether a folder can be written.
PROBE = re.compile(r"[a-z0-9_]{8}")
# What a file holds of times, which differ from run to run.
TIMED = ("surgery.json", "README.md", "loss.jsonl", "report.html", "checksums.b3")


@dataclass(frozen=True)
class Scenario:
    """A command that writes `out`. `inputs`: what it reads; `timed`: what it writes tells how long it took."""

    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    out: str = "OUT"
    timed: bool = False
    files: dict[str, str] = field(default_factory=dict)
    old: tuple[str, ...] | None = None  # the command that writes what is replaced


OLD = ("prune", "llama", "--blocks", "1", "--no-refit", "-o", "OUT")
FITTED = ("run", "recipe.yaml", "llama", "-o", "OUT", *SHARDS)
GGUF = ("export", "bytelevel", "--to", "gguf", "-o", "OUT.gguf")
ANALYSIS = ("analyze", "llama", "-o", "OUT", *SHORT)
HEALING = ("heal", "fused", "--parent", "llama", "-r", "heal.yaml", "-o", "OUT")
HEALED = ("fused", "llama", "text.txt")
SCENARIOS: dict[str, Scenario] = {
    "run": Scenario(FITTED, ("llama", "recipe.yaml", "text.txt")),
    "run over": Scenario((*FITTED, "--overwrite"), ("llama", "recipe.yaml", "text.txt"), old=OLD),
    "run a GGUF file": Scenario(("prune", "f32.gguf", "--blocks", "1", "-o", "OUT", *SHORT), ("f32.gguf", "text.txt")),
    "sampled": Scenario(("prune", "llama", "--blocks", "2", "-o", "OUT", *SMALL), ("llama",)),
    "heal": Scenario(HEALING, HEALED, timed=True, files={"heal.yaml": HEAL.replace("MODE", "global")}),
    "heal locally": Scenario(HEALING, HEALED, timed=True, files={"heal.yaml": HEAL.replace("MODE", "local")}),
    "export": Scenario(("export", "llama", "--to", "surgeon", "-o", "OUT", *SHARDS), ("llama",)),
    "export over": Scenario(("export", "llama", "--to", "surgeon", "-o", "OUT", "--overwrite"), ("llama",), old=OLD),
    "export gguf": Scenario(GGUF, ("bytelevel",), out="OUT.gguf"),
    "export gguf over": Scenario((*GGUF, "--overwrite"), ("bytelevel",), out="OUT.gguf", old=(*GGUF, "--type", "F32")),
    "analyze": Scenario(ANALYSIS, ("llama", "text.txt")),
    "analyze over": Scenario((*ANALYSIS, "--overwrite"), ("llama", "text.txt"), old=(*ANALYSIS, "--drop", "1")),
    "ternary": Scenario(("ternary", "llama", "--share", "0.5", "-o", "OUT", *SHARDS, *SHORT), ("llama", "text.txt")),
}


@dataclass(frozen=True)
class Undisturbed:
    """What a run leaves that nobody kills: files of OUT, names in the cache, and how many calls changed something."""

    made: dict[str, str]
    cache: Counter[str]
    calls: int


_known: dict[tuple[Path, str], Undisturbed] = {}


def attempt(draw: Random, scene: Scene) -> Verdict:
    """Kill a command once or twice, and run it to the end."""
    name = draw.choice(list(SCENARIOS))
    calls = undisturbed(name, scene).calls
    return killed(name, [draw.randrange(1, calls + 1) for _ in range(draw.choice((1, 1, 1, 2)))], scene)


def killed(name: str, kills: Sequence[int], scene: Scene) -> Verdict:
    """Kill a command at these calls, one after the other, and run it to the end."""
    scenario, truth = SCENARIOS[name], undisturbed(name, scene)
    before = _set_up(scenario, scene)
    old = _read(scene.work / scenario.out, scenario.timed)
    what = f"{name}: killed at call {' and '.join(map(str, kills))} of {truth.calls}"

    def verdict(wrong: str | None, ended: Ended) -> Verdict:
        return Verdict(what, scenario.arguments, wrong, ended)

    for call in kills:
        ended = scene.run(scenario.arguments, _killing(call))
        whole = _read(scene.work / scenario.out, scenario.timed)
        if ended.signal != signal.SIGKILL and (wrong := judge(ended)):
            return verdict(f"not killed, {wrong}", ended)
        if whole not in (old, truth.made):
            return verdict(f"behind a kill OUT is neither what it was nor whole{_difference(whole, truth.made)}", ended)
    ended = scene.run(scenario.arguments, _as_a_process)
    there = whole == truth.made and scenario.old is None
    if there and ended.code == 2 and "exists already" in ended.err:
        pass  # nothing was left to do
    elif ended.code != 0:
        how = f"{judge(ended)}, {ended.err.strip()[-300:]!a}"
        return verdict(f"started again it does not end well: {how}", ended)
    found = _read(scene.work / scenario.out, scenario.timed)
    wrong = None
    if found != truth.made:
        wrong = f"started again it gives something else{_difference(found, truth.made)}"
    elif left := sorted({path.name for path in scene.work.iterdir()} - before.keys() - {scenario.out}):
        wrong = f"left behind: {', '.join(left)}"
    elif {path: state for path, state in _state(scene.work, scenario.out).items()} != before["state"]:
        wrong = "files of others have changed"
    elif left := sorted((_kept(scene.folder / "cache") - truth.cache).elements()):
        wrong = f"left in the cache: {', '.join(left)}"
    elif left := sorted(name for name in _names(scene.folder / "tmp") if not PROBE.fullmatch(name)):
        wrong = f"left among the temporary files: {', '.join(left)}"
    return verdict(wrong, ended)


def undisturbed(name: str, scene: Scene) -> Undisturbed:
    """What a run of a scenario leaves, and in how many calls; run once."""
    key = (scene.ground.folder, name)
    if key not in _known:
        scenario = SCENARIOS[name]
        # Beside the healthy models; every scene has a `work`, so that names in results are alike.
        mine = Scene(scene.ground.folder / f"kills {name}", scene.ground)
        _set_up(scenario, mine)
        count = mine.folder / "calls"
        ended = mine.run(scenario.arguments, _counting(count))
        if ended.code != 0:
            raise RuntimeError(f"{name}: an undisturbed run ends with {ended.code}: {ended.err}")
        made = _read(mine.work / scenario.out, scenario.timed)
        _known[key] = Undisturbed(made, _kept(mine.folder / "cache"), len(count.read_bytes()))
        shutil.rmtree(mine.folder)
    return _known[key]


def _set_up(scenario: Scenario, scene: Scene) -> dict[str, Any]:
    """Inputs, files of others, an old OUT; the names that are there, and under "state" what those files hold."""
    for folder in ("cache", "tmp", "work"):
        (scene.folder / folder).mkdir(parents=True)
    scene.environment = {
        "LLMSURGEON_CACHE": str(scene.folder / "cache" / "llmsurgeon"),
        "TMPDIR": str(scene.folder / "tmp"),
    }
    for name in scenario.inputs:
        scene.copy(name)
    for name, content in scenario.files.items():
        (scene.work / name).write_text(content)
    for name in FOREIGN:
        path = scene.work / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("somebody's")
    if scenario.old:
        cached = scene.ground.folder / f"kills old {'-'.join(scenario.old[:2])} {scenario.out}"
        if not cached.exists():
            ended = scene.run(scenario.old)
            if ended.code != 0:
                raise RuntimeError(f"{scenario.old}: {ended.err}")
            (scene.work / scenario.out).rename(cached)
            for folder in ("cache", "tmp"):
                shutil.rmtree(scene.folder / folder)
                (scene.folder / folder).mkdir()
        copy = shutil.copytree if cached.is_dir() else shutil.copyfile
        copy(cached, scene.work / scenario.out)
    here = {path.name: None for path in scene.work.iterdir() if path.name != scenario.out}
    return {**here, "state": _state(scene.work, scenario.out)}


def _state(folder: Path, out: str) -> dict[str, str]:
    """Files beside OUT, and what they hold."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: sha256(path.read_bytes()).hexdigest() for name, path in named.items() if name.split("/")[0] != out}


def _read(out: Path, timed: bool) -> dict[str, str]:
    """The files of a result and what they hold; times left out. Empty where there is none."""
    if out.is_file():
        return {out.name: sha256(out.read_bytes()).hexdigest()}
    found = {}
    for path in sorted(out.rglob("*")) if out.is_dir() else ():
        name = path.relative_to(out).as_posix()
        if path.is_file():
            content = b"timed" if timed and name in TIMED else path.read_bytes()
            found[name] = sha256(content).hexdigest()
            if name == "loss.jsonl":
                found["losses"] = json.dumps([_untimed(json.loads(line)) for line in path.read_text().splitlines()])
        else:
            found[name] = "folder"
    return found


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _untimed(value) if isinstance(value, dict) else value for key, value in line.items() if key != "seconds"
    }


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return f" ({', '.join(names[:6])})"


def _kept(folder: Path) -> Counter[str]:
    """Files of a cache, how many of each kind: their keys follow the times of the files that they were made from."""
    return Counter(re.sub(r"[0-9a-f]{32}", "KEY", name) for name in _names(folder))


def _names(folder: Path) -> set[str]:
    """Files below a folder, and folders that nothing is in."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() or not any(path.iterdir())
    }


# In the process that is killed

CHANGING = {
    "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
    "shutil.rmtree", "shutil.copyfile", "shutil.move",
}  # fmt: skip
UNAUDITED = ("write", "pwrite", "ftruncate", "fsync", "copy_file_range", "sendfile", "posix_fallocate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _counting(path: Path) -> Callable[[], None]:
    """Leave a byte in a file for each call that changes the file system."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    write = os.write
    return lambda: _hook(lambda half: write(fd, b"."))


def _killing(call: int) -> Callable[[], None]:
    """Die by SIGKILL ahead of the call of this number; of a tensor file, with half of it written."""
    left = call

    def count(half: Callable[[], object] | None) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _hook(count)


def _as_a_process() -> None:
    """End as a process does that was not forked from this one: what goes with its objects goes."""
    tempfile.tempdir = None  # of the process that this one was forked from
    leave = os._exit

    def finish(code: int) -> None:
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]
        leave(code)

    os._exit = finish  # type: ignore[assignment]


def _hook(count: Callable[[Callable[[], object] | None], object]) -> None:
    """Call `count` ahead of each call that changes the file system, with what leaves it half done, if there is that."""
    import safetensors.torch

    tempfile.tempdir = None  # of the process that this one was forked from

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            count(None)

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count(None)
            return original(*arguments, **options)

        return call

    for name in UNAUDITED:
        setattr(os, name, counted(getattr(os, name)))
    save = safetensors.torch.save_file

    def save_file(tensors: Any, filename: Any, *rest: Any, **options: Any) -> None:
        def half() -> None:
            save(tensors, filename, *rest, **options)
            os.truncate(filename, os.path.getsize(filename) // 2)

        count(half)
        save(tensors, filename, *rest, **options)
        count(None)

    safetensors.torch.save_file = save_file
    sys.addaudithook(audit)
