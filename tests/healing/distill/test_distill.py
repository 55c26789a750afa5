"""Distillation of tiny students: what moves, what it reaches, how it stops, and that it goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import warm
from conftest import FAMILY_NAMES, tiny_model
from operations.helpers import operate, some_tokens, subject_of
from safetensors.torch import load_file

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import RecipeError, SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.write import write_config
from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.data import rows_of
from llmsurgeon.healing.distill.distill import distill
from llmsurgeon.healing.distill.loop import Trainer
from llmsurgeon.healing.distill.schedule import optimizer_of
from llmsurgeon.healing.distill.student import build_student
from llmsurgeon.healing.distill.tapped import TappedModel
from llmsurgeon.healing.distill.targets import StoredTargets, Wanted
from llmsurgeon.healing.distill.whole import wanted_of
from llmsurgeon.healing.store import overlay
from llmsurgeon.operations.distill import Distill, Lora
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

FUSED = (PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),)))
SHORT = dict(steps=30, sequence_length=16, batch=4, learning_rate=2e-3, warmup=2, evaluations=1, save_minutes=None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))


def fitting(steps, subject):
    """A removed block where the family cannot fuse."""
    return (PruneBlocks(layers=(2,)),) if steps == FUSED and FuseFFN.declined(subject.family) else steps


def case_of(folder, steps=FUSED, family="llama", dtype=torch.float32, **changes):
    """A cut tiny model beside its parent, with random text of 64 rows to train on and 8 that judge."""
    model = tiny_model(family, dtype=dtype, **changes)
    subject, base, config = subject_of(model)
    steps = fitting(steps, subject)
    parent_spec, weights = subject.spec, base
    for step in steps:
        plan = step.plan(subject)
        weights, subject = TransformedWeights(weights, plan.transforms), subject.after(plan)
    written = normalised(write_config(subject.spec, subject.family, config).student)
    tokens = some_tokens(batch=72, length=16)
    return Case(
        parent=LayerRunner(config, base, dtype),
        parent_config=config,
        parent_spec=parent_spec,
        fingerprint=f"{family}-{changes}-{dtype}",
        config=written,
        spec=subject.spec,
        weights=weights,
        text=[rows_of(tokens[:64], 16, "text")],
        held_out=tokens[64:],
        folder=folder,
        logs=folder / "logs",
    )


def settings_of(**changes):
    return Distill(**{**SHORT, **changes})


def kl_of(case, weights):
    """KL(parent || student) on the held-out rows, nats a token."""
    student = LayerRunner(case.config, weights, case.parent.dtype)
    with torch.no_grad():
        logits = [
            torch.stack([runner.final(row) for row in walk(runner, case.held_out, [Variant()])[0]])
            for runner in (case.parent, student)
        ]
    p, q = (x.double().log_softmax(-1) for x in logits)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("changes", [{}, {"mode": "local"}], ids=["global", "local"])
def test_it_brings_the_student_nearer_to_its_parent(tmp_path, family, changes):
    case = case_of(tmp_path, family=family)
    before = kl_of(case, case.weights)
    made = distill(case, settings_of(**changes))
    assert kl_of(case, overlay(case.weights, made.files)) < 0.9 * before
    losses = [line["loss"] for line in made.log if "loss" in line]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    assert [line["step"] for line in made.log if "evaluation" not in line] == list(range(1, 31))


@pytest.mark.parametrize("changes", [
    {"kl": 0.0}, {"hidden": 0.0}, {"hidden": 0.0, "top_k": 8}, {"positions": 0.5, "hidden_layers": 2},
    {"targets": "memory"}, {"targets": "memory", "top_k": 8}, {"accumulate": 2}, {"gradient_checkpointing": True},
    {"precision": "bfloat16"}, {"lora": Lora(rank=8)}, {"weight_decay": 0.1, "clip": None},
    {"optimizer": "torch.optim.Adam"},
], ids=lambda c: ",".join(c))  # fmt: skip
def test_every_setting_trains(tmp_path, changes):
    case = case_of(tmp_path)
    before = kl_of(case, case.weights)
    made = distill(case, settings_of(**changes))
    assert kl_of(case, overlay(case.weights, made.files)) < before
    assert made.trainings[0][1].stopped == "done" and made.trainings[0][1].steps == 30


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_activations_changes_nothing(tmp_path, family):
    logs = [
        distill(case_of(tmp_path / str(on), family=family), settings_of(steps=6, gradient_checkpointing=on)).log
        for on in (False, True)
    ]
    plain, thrifty = ([line["loss"] for line in log if "loss" in line] for log in logs)
    assert thrifty == pytest.approx(plain, rel=1e-4)


def test_the_evaluation_is_that_of_the_weights_that_are_kept(tmp_path):
    case = case_of(tmp_path)
    made = distill(case, settings_of(evaluations=3))
    _, training = made.trainings[0]
    best = min(training.judged, key=lambda judged: judged["value"])
    assert training.best_step == best["step"]
    held = case.held_out.shape[1] - 1
    student = LayerRunner(case.config, overlay(case.weights, made.files), torch.float32)
    with torch.no_grad():
        p, q = (
            torch.stack([r.final(row)[:held] for row in walk(r, case.held_out, [Variant()])[0]]).log_softmax(-1)
            for r in (case.parent, student)
        )
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(best["kl"], rel=1e-4)


@pytest.mark.parametrize("steps", [FUSED, (PruneBlocks(layers=(2,)),), (ParallelBlocks(windows=((3, 4),)),)])
def test_parent_and_student_weights_are_left_as_they_were(tmp_path, steps):
    case = case_of(tmp_path, steps)
    kept = {name: case.weights[name].clone() for name in case.weights}
    parent = {name: case.parent.weights[name].clone() for name in case.parent.weights}
    distill(case, settings_of(steps=3))
    assert all(torch.equal(case.weights[name], tensor) for name, tensor in kept.items())
    assert all(torch.equal(case.parent.weights[name], tensor) for name, tensor in parent.items())


@pytest.mark.parametrize(("train", "expected"), [
    ("all", lambda name: True),
    ("blocks", lambda name: name.startswith("model.layers.")),
    ("changed", lambda name: name.startswith("model.layers.1.")),
    (("*.mlp.*", "model.norm.weight"), lambda name: ".mlp." in name or name == "model.norm.weight"),
])  # fmt: skip
def test_only_what_is_chosen_moves(tmp_path, train, expected):
    case = case_of(tmp_path)
    made = distill(case, settings_of(train=train, evaluations=0, steps=4))
    assert set(made.files) == {name for name in case.weights if expected(name)}
    moved = overlay(case.weights, made.files)
    changed = {name for name in case.weights if not torch.equal(moved[name], case.weights[name])}
    assert changed == set(made.files)


def test_tied_weights_stay_tied(tmp_path):
    case = case_of(tmp_path, tie_word_embeddings=True)
    assert case.spec.tied and "lm_head.weight" not in case.weights
    made = distill(case, settings_of(evaluations=0, steps=4))
    assert "model.embed_tokens.weight" in made.files and "lm_head.weight" not in made.files


def test_a_pattern_that_fits_nothing_is_refused(tmp_path):
    with pytest.raises(SurgeryError, match=r"no tensor fits '\*\.mpl\.\*'; names look like model\."):
        distill(case_of(tmp_path), settings_of(train=("*.mpl.*",)))


def test_an_unknown_optimizer_or_tracker_is_refused(tmp_path):
    with pytest.raises(SurgeryError, match=r"distill\.trackers: "):
        distill(case_of(tmp_path), settings_of(trackers=("nobody",)))
    with pytest.raises(SurgeryError, match=r"distill.optimizer: bitsandbytes\.optim\.Nothing cannot be used: "):
        distill(case_of(tmp_path), settings_of(optimizer="bitsandbytes.optim.Nothing"))


@pytest.mark.parametrize(
    "name", ["adam", "os.path.join", "evil.Adam", "torch.optim.evil", "torch.optim.LBFGS", "bitsandbytes.optim.os.path"]
)
def test_a_recipe_names_no_optimizer_but_those_of_a_few_libraries(tmp_path, monkeypatch, name):
    """What it names is imported, and so run: refused when the recipe is read, and where it is made otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nfrom torch.optim import Adam\n")
    with pytest.raises(RecipeError, match=r"recipe:2: steps\[0\]\.optimizer: .* is no optimizer that"):
        loads(f"version: 1\nsteps: [{{op: distill, optimizer: {name}}}]\n")
    with pytest.raises(SurgeryError, match="is no optimizer that a recipe may name"):
        optimizer_of(
            Distill.model_construct(**{**settings_of().model_dump(), "optimizer": name}), torch.nn.Linear(2, 2)
        )
    assert not (tmp_path / "ran").exists()


def test_lora_is_merged_exactly(tmp_path):
    """The merged weights compute what the adapters computed when they were judged."""
    for family in ("llama", "gpt2"):
        case = case_of(tmp_path / family, family=family)
        made = distill(case, settings_of(lora=Lora(rank=4), evaluations=1))
        names = set(made.files)
        assert names and all(name.endswith(".weight") and "lora" not in name for name in names)
        weights = overlay(case.weights, made.files)
        rank = torch.linalg.matrix_rank((weights[min(names)] - case.weights[min(names)]).double(), rtol=1e-3)
        assert 0 < rank <= 4
        judged = made.trainings[0][1].judged[-1]["kl"]
        student = LayerRunner(case.config, weights, torch.float32)
        with torch.no_grad():
            p, q = (
                torch.stack([r.final(row)[:-1] for row in walk(r, case.held_out, [Variant()])[0]]).log_softmax(-1)
                for r in (case.parent, student)
            )
        assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(judged, rel=1e-3)


def test_hidden_states_are_compared_with_the_end_of_each_span(tmp_path):
    case = case_of(tmp_path)
    mine, wanted = wanted_of(case, settings_of())
    assert mine == (0, 1, 2, 3) and wanted == Wanted((0, 3, 4, 5), None)
    assert wanted_of(case, settings_of(hidden_layers=2))[0] == (1, 3)
    assert wanted_of(case, settings_of(hidden=0.0, top_k=5)) == ((), Wanted((), 5))
    assert wanted_of(case, settings_of(kl=0.0))[1].top_k == 0


def test_the_parents_answers_are_those_of_the_whole_model_and_are_kept(tmp_path):
    case = case_of(tmp_path)
    parent = tiny_model("llama")
    corpus = case.corpus(0)
    numbers = np.array([5, 0, 9])
    tokens = corpus.tokens(numbers)
    with torch.no_grad():
        states = parent(input_ids=tokens, output_hidden_states=True)
    for top_k in (None, 6):
        wanted = Wanted((-1, 0, 3), top_k)
        targets = StoredTargets(corpus, lambda: case.parent, "p", wanted, 2)
        targets.prepare(numbers)
        again = StoredTargets(corpus, lambda: pytest.fail("walked again"), "p", wanted, 2)
        again.prepare(numbers)
        answers = again.of(numbers, tokens)
        for place, layer in enumerate((0, 1, 4)):
            torch.testing.assert_close(answers["hidden"][:, place], states.hidden_states[layer], atol=1e-5, rtol=1e-4)
        expected = states.logits.log_softmax(-1)
        if top_k is None:
            logits = torch.stack([targets.logits(row) for row in answers["last"]])
            torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
        else:
            top, ids = expected.topk(6)
            assert torch.equal(answers["top_ids"].long(), ids)
            torch.testing.assert_close(answers["top_log_p"].float(), top, atol=1e-2, rtol=1e-2)


def test_the_student_answers_as_its_own_class_does(tmp_path):
    for family in FAMILY_NAMES:
        subject = subject_of(tiny_model(family))[0]
        model, _, _ = operate(tiny_model(family), *fitting(FUSED, subject))
        tapped = TappedModel(model, subject.family.layers, (0, 2))
        tokens = some_tokens()
        with torch.no_grad():
            ends, states = tapped(tokens)
            expected = model(input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(torch.stack([tapped.logits(row) for row in states]), expected)
        assert [end.shape for end in ends] == [(2, 24, subject.spec.hidden)] * 2


def test_without_dropout(tmp_path):
    case = case_of(tmp_path, family="gpt2")
    student = build_student(case, settings_of(), torch.float32)
    tokens = some_tokens()
    with torch.no_grad():
        assert torch.equal(student(input_ids=tokens).logits, student(input_ids=tokens).logits)


def test_a_loss_that_is_not_finite_stops_and_says_so(tmp_path):
    with pytest.raises(SurgeryError, match=r"the loss was nan at step .* lower distill.learning_rate"):
        distill(case_of(tmp_path), settings_of(learning_rate=1e30, clip=None, warmup=0))


def test_a_loss_that_diverges_stops_at_the_last_checkpoint(tmp_path, monkeypatch):
    step = Trainer._step

    def rising(self, reached):
        losses = step(self, reached)
        return {**losses, "loss": 10.0 if self.state.step > 25 else 0.1}

    monkeypatch.setattr(Trainer, "_step", rising)
    _, training = distill(case_of(tmp_path), settings_of(steps=60, evaluations=0, save_steps=10)).trainings[0]
    assert training.stopped == "the loss diverged at step 35" and training.best_step == 20


def test_a_loss_that_breaks_later_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    case = case_of(tmp_path)
    step = Trainer._step

    def breaking(self, reached):
        losses = step(self, reached)
        return {**losses, "loss": float("nan")} if self.state.step == 21 else losses

    monkeypatch.setattr(Trainer, "_step", breaking)
    made = distill(case, settings_of(evaluations=3))
    _, training = made.trainings[0]
    assert training.stopped == "the loss was nan at step 21" and training.best_step == 20
    assert "the loss was nan at step 21" in made.note
    other = distill(case_of(tmp_path / "b"), settings_of(evaluations=0, save_steps=15)).trainings[0][1]
    assert other.best_step == 15


def test_it_stops_early_when_nothing_gets_better(tmp_path):
    case = case_of(tmp_path)
    made = distill(case, settings_of(learning_rate=1e-12, evaluations=10, patience=2))
    _, training = made.trainings[0]
    assert training.steps < 30 and training.stopped == "no better for 2 evaluations"


def test_where_nothing_is_better_the_student_stays(tmp_path):
    case = case_of(tmp_path, steps=())
    made = distill(case, settings_of(learning_rate=1e-2, steps=5))
    assert made.files == {} and "kept as it was" in made.note


def test_a_budget_of_minutes_ends_in_time(tmp_path):
    case = case_of(tmp_path)
    start = time.monotonic()
    made = distill(case, settings_of(steps=None, minutes=0.05))
    _, training = made.trainings[0]
    assert training.stopped == "done" and training.steps >= 1 and 3 <= training.seconds <= time.monotonic() - start


def test_tokens_end_a_run(tmp_path):
    _, training = distill(case_of(tmp_path), settings_of(steps=None, tokens=640)).trainings[0]
    assert training.tokens == 640 and training.steps == 10


def test_local_mode_needs_a_changed_block(tmp_path):
    with pytest.raises(SurgeryError, match="no block of this student differs"):
        distill(case_of(tmp_path, steps=()), settings_of(mode="local"))


def test_local_mode_trains_changed_blocks_alone_and_as_well_in_processes(tmp_path):
    steps = (PruneAttention(layers=(2, 4)), FuseFFN(runs=((1, 2), (3, 4))))
    one = distill(case_of(tmp_path / "one", steps), settings_of(mode="local", steps=6))
    two = distill(case_of(tmp_path / "two", steps), settings_of(mode="local", steps=6, processes=2))
    assert {name.split(".")[2] for name in one.files} == {"1", "2"} and one.files.keys() == two.files.keys()
    for name in one.files:
        key = name.split(".", 3)[3]
        assert torch.equal(load_file(one.files[name])[key], load_file(two.files[name])[key])


JOB = """
import os, sys
os.environ["LLMSURGEON_CACHE"] = {cache!r}
from pathlib import Path
from healing.distill.test_distill import case_of, settings_of
from llmsurgeon.errors import Stopped
from llmsurgeon.healing.distill.distill import distill
try:
    settings = settings_of(steps=40, evaluations=2, save_steps=5, accumulate=2, mode={mode!r})
    made = distill(case_of(Path({folder!r})), settings)
except Stopped as stopped:
    print(stopped)
    sys.exit(143)
print(next(iter(made.files.values())))
"""


def job(tmp_path, folder, mode="global"):
    return warm.start(JOB.format(cache=str(tmp_path / f"cache-{folder}"), folder=str(tmp_path / folder), mode=mode))


def losses_of(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def logged(log):
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(process, log, lines):
    while logged(log) < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_killed_in_the_middle_it_goes_on_bit_for_bit(tmp_path):
    whole = job(tmp_path, "whole")
    killed = job(tmp_path, "killed")
    wait_for(killed, tmp_path / "killed" / "loss.jsonl", 18)
    killed.kill()
    killed.communicate()
    assert list((tmp_path / "killed").glob("state-*")) and not (tmp_path / "killed" / "result.json").exists()
    resumed = job(tmp_path, "killed")
    files = []
    for process in (whole, resumed):
        out, err = process.communicate()
        assert process.returncode == 0, err
        files.append(load_file(out.strip().splitlines()[-1]))
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    whole_log, killed_log = (losses_of(tmp_path / name / "loss.jsonl") for name in ("whole", "killed"))
    assert len(whole_log) == 40 and whole_log == killed_log


@pytest.mark.parametrize("mode", ["global", "local"])
def test_sigterm_saves_and_ends_with_143(tmp_path, mode):
    folder = tmp_path / "a" / ("block-0001" if mode == "local" else "")
    process = job(tmp_path, "a", mode)
    wait_for(process, folder / "loss.jsonl", 7)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143, err
    assert "stopped by SIGTERM at step" in out and "goes on from there" in out
    (state,) = folder.glob("state-*")
    assert int(state.name.removeprefix("state-")) >= 6


def test_a_checkpoint_that_is_half_written_is_not_used(tmp_path):
    case = case_of(tmp_path)
    (tmp_path / "state-00000007.partial").mkdir(parents=True)
    made = distill(case, settings_of(steps=3))
    assert made.trainings[0][1].steps == 3


def test_a_finished_run_is_not_repeated(tmp_path):
    case = case_of(tmp_path)
    first = distill(case, settings_of(steps=3))
    again = distill(replace(case, parent=case.parent), settings_of(steps=3))
    assert again.trainings[0][1].seconds == first.trainings[0][1].seconds


PAIR = """
from pathlib import Path
from healing.distill.test_distill import case_of, settings_of
from llmsurgeon.healing.distill.distill import distill
made = distill(case_of(Path({folder!r})), settings_of(batch=2, steps=12, evaluations=1, positions=0.5, save_steps=4))
"""


def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    """Two gloo processes with 2 sequences each against one with 4: the same losses, the same weights."""
    script = PAIR.format(folder=str(tmp_path / "two"))
    common = {
        **os.environ,
        "LLMSURGEON_CACHE": str(tmp_path / "cache-two"),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "OMP_NUM_THREADS": "1",
    }
    processes = [warm.start(script, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    made = distill(case_of(tmp_path / "one"), settings_of(batch=4, steps=12, evaluations=1, positions=0.5))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["best_step"] == results[1]["best_step"] == 12 and results[0]["tokens"] == results[1]["tokens"]
    one, two = (load_file(result["file"]) for result in results)
    assert one.keys() == two.keys() == made.files.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    losses = [losses_of(tmp_path / name / "loss.jsonl") for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
