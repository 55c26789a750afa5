"""`llmsurgeon block`: what it writes, that all other commands take it, and how bad input ends."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SMALL, save_encoder, save_tiny
from operations.helpers import logits, operate, some_tokens
from safetensors.torch import load_file

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.formats.loading import load_model
from llmsurgeon.operations.block import Block

TEXT = ("--text", "text.txt", *SMALL)


def test_flags_write_a_checkpoint_that_every_command_takes(run, folder):
    code, out, err = run("block", "parent", "-o", "out", "--block-length", 2, "--split", 2, "--no-refit", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["format"] == "surgeon" and report["steps"][0]["split"] == 2
    # 2 of 6 layers, of 4 heads of 8 numbers each kept as 2 heads, one entry for 2 tokens, float32.
    assert report["after"]["kv_bytes_per_token"] == 2 * (2 * 2 * 8) * 4 // 2
    assert verify_files(folder / "out") == [] and run("verify", "out")[0] == 0
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["block_transformer"] == {
        "block_length": 2, "split": 2, "embedder": "projected", "decoder": "prefix", "prefix_length": 2,
        "affine": True,
    }  # fmt: skip
    assert "load with trust_remote_code" in config["hidden_size"]
    assert "2 tokens a block" in (folder / "out" / "README.md").read_text()
    code, out, _ = run("inspect", "out", "--json")
    assert code == 0 and json.loads(out)["block_transformer"]["split"] == 2
    assert "block transformer: 2 tokens a block" in " ".join(run("inspect", "out")[1].split())
    code, out, err = run(
        *("eval", "out", "--against", "parent", "--text", "text.txt", "--tokens", 256, "--seq-len", 31, "--json")
    )
    assert code == 0, err
    # Every token but the first of a window is predicted by both.
    evaluation = json.loads(out)
    assert evaluation["tokens"] == evaluation["sequences"] * 30 and evaluation["kl"] > 0
    code, out, err = run(
        *("bench", "out", "--against", "parent", "--prompt", 16, "--new-tokens", 5, "--rounds", 1, "--batch", 2),
        "--json",
    )
    assert code == 0, err
    bench = json.loads(out)
    # 17 places are 8 blocks and one token of the next, behind two places of prefix.
    assert bench["model"]["kv_bytes_per_token"] == 2 * 2 * 8 * 4 * (2 * 8 + 4 * 3) / 16
    code, _, err = run("eval", "out", "--tokens", 64, "--seq-len", 16)
    assert code == 0, err


def test_text_that_is_given_is_measured_on(run, folder):
    """Though neither refit nor training asks for it; and what the refit did is in the report."""
    code, out, err = run("block", "parent", "-o", "out", "--no-refit", *TEXT, "--json")
    assert code == 0, err
    paper = json.loads(out)
    assert [s["op"] for s in paper["steps"]] == ["block"] and paper["evaluation"]["perplexity_ratio"] > 0
    code, out, err = run("block", "parent", "-o", "fitted", *TEXT, "--json")
    assert code == 0, err
    assert [s["op"] for s in json.loads(out)["steps"]] == ["block", "refit"]
    fits = json.loads((folder / "fitted" / "surgery.json").read_text())["refit"]
    assert {"context_expansion", "token_projection"} < {fit["projection"] for fit in fits}
    before, after = (load_file(folder / name / "model.safetensors") for name in ("out", "fitted"))
    assert before.keys() == after.keys() and run("verify", "fitted")[0] == 0
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved > {"model.context_expansion.weight", "model.token_projection.bias"}
    assert all("model.layers" not in name or name.endswith(("o_proj.weight", "down_proj.weight")) for name in moved)
    assert run("block", "parent", "-o", "bare", "--no-refit", "--json")[0] == 0
    assert json.loads((folder / "bare" / "surgery.json").read_text())["evaluation"] is None


def test_streaming_is_in_memory(run, folder):
    for number, flags in enumerate(
        ({"decoder": "cross_attention", "prefix_length": 1}, {"embedder": "concat", "decoder": "summation"})
    ):
        given = [part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", value)]
        assert run("block", "parent", "-o", f"out-{number}", *given)[0] == 0
        student, *_ = operate(load_model("parent"), Block(**flags))
        written, kept = load_file(folder / f"out-{number}" / "model.safetensors"), student.state_dict()
        assert written.keys() == kept.keys()
        assert all(torch.equal(written[name], kept[name]) for name in kept)
        tokens = some_tokens()
        assert torch.equal(logits(load_model(f"out-{number}"), tokens), logits(student, tokens))


def test_a_block_that_vanishes_moves_the_split(run, folder):
    """Layer 1 loses attention and FFN in two steps, and goes as a whole."""
    (folder / "r.yaml").write_text(
        "version: 1\nsteps:\n  - {op: prune_attention, layers: [1]}\n  - {op: prune_ffn, layers: [1]}\n"
        "  - {op: block, block_length: 1, split: 6, prefix_length: 1}\n"
    )
    for split in (6, 3):
        code, out, err = run(
            *("run", "r.yaml", "parent", "-o", "out", "--overwrite", "--set", f"block.split={split}", "--json")
        )
        assert code == 0, err
        assert json.loads(out)["blocks"] == [[0], [2], [3], [4], [5]]
        assert load_model("out").model.split == split - 1
    assert run("run", "r.yaml", "parent", "-o", "out", "--overwrite")[0] == 0
    assert run("prune", "parent", "-o", "pruned", "--blocks", "1", "--no-refit")[0] == 0
    tokens = some_tokens()
    assert torch.equal(logits(load_model("out"), tokens), logits(load_model("pruned"), tokens))


def test_a_dry_run_counts_what_is_multiplied(run, folder):
    code, out, _ = run("block", "parent", "--dry-run", "--json")
    assert code == 0 and not (folder / "parent-block-4").exists()
    report = json.loads(out)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 96
    # Of 4 tokens: three layers, embedder and expansion once; three layers at 2 + 3 positions, a map at the last three;
    # the head at each.
    assert report["after"]["flops_per_token"] == 2 * (
        64 * 32 + (3 * layer + 4 * 32 * 32 + 2 * 32 * 32 + 3 * layer * 5 + 32 * 32 * 3) // 4
    )
    assert report["before"]["flops_per_token"] == 2 * (64 * 32 + 6 * layer)
    new = 64 * 32 + 4 * 32 * 32 + 32 + 2 * 32 * 32 + 2 * 32 + 32 * 32 + 32
    assert report["after"]["parameters"] == report["before"]["parameters"] + new


def test_training_heal_and_gate(run, folder):
    short = ("steps=12", "sequence_length=16", "batch=4", "learning_rate=0.002", "evaluations=1")
    sets = [part for value in short for part in ("--set", f"distill.{value}")]
    code, out, err = run("block", "parent", "-o", "out", "--block-length", 2, "--minutes", 5, *sets, *TEXT, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [s["op"] for s in report["steps"]] == ["block", "refit", "distill"]
    assert report["evaluation"]["kl"] > 0
    log = [json.loads(line) for line in (folder / "out" / "loss.jsonl").read_text().splitlines()]
    assert [set(line) & {"cross_entropy", "kl", "hidden"} for line in log if "loss" in line] == 12 * [{"cross_entropy"}]
    (folder / "more.yaml").write_text(
        "version: 1\nsteps:\n  - {op: distill, steps: 3, hidden: 0, kl: 1, cross_entropy: 1, sequence_length: 16, "
        "batch: 4, evaluations: 1}\n"
    )
    code, out, err = run("heal", "out", "--parent", "parent", "-r", "more.yaml", "-o", "healed", *TEXT, "--json")
    assert code == 0, err
    assert json.loads(out)["evaluation"]["kl"] <= report["evaluation"]["kl"]
    assert run("verify", "healed")[0] == 0
    steps = (folder / "healed" / "recipe.yaml").read_text()
    assert "op: block" in steps and steps.count("op: distill") == 2
    code, _, err = run("heal", "out", "--parent", "parent", "-o", "again", *TEXT)
    assert code == 2 and "set hidden: 0" in err and not (folder / "again").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("parent", "--block-length", 3), "expected 1, 2, 4 or 8, got 3"),
        (("parent", "--embedder", "hash"), "expected 'concat' or 'projected', got 'hash'"),
        (("parent", "--prefix-length", 3), "expected 1 or 2, got 3"),
        (("parent", "--split", 9), "split 9 is beyond the model's layers"),
        (("mistral",), "mistral: block: layer 0 attends within a window of 8 tokens"),
        (("qwen2",), "qwen2: block: layer 3 attends within a window of 8 tokens"),
        (("gemma2",), "gemma2: block: its class has no block form"),
        (("encoder",), "bert: block: it is an encoder"),
        (("narrow", "--block-length", 8, "--embedder", "concat"), "hidden size 36, which 8 does not divide"),
        (("parent", "-r", "shortgpt"), "this recipe has no step for `block`"),
    ],
)
def test_bad_input_writes_nothing(run, folder, arguments, message):
    if arguments[0] in ("mistral", "qwen2", "gemma2"):
        save_tiny(folder / arguments[0], arguments[0])
    elif arguments[0] == "encoder":
        save_encoder(folder / "encoder", "bert")
    elif arguments[0] == "narrow":
        save_tiny(folder / "narrow", "llama", hidden_size=36, head_dim=8)
    code, out, err = run("block", *arguments, "-o", "out")
    assert code == 2 and message in err and not out
    assert not [path for path in folder.iterdir() if path.name.startswith("out")]


def test_what_a_block_model_cannot_be_asked(run, folder):
    """Analysis, cuts, other formats, contexts beyond the parent's positions."""
    assert run("block", "parent", "-o", "out", "--no-refit")[0] == 0
    for command, message in (
        (("analyze", "out", "--text", "text.txt", "--tokens", 64, "--seq-len", 16), "cannot be walked layer by layer"),
        (("prune", "out", "-o", "cut", "--attention", "1", "--no-refit"), "prune_attention: the model is a block"),
        (("block", "out", "-o", "cut"), "block: the model is a block transformer already"),
        (("export", "out", "-o", "cut", "--to", "native"), "it is a block transformer"),
        (("export", "out", "-o", "cut.gguf", "--to", "gguf"), "llama.cpp knows no block transformers"),
        (("eval", "out", "--text", "text.txt", "--tokens", 512, "--seq-len", 129), "its limit is 128"),
        (("bench", "out", "--prompt", 120, "--new-tokens", 9, "--rounds", 1), "its limit is 128"),
    ):
        code, _, err = run(*command)
        assert code == 2 and message in err, (command, err)
        assert not list(folder.glob("cut*")) and not list(folder.glob("out-*"))
