"""Training of block transformers: the loss is that of the text, blocks begin anywhere, and runs go on bit for bit."""

from __future__ import annotations

import pytest
import torch
import warm
from healing.distill.test_distill import case_of, losses_of, settings_of, wait_for
from safetensors.torch import load_file
from torch.nn import functional as F

from llmsurgeon.formats.models import filled_model
from llmsurgeon.healing.distill.distill import distill
from llmsurgeon.healing.distill.divergence import NextTokens, kl_rows
from llmsurgeon.healing.distill.module import Distiller
from llmsurgeon.healing.distill.student import build_student
from llmsurgeon.healing.distill.tapped import TappedModel
from llmsurgeon.healing.distill.targets import LiveTargets, Wanted
from llmsurgeon.healing.distill.tasks import GlobalTask
from llmsurgeon.healing.store import overlay
from llmsurgeon.operations.block import Block
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention

BLOCKS = (Block(block_length=4),)
TEXT = dict(hidden=0.0, kl=0.0, cross_entropy=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))


def loss_on(case, weights, rows):
    """Mean loss of all tokens of these rows but the first."""
    model = filled_model(case.config, weights, torch.float32, "cpu")
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


def test_cross_entropy_and_its_slope_are_torch_s():
    logits = torch.randn(7, 11, requires_grad=True)
    ids = torch.randint(11, (7,))
    loss, slope = kl_rows(logits.detach(), NextTokens(ids))
    expected = F.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("padding", range(4))
def test_the_losses_are_those_of_the_predicted_tokens(tmp_path, padding):
    """Cross-entropy as the model's own labels give it, KL over the same positions and the one behind the text."""
    case = case_of(tmp_path, BLOCKS)
    student = build_student(case, settings_of(**TEXT), torch.float32)
    targets = LiveTargets(case.parent_config, case.parent, Wanted((), None), torch.float32)
    weights = {"kl": 2.0, "cross_entropy": 0.5}
    module = Distiller(TappedModel(student, case.parent.family.layers, ()), targets, weights)
    ids = case.held_out[:3]
    answers = targets.of(None, ids)
    losses = module(ids, padding=padding, **answers)
    out = student(input_ids=ids, labels=ids, block_padding=padding, use_cache=False)
    assert losses["cross_entropy"].item() == pytest.approx(out.loss.item(), rel=1e-5)
    first = 3 - padding
    p = targets.model.logits(answers["last"][:, first:].flatten(0, 1)).double().log_softmax(-1)
    q = out.logits[:, first:].flatten(0, 1).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert losses["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(2 * kl + 0.5 * out.loss.item(), rel=1e-5)
    losses["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    (2 * (p.exp() * (p - q)).sum(-1).mean() + 0.5 * out.loss).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_blocks_begin_at_every_place_and_by_the_seed_alone(tmp_path):
    case = case_of(tmp_path, BLOCKS)
    settings = settings_of(**TEXT)
    task = GlobalTask(case, settings, case.corpus(0), LiveTargets(case.parent_config, case.parent, Wanted((), 0), None))
    drawn = [task.batch(task.corpus.draw(4), step, torch.device("cpu"))["padding"] for step in range(60)]
    assert set(drawn) == {0, 1, 2, 3}
    assert drawn == [task._padding(step)["padding"] for step in range(60)]
    assert "padding" not in GlobalTask(case_of(tmp_path), settings, case.corpus(0), task.targets).batch(
        task.corpus.draw(1), 0, torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (Block(block_length=4), TEXT),
        (Block(block_length=1), {**TEXT, "accumulate": 2}),
        (Block(block_length=2, embedder="concat"), {**TEXT, "kl": 1.0, "top_k": 8}),
        (Block(block_length=4, decoder="summation"), {"hidden": 0.0, "targets": "memory"}),
        (Block(block_length=2, decoder="cross_attention"), {**TEXT, "gradient_checkpointing": True}),
        (Block(block_length=2), {**TEXT, "train": ("*.block_embedder.*", "*.context_expansion.*")}),
    ],
    ids=lambda value: value.decoder if isinstance(value, Block) else ",".join(value),
)
def test_it_learns_the_text(tmp_path, step, changes):
    case = case_of(tmp_path, (step,))
    # Text that repeats itself can be learnt in a few steps.
    rows = torch.from_numpy(case.text[0].tokens.astype("int64"))
    before = loss_on(case, case.weights, rows[:16])
    made = distill(case, settings_of(**{"evaluations": 0, "steps": 40, **changes}))
    weights = overlay(case.weights, made.files)
    assert loss_on(case, weights, rows[:16]) < before
    if "train" in changes:
        assert {name.split(".")[1] for name in made.files} == {"block_embedder", "context_expansion"}
    else:
        moved = {name for name in case.weights if not torch.equal(weights[name], case.weights[name])}
        # Behind a prefix, with blocks of one token, the token decoder reads none.
        idle = {f"model.{name}" for name in ("embed_tokens.weight", "token_projection.weight", "token_projection.bias")}
        # Of one vector to attend to, queries and keys say nothing: rounding alone moves them, on some processors.
        unsaid = {name for name in case.weights if "cross_attn.q_proj" in name or "cross_attn.k_proj" in name}
        assert moved - unsaid == set(case.weights) - unsaid - (idle if step.block_length == 1 else set())


def test_the_evaluation_is_that_of_the_weights_that_are_kept(tmp_path):
    case = case_of(tmp_path, BLOCKS)
    made = distill(case, settings_of(**TEXT, evaluations=2))
    best = min(made.trainings[0][1].judged, key=lambda judged: judged["value"])
    student = filled_model(case.config, overlay(case.weights, made.files), torch.float32, "cpu")
    parent = filled_model(case.parent_config, case.parent.weights, torch.float32, "cpu")
    with torch.no_grad():
        p, q = (m(input_ids=case.held_out).logits[:, :-1].log_softmax(-1) for m in (parent, student))
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(best["kl"], rel=1e-4)


def test_next_tokens_are_for_any_student(tmp_path):
    case = case_of(tmp_path, (PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),))))
    rows = torch.from_numpy(case.text[0].tokens.astype("int64"))
    before = loss_on(case, case.weights, rows)
    made = distill(case, settings_of(**TEXT, evaluations=0))
    assert loss_on(case, overlay(case.weights, made.files), rows) < before
    assert not list((tmp_path / "cache" / "targets").rglob("last*")), "nobody asked the parent"


JOB = """
import os
os.environ["LLMSURGEON_CACHE"] = {cache!r}
from pathlib import Path
from healing.distill.test_distill_block import BLOCKS, TEXT, case_of, distill, settings_of
losses = {{**TEXT, "cross_entropy": 0.1, "kl": 1.0}}
settings = settings_of(**{{**losses, "steps": 24, "evaluations": 2, "save_steps": 5, "accumulate": 2}})
made = distill(case_of(Path({folder!r}), BLOCKS), settings)
print(next(iter(made.files.values())))
"""


def test_killed_in_the_middle_it_goes_on_bit_for_bit(tmp_path):
    def job(folder):
        return warm.start(JOB.format(cache=str(tmp_path / f"cache-{folder}"), folder=str(tmp_path / folder)))

    whole, killed = job("whole"), job("killed")
    wait_for(killed, tmp_path / "killed" / "loss.jsonl", 12)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "killed" / "result.json").exists()
    files = []
    for process in (whole, job("killed")):
        out, err = process.communicate()
        assert process.returncode == 0, err
        files.append(load_file(out.strip().splitlines()[-1]))
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    logs = [losses_of(tmp_path / name / "loss.jsonl") for name in ("whole", "killed")]
    assert len(logs[0]) == 24 and logs[0] == logs[1]
