"""Two processes, as torchrun starts them: what they measure, choose, fit and judge is what one process does."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import TEXT, save_tiny
from safetensors.torch import load_file

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.errors import SurgeryError
from llmsurgeon.planning.checks import check_processes
from llmsurgeon.processes import world
from llmsurgeon.processes.share import Share, dealt
from llmsurgeon.recipe.recipe import loads

# Several command lines in one process, until one fails.
SCRIPT = """
import json, sys
from llmsurgeon.cli.main import main

for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""
# 23 sequences, of which 3 judge: neither goes evenly into two.
CALIBRATION = "version: 1\ncalibration: {text: text.txt, tokens: 736, sequence_length: 32}\n"
# Between them the scores that are measured on text, and the updates of the refit.
RECIPES = {
    "fused": """
  - {op: prune_attention, count: 2}
  - {op: fuse_ffn, runs: auto, max_run: 3}
  - {op: refit}
gate: {max_kl: 100}
""",
    "thin": """
  - {op: prune_width, keep: 0.5, multiple_of: 8}
  - {op: prune_heads, keep: 0.5, unit: head}
  - {op: refit}
""",
    "ternary": """
  - {op: ternary, share: 0.3, sub_norm: true}
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    (tmp_path / "text.txt").write_text(TEXT)
    for name, steps in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(f"{CALIBRATION}steps:{steps}")
    return tmp_path


def launched(*commands: list[str]) -> list[warm.Process]:
    """Two processes that each run these command lines."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [
        warm.start(SCRIPT, json.dumps(commands), env={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]


def commands(out: str) -> list[list[str]]:
    return [
        ["analyze", "parent", "-o", f"{out}-analysis", "--text", "text.txt", "--tokens", "736", "--seq-len", "32"],
        *(["run", f"{name}.yaml", "parent", "-o", f"{out}-{name}", "--quiet"] for name in RECIPES),
        ["eval", f"{out}-fused", "--against", "parent", "--text", "text.txt", "--tokens", "736", "--json"],
    ]


def numbers(value: object) -> object:
    """JSON whose numbers are compared to the order of sums."""
    if isinstance(value, dict):
        return {key: numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    return pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value


def test_two_processes_do_what_one_does(folder, run):
    """To the order of sums; the first one writes and prints, and what they cannot do they refuse with one voice."""
    both = launched(*commands("two"), ["export", "two-fused", "--to", "surgeon", "-o", "exported"])
    alone = [run(*command) for command in commands("one")]
    assert [code for code, _, _ in alone] == [0] * 5, alone
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    assert said[1] == ("", "")
    assert said[0][1].count("error: ") == 1 and "export runs in one process" in said[0][1]
    assert not (folder / "exported").exists()

    reports = [json.loads((folder / f"{out}-analysis/report.json").read_text()) for out in ("one", "two")]
    assert reports[1] == numbers(reports[0])
    for name in RECIPES:
        steps = [loads((folder / f"{out}-{name}/recipe.yaml").read_text()).steps for out in ("one", "two")]
        assert steps[0] == steps[1]
        assert verify_files(folder / f"two-{name}") == []
        one, two = (load_file(folder / f"{out}-{name}/model.safetensors") for out in ("one", "two"))
        assert one.keys() == two.keys()
        for tensor in one:
            torch.testing.assert_close(one[tensor], two[tensor], rtol=1e-3, atol=1e-4, msg=tensor)
        surgery = [json.loads((folder / f"{out}-{name}/surgery.json").read_text()) for out in ("one", "two")]
        for op in ("refit", "ternary"):
            assert surgery[1].get(op) == numbers(surgery[0].get(op))
    judged = json.loads(alone[4][1]) | {"model": "two-fused"}
    assert json.loads(said[0][0].splitlines()[-1]) == numbers(judged)


SEARCH = ["search", "parent", "--text", "text.txt", "--tokens", "256", "--refit-tokens", "736", "--seq-len", "32"]


def test_two_processes_find_what_one_finds(folder, run, monkeypatch):
    """Each measures its part of the models: what it measures is bit for bit what one process measures."""
    (folder / "text.txt").write_text(TEXT * 10)
    command = [*SEARCH, "--target", "params=0.8x", "--forbid", "fuse_ffn", "-o"]
    monkeypatch.setenv("LLMSURGEON_CACHE", str(folder / "cache of two"))
    both = launched([*command, "two"])
    monkeypatch.setenv("LLMSURGEON_CACHE", str(folder / "cache of one"))
    code, _, err = run(*command, "one")
    assert code == 0, err
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[1] == ("", "") and "wrote two/recipe.yaml" in said[0][0]
    one, two = (load_file(folder / out / "scores.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 50
    assert all(torch.equal(one[key], two[key]) for key in one)
    steps = [loads((folder / out / "recipe.yaml").read_text()).steps for out in ("one", "two")]
    assert steps[0] == steps[1]
    reports = [json.loads((folder / out / "report.json").read_text()) for out in ("one", "two")]
    for report in reports:
        report.pop("timings")
    assert reports[1] == numbers(reports[0])
    # Neither has measured what the other has.
    kept = list((folder / "cache of two/search").glob("*/scores-*.safetensors"))
    assert sum(len(load_file(file)) for file in kept) == len(two)


def test_two_processes_time_in_one(folder):
    """The first one times in the engine; both choose by its figures, and measure what they choose."""
    command = [*SEARCH, "--target", "decode=1.05x", "--engine", "transformers", "--context", "16"]
    both = launched([*command, "--allow", "prune_attention", "--allow", "prune_blocks", "-o", "out"])
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[1] == ("", "") and "decode=1.05x: " in said[0][0] and "measured" in said[0][0]


def test_a_process_that_dies_ends_the_run_and_the_same_command_goes_on(folder, run):
    (folder / "text.txt").write_text(TEXT * 10)
    (folder / "cut.yaml").write_text(
        f"{CALIBRATION}steps:\n  - {{op: prune_attention, layers: [1]}}\n  - {{op: refit}}\n"
    )
    command = ["run", "cut.yaml", "parent", "--quiet", "--tokens", "32768", "-o", "out"]
    both = launched(command)
    scratch = folder / "out.partial/scratch/refit-0"
    while not (kept := list(scratch.glob("layer-*.safetensors"))):
        assert both[0].poll() is None, both[0].communicate()
        time.sleep(0.005)
    fitted = load_file(kept[0])
    both[1].send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=60) for process in both]
    assert both[0].returncode == 2 and both[1].returncode == -signal.SIGKILL
    assert said[0][1].count("error: ") == 1 and "another process of this run has ended" in said[0][1]
    assert not (folder / "out").exists()
    # One process goes on where two were.
    code, _, err = run(*command)
    assert code == 0 and verify_files(folder / "out") == [] and not (folder / "out.partial").exists(), err
    written = load_file(folder / "out/model.safetensors")
    assert fitted and all(torch.equal(written[name], fitted[name]) for name in fitted)


@pytest.fixture
def second_of_three(monkeypatch):
    monkeypatch.setattr(world, "_world", world._World(3, 1, None))


def test_a_share_of_the_first_sequences_is_the_first_of_the_share(second_of_three):
    share = Share.of(8)
    assert list(share.rows) == [1, 4, 7] and share.mine(torch.arange(8)).tolist() == [1, 4, 7]
    assert [share.of_first(number) for number in range(9)] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [share.place(row) for row in share.rows] == [0, 1, 2]
    assert list(Share.of(2).rows) == [0, 1]  # too few to be shared: each has them


def test_what_is_fitted_needs_a_sequence_in_each_process(second_of_three):
    assert dealt(torch.tensor([4, 5, 6]), "refit").tolist() == [5] and dealt(torch.tensor([4])).tolist() == []
    with pytest.raises(SurgeryError, match=r"refit: 2 calibration sequences are fewer than the 3 processes .* tokens"):
        dealt(torch.tensor([4, 5]), "refit")


@pytest.mark.parametrize("step", ["{op: distill, steps: 2}", "{op: fff, depth: 2, leaf_width: 8}"])
def test_a_step_that_cannot_be_shared_is_refused(second_of_three, step):
    recipe = loads(f"version: 1\nsteps: [{step}]\n")
    with pytest.raises(SurgeryError, match=rf"^{recipe.steps[0].op} .*(one process|accelerate launch)"):
        check_processes(recipe)
