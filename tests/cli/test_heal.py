"""`llmsurgeon heal`: what it writes, what it refuses, how it goes on, and processes as accelerate starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import TEXT, encoder_tokenizer, save_encoder, save_tiny

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.cli import main as cli
from llmsurgeon.planning.opened import open_model
from llmsurgeon.recipe.recipe import loads

CUT = "steps:\n  - {op: prune_attention, layers: [2, 3]}\n  - {op: fuse_ffn, runs: [1-3]}\n"
CALIBRATION = "version: 1\ncalibration: {text: text.txt, tokens: 512, sequence_length: 16}\n"
STEP = "{op: distill, steps: 6, sequence_length: 16, batch: 2, learning_rate: 0.002, evaluations: 2, save_steps: 2}"
HEAL = f"{CALIBRATION}steps:\n  - {STEP}\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A parent, a student cut from it, and recipes."""
    made = tmp_path_factory.mktemp("made")
    save_tiny(made / "parent", "llama", tokenizer=True)
    (made / "text.txt").write_text(TEXT)
    (made / "cut.yaml").write_text(CALIBRATION + CUT)
    (made / "heal.yaml").write_text(HEAL)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(made)
        cli.main(["run", "cut.yaml", "parent", "-o", "student"])
    assert not stop.value.code
    return made


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """A working folder with all that was made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_it_writes_a_whole_checkpoint_in_the_students_form(folder, run):
    code, out, err = run("heal", "student", "--parent", "parent", "-r", "heal.yaml", "-o", "healed", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == "surgeon" and report["distill"][0]["trainings"][0]["steps"] == 6
    healed = folder / "healed"
    assert verify_files(healed) == [] and not list(folder.glob("*.partial"))
    before, after = (json.loads((folder / name / "config.json").read_text()) for name in ("student", "healed"))
    assert before == after
    assert {"loss.jsonl", "report.html", "tokenizer.json", "surgeon_blocks.py"} <= {p.name for p in healed.iterdir()}
    page = (healed / "report.html").read_text()
    assert "Loss" in page and "Where the time went" in page and "<script" not in page
    steps = loads((healed / "recipe.yaml").read_text()).steps
    assert [step.op for step in steps] == ["prune_attention", "fuse_ffn", "distill"]
    surgery = json.loads((healed / "surgery.json").read_text())
    assert surgery["parents"] == [[0], [1, 2, 3], [4], [5]] and surgery["distill"][0]["mode"] == "global"
    assert "Distilled: the whole student" in (healed / "README.md").read_text()
    judged = report["distill"][0]["trainings"][0]["judged"]
    assert report["evaluation"]["kl"] == pytest.approx(min(j["kl"] for j in judged), rel=1e-4)
    assert report["evaluation"]["kl"] < judged[0]["kl"]


def test_a_recipe_cuts_refits_and_distills_in_one_go(folder, run):
    (folder / "all.yaml").write_text(f"{CALIBRATION}{CUT}  - {{op: refit}}\n  - {STEP}\ngate: {{max_kl: 100}}\n")
    code, _, err = run("run", "all.yaml", "parent", "-o", "out")
    assert code == 0, err
    surgery = json.loads((folder / "out/surgery.json").read_text())
    assert surgery["refit"] and surgery["distill"] and (folder / "out/report.html").exists()


def test_a_student_in_the_familys_own_form_keeps_it(folder, run):
    (folder / "short.yaml").write_text(CALIBRATION + "steps:\n  - {op: prune_blocks, layers: [2]}\n")
    assert run("run", "short.yaml", "parent", "-o", "short")[0] == 0
    code, _, err = run("heal", "short", "--parent", "parent", "-r", "heal.yaml", "-o", "healed")
    assert code == 0, err
    assert json.loads((folder / "healed/config.json").read_text())["model_type"] == "llama"
    assert json.loads((folder / "healed/surgery.json").read_text())["parents"] == [[0], [1], [3], [4], [5]]


def test_local_mode_moves_changed_blocks_alone(folder, run):
    local = ("--set", "distill.mode=local")
    assert run("heal", "student", "--parent", "parent", "-r", "heal.yaml", "-o", "healed", *local)[0] == 0
    student, healed = (open_model(str(folder / name)).weights for name in ("student", "healed"))
    moved = {name.split(".")[2] for name in student if not torch.equal(student[name], healed[name])}
    assert moved == {"1"}
    assert "Block 1: " in (folder / "healed/report.html").read_text()


def test_a_tied_head_is_saved_without_a_warning(folder, run, caplog):
    save_tiny(folder / "tied", "llama", tokenizer=True, tie_word_embeddings=True)
    assert run("prune", "tied", "-o", "short", "--blocks", "2", "--no-refit")[0] == 0
    code, _, err = run("heal", "short", "--parent", "tied", "-r", "heal.yaml", "-o", "healed")
    assert code == 0, err
    assert "Removed shared tensor" not in caplog.text


def test_the_gate_is_held(folder, run):
    (folder / "gate.yaml").write_text(HEAL + "gate: {max_kl: 0.000001}\n")
    code, out, err = run("heal", "student", "--parent", "parent", "-r", "gate.yaml", "-o", "healed", "--json")
    assert code == 3 and "misses the recipe's gate" in err and (folder / "healed/config.json").exists()
    assert "KL" in json.loads(out)["gate_missed"][0]


@pytest.mark.parametrize(("arguments", "message"), [
    (("student", "--parent", "student"), "must be the model that it was cut from"),
    (("student", "--parent", "other"), "is not cut from"),
    (("student", "--parent", "parent", "-r", "cut.yaml"), "takes the distill steps of a recipe, and this one has none"),
    (("student", "--parent", "parent", "--set", "distill.stepps=4"), "did you mean 'steps'"),
    (("student", "--parent", "parent", "--set", "distill.hidden=0", "--set", "distill.kl=0"), "nothing to learn from"),
    (("student", "--parent", "parent", "--text", "none.txt"), "no such text file"),
    (("student", "--parent", "parent", "--resume"), "there is no healed.partial to go on from"),
    (("student", "--parent", "parent", "-r", "heal.yaml", "--set", "distill.train=[x]"), "no tensor fits 'x'"),
    (("student", "--parent", "nowhere"), "no such folder here"),
    (("student", "--parent", "parent", "-r", "heal.yaml", "--minutes", "0.00001"), "not one step fitted into 1e-05"),
    (("student", "--parent", "parent", "-r", "heal.yaml", "--set", "distill.sequence_length=512"), "has 128 positions"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_written(folder, run, arguments, message):
    save_tiny(folder / "other", "llama", tokenizer=True, hidden_size=64)
    code, out, err = run("heal", *arguments, "-o", "healed")
    assert code == 2 and message in err and out == ""
    assert not (folder / "healed").exists()


def test_a_dry_run_plans_and_writes_nothing(folder, run):
    code, out, err = run(
        "heal", "student", "--parent", "parent", "-r", "heal.yaml", "-o", "healed", "--dry-run", "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["blocks"] == [[0], [1, 2, 3], [4], [5]] and [step["op"] for step in report["steps"]] == ["distill"]
    code, out, _ = run("heal", "student", "--parent", "parent", "-r", "heal.yaml", "-o", "healed", "--dry-run")
    assert code == 0 and "Plan for parent" in out and "distill: " in out
    assert not (folder / "healed").exists() and not list(folder.glob("*.partial"))


def test_a_collapse_that_training_leaves_is_said(folder, run):
    """One step at no rate to speak of heals nothing of a student that says the opposite of its parent."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "student/model.safetensors")
    weights["lm_head.weight"] = -40 * load_file(folder / "parent/model.safetensors")["lm_head.weight"]
    save_file(weights, folder / "student/model.safetensors", metadata={"format": "pt"})
    least = ("--set", "distill.learning_rate=1e-9", "--set", "distill.steps=1")
    code, out, err = run("heal", "student", "--parent", "parent", "-r", "heal.yaml", "-o", "healed", *least)
    assert code == 0 and "WARNING: Quality has collapsed" in out, err


def test_a_student_that_does_not_say_where_it_comes_from_is_refused(folder, run):
    save_tiny(folder / "short", "llama", tokenizer=True, num_hidden_layers=4)
    code, _, err = run("heal", "short", "--parent", "parent", "-o", "healed")
    assert code == 2 and "which parent layers each block stands for" in err


def encoder(folder):
    """A BERT on disk with a tokenizer that frames and pads, and a student of it with a narrower FFN."""
    save_encoder(folder / "bert", "bert")
    tokenizer = encoder_tokenizer()
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder / "bert")
    (folder / "prose.txt").write_text("".join(f"This is a sentence, the one numbered {n} of all.\n" for n in range(80)))
    calibration = "calibration: {text: prose.txt, tokens: 1280, sequence_length: 32, sentences: true}"
    (folder / "narrow.yaml").write_text(f"version: 1\n{calibration}\nsteps: [{{op: prune_ffn, layers: [2, 3]}}]\n")
    (folder / "encoder.yaml").write_text(
        f"version: 1\n{calibration}\n"
        "steps: [{op: distill, steps: 6, sequence_length: 40, batch: 2, learning_rate: 0.002, evaluations: 2}]\n"
    )


def test_an_encoder_is_healed_on_sentences(folder, run):
    encoder(folder)
    assert run("run", "narrow.yaml", "bert", "-o", "narrow")[0] == 0
    code, out, err = run("heal", "narrow", "--parent", "bert", "-r", "encoder.yaml", "-o", "healed", "--json")
    assert code == 0, err
    report = json.loads(out)
    judged = report["distill"][0]["trainings"][0]["judged"]
    assert report["evaluation"]["pooled_cosine"] == pytest.approx(max(j["pooled_cosine"] for j in judged), abs=1e-5)
    assert report["evaluation"]["pooled_cosine"] > judged[0]["pooled_cosine"]
    step = loads((folder / "healed/recipe.yaml").read_text()).steps[-1]
    assert step.kl == 0 and step.pooled == 1
    assert "Cosine of pooled states" in (folder / "healed/report.html").read_text()
    code, out, err = run("heal", "narrow", "--parent", "bert", "-r", "encoder.yaml", "-o", "healed", "--overwrite")
    assert code == 0 and "held-out 1 - cos" in " ".join(out.split()), err


def test_an_encoder_is_not_asked_for_next_tokens(folder, run):
    encoder(folder)
    assert run("run", "narrow.yaml", "bert", "-o", "narrow")[0] == 0
    wrong = ("--set", "distill.kl=1")
    code, _, err = run("heal", "narrow", "--parent", "bert", "-r", "encoder.yaml", *wrong, "-o", "healed")
    assert code == 2 and "kl and cross_entropy are of the next token" in err and not (folder / "healed").exists()


HEALING = ("heal", "student", "--parent", "parent", "-r", "heal.yaml", "-o", "healed")


def healing(*arguments, **options):
    return warm.start(warm.LLMSURGEON, *HEALING, *arguments, **options)


def begun(folder, *arguments):
    process = healing(*arguments)
    log = folder / "healed.partial/scratch/distill-0/loss.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def test_sigterm_ends_with_143_and_resume_goes_on(folder, run):
    process = begun(folder, "--set", "distill.steps=100000")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143 and "error: distill: stopped by SIGTERM" in err
    assert not (folder / "healed").exists()
    (state,) = (folder / "healed.partial/scratch/distill-0").glob("state-*")
    step = int(state.name.removeprefix("state-"))
    heal = ("heal", "student", "--parent", "parent", "-r", "heal.yaml", "-o", "healed", "--resume")
    # Hours of training are not lost by another setting, be it with --resume or without.
    for insisting in (heal, heal[:-1]):
        code, _, err = run(*insisting, "--set", "distill.batch=3")
        assert code == 2 and "is of another job" in err and "--discard-partial" in err
        assert f"distill: step {step:,} of 100,000" in err
        assert state.exists()
    process = begun(folder, "--set", "distill.steps=100000")
    process.kill()
    process.communicate()
    (state,) = (folder / "healed.partial/scratch/distill-0").glob("state-*[0-9]")
    step = int(state.name.removeprefix("state-"))
    code, out, err = run(*heal, "--set", f"distill.steps={step + 4}", "--json")
    assert code == 0, err
    assert json.loads(out)["distill"][0]["trainings"][0]["steps"] == step + 4
    assert json.loads((folder / "healed/loss.jsonl").read_text().splitlines()[-2])["step"] == step + 4


LOCAL = ("--set", "distill.mode=local", "--set", "distill.processes=2", "--set", "distill.steps=100000")


def in_group(group: int) -> list[int]:
    """The processes of a group that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_of_local_mode_end_with_the_run(folder, number):
    if number == signal.SIGTERM:  # as from a shell: what its processes import is what it is there
        environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "llmsurgeon", *HEALING, *LOCAL],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
    else:
        process = healing(*LOCAL, new_session=True)
    scratch = folder / "healed.partial/scratch/distill-0"
    while len(list(scratch.glob("block-*/state-*[0-9]"))) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    process.wait(timeout=120)
    until = time.monotonic() + 20
    while left := in_group(process.pid):
        assert time.monotonic() < until, left
        time.sleep(0.02)
    _, err = process.communicate()
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert "error: " in err.splitlines()[-1] and list(scratch.glob("block-*/state-*[0-9]"))
        assert err.count("error: ") == 1


def test_two_processes_of_accelerate_launch_write_once(folder):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    ranks = [
        healing(
            "--json",
            env={
                **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no",
            },
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert json.loads(said[0][0])["distill"][0]["trainings"][0]["tokens"] == 6 * 2 * 2 * 16 and said[1][0] == ""
    assert verify_files(folder / "healed") == []
