"""Every verb on a card computes what it computes on a CPU, within what float32 sums in another order differ by."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, save_encoder, save_tiny
from safetensors.torch import load_file
from standin.__main__ import COMMANDS, LETTERS

DEVICES = ("cpu", "cuda")
CLOSE = {"rtol": 2e-3, "atol": 2e-3}
# What a model writes beside a text is drawn by the device's own generator.
SAME = ("--self-share", "0")
TEXT = ("--text", "text.txt", "--tokens", "128", "--seq-len", "16")
WRITING = [name for name in COMMANDS if name not in ("analyze", "search", "eval", "eval of an encoder", "bench")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a text."""
    letters = random.Random(0)
    (tmp_path / "text.txt").write_text("".join(letters.choice(LETTERS) for _ in range(9000)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    return tmp_path


def numbers_of(value, path=()):
    """Every number of a report, by its place."""
    if isinstance(value, dict):
        return {place: each for key, inner in value.items() for place, each in numbers_of(inner, (*path, key)).items()}
    if isinstance(value, list):
        return {place: each for i, inner in enumerate(value) for place, each in numbers_of(inner, (*path, i)).items()}
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return {path: float(value)} if known else {}


def alike(mine, theirs):
    mine, theirs = numbers_of(mine), numbers_of(theirs)
    assert mine.keys() == theirs.keys() and mine
    for where, value in mine.items():
        assert math.isclose(value, theirs[where], rel_tol=5e-3, abs_tol=5e-3), (where, value, theirs[where])


def judged_alike(run):
    said = []
    for device in DEVICES:
        code, out, err = run("eval", "cut", "--against", "parent", *TEXT, "--json", "--device", device)
        assert code == 0, err
        said.append(json.loads(out))
    alike(*said)


def tensors_of(folder):
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MIXTURE_NAMES])
def test_each_family_is_judged_alike(place, run, family):
    save_tiny(place / "parent", family, tokenizer=True)
    cut = ("prune", "parent", "--blocks", "2", "-o", "cut", "--no-refit")
    assert run(*cut, "--device", "cpu")[0] == 0
    judged_alike(run)


@pytest.mark.parametrize("family", ENCODER_NAMES)
def test_each_encoder_is_judged_alike(place, run, family):
    save_encoder(place / "parent", family)
    assert run("prune", "parent", "--blocks", "2", "-o", "cut", "--no-refit", "--device", "cpu")[0] == 0
    judged_alike(run)


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MIXTURE_NAMES])
def test_each_family_is_measured_alike(place, run, family):
    save_tiny(place / "parent", family, tokenizer=True)
    for device in DEVICES:
        code, _, err = run("analyze", "parent", "-o", device, *TEXT, *SAME, "--device", device)
        assert code == 0, err
    mine, theirs = (tensors_of(place / device) for device in DEVICES)
    assert mine.keys() == theirs.keys() and mine
    for name, each in mine.items():
        torch.testing.assert_close(each, theirs[name], **CLOSE, equal_nan=True)


@pytest.mark.parametrize("name", WRITING)
def test_each_verb_writes_the_same(place, run, name):
    """Fits and training included: what differs are sums' orders."""
    save_tiny(place / "parent", "llama", tokenizer=True, num_hidden_layers=4)

    def cut(name, *more):
        return (*COMMANDS[name], *(SAME if "--text" in COMMANDS[name] else ()), *more)

    needs = {"heal": "fuse", "heal, layer by layer": "matmulfree"}.get(name)
    if needs:
        assert run(*cut(needs), "--device", "cpu")[0] == 0
    command = list(cut(name))
    target = command.index("-o") + 1
    for device in DEVICES:
        command[target] = device
        code, out, err = run(*command, "--device", device)
        assert code == 0, out + err
    mine, theirs = (tensors_of(place / device) for device in DEVICES)
    assert mine.keys() == theirs.keys()
    if "sampled" in name or name == "fff":
        return  # a card draws other text; of trees a rounding chooses another branch
    for key, each in mine.items():
        far, size = (float(torch.linalg.norm(one.double())) for one in (each - theirs[key], theirs[key]))
        assert far <= 2e-2 * size, (key, far, size)


def test_a_search_scores_and_chooses_alike(place, run, monkeypatch):
    save_tiny(place / "parent", "llama", tokenizer=True, num_hidden_layers=4)
    command = [*COMMANDS["search"], "--allow", "prune_width"]
    for device in DEVICES:
        (place / device).mkdir()
        command[command.index("-o") + 1] = f"{device}/found"
        # A score that is kept asks no device.
        monkeypatch.setenv("LLMSURGEON_CACHE", str(place / f"cache-{device}"))
        code, out, err = run(*command, "--device", device)
        assert code == 0, out + err
    mine, theirs = (tensors_of(place / device / "found") for device in DEVICES)
    assert mine.keys() == theirs.keys() and mine
    for name, each in mine.items():
        torch.testing.assert_close(each, theirs[name], **CLOSE)
    recipes = [(place / device / "found" / "recipe.yaml").read_text() for device in DEVICES]
    assert recipes[0] == recipes[1]


def test_bench_says_what_the_allocator_held(place, run):
    save_tiny(place / "parent", "llama", tokenizer=True)
    code, out, err = run("bench", "parent", "--prompt", "8", "--new-tokens", "4", "--rounds", "3", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["device"].startswith("cuda")  # taken without being asked for
    model = found["model"]
    assert model["peak_memory_bytes"] >= model["parameter_bytes"] > 0
    assert model["prefill_seconds"]["median"] > 0 and model["decode_step_seconds"]["median"] > 0


def test_bench_in_a_graph(place, run):
    save_tiny(place / "parent", "llama", tokenizer=True)
    sizes = ("--prompt", "8", "--new-tokens", "16", "--rounds", "5", "--json")
    medians = []
    for flags in ((), ("--graph",)):
        code, out, err = run("bench", "parent", *sizes, *flags, "--device", "cuda")
        assert code == 0, err
        medians.append(json.loads(out)["model"]["decode_step_seconds"]["median"])
    assert medians[1] < medians[0]  # six layers of 32 numbers: all that is saved are launches


def test_auto_takes_the_card_and_says_so(place):
    save_tiny(place / "parent", "llama", tokenizer=True)
    command = [sys.executable, "-m", "llmsurgeon", "eval", "parent", *TEXT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"computing on cuda ({torch.cuda.get_device_name(0)})" in done.stderr


def test_a_stopped_training_goes_on_bit_for_bit(place, run):
    save_tiny(place / "parent", "llama", tokenizer=True, num_hidden_layers=4)
    assert run(*COMMANDS["fuse"], "--device", "cuda")[0] == 0
    sets = ("distill.steps=60", "distill.tokens=6000", "distill.sequence_length=16", "calibration.tokens=128")
    command = [sys.executable, "-m", "llmsurgeon", "heal", "fused", "--parent", "parent", "--text", "text.txt"]
    command += ["--device", "cuda", "--set", "calibration.sequence_length=16"]
    command += [word for each in sets for word in ("--set", each)]
    subprocess.run([*command, "-o", "whole"], check=True, capture_output=True)
    stopped = subprocess.Popen([*command, "-o", "again"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while stopped.poll() is None and not _begun(place / "again"):
        time.sleep(0.005)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() in (0, 143)
    subprocess.run([*command, "-o", "again"], check=True, capture_output=True)
    mine, theirs = (tensors_of(place / name) for name in ("whole", "again"))
    assert mine.keys() == theirs.keys() and all(torch.equal(each, theirs[name]) for name, each in mine.items())


def _begun(out):
    logs = [file for folder in out.parent.glob(f"{out.name}*") for file in folder.rglob("loss.jsonl")]
    return any(len(log.read_text().splitlines()) >= 8 for log in logs)
