"""A recipe, run: what it writes, how it resumes, and that streaming and memory agree bit for bit."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import warm
import yaml
from conftest import FAMILY_NAMES, byte_tokenizer, save_tiny, tiny_model
from operations.helpers import declared, logits, naive, operate, skip, some_tokens, subject_of

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import CheckpointError, GateFailed, SurgeryError
from llmsurgeon.formats.loading import load_model
from llmsurgeon.formats.tensor_names import canonical
from llmsurgeon.planning.opened import open_config, open_model
from llmsurgeon.planning.plan import plan
from llmsurgeon.recipe.recipe import load, loads
from llmsurgeon.run import Options, run
from llmsurgeon.walk.memory import Room

TEXT = "The quick brown fox jumps over the lazy dog; 0123, and so on. Pack my box with five dozen jugs.\n" * 40


def recipe_of(*steps: str, more: str = "") -> str:
    return "version: 1\n" + more + "steps:\n" + "".join(f"  - {step}\n" for step in steps)


ALL_STEPS = {
    "fold": ("{op: prune_attention, layers: [2, 3]}", "{op: fuse_ffn, runs: [1-3]}"),
    "last": ("{op: prune_attention, layers: [0, 2, 3]}", "{op: fuse_ffn, runs: [2-3], norm: last}"),
    "blocks": ("{op: prune_blocks, layers: [1, 4]}",),
    "parts": ("{op: prune_attention, layers: [0]}", "{op: prune_ffn, layers: [5]}"),
    "width": ("{op: prune_width, width: 40, score: magnitude}",),
    "parallel": ("{op: parallel_blocks, windows: [4-5]}",),
    "all": (
        "{op: prune_blocks, layers: [0]}",
        "{op: prune_width, width: 40, layers: [3], score: magnitude}",
        "{op: prune_attention, layers: [3]}",
        "{op: fuse_ffn, runs: [2-3]}",
        "{op: parallel_blocks, windows: [4-5]}",
    ),
}


def in_memory(model, recipe):
    subject, weights, _ = subject_of(model)
    for step in recipe.steps:
        made = step.resolve(subject).plan(subject)
        weights, subject = TransformedWeights(weights, made.transforms), subject.after(made)
    return weights


@pytest.mark.parametrize("steps", ALL_STEPS)
def test_streaming_is_in_memory_bit_for_bit(tmp_path, steps):
    """Every family, from and into several files of a few kilobytes, in bfloat16 so that casts count."""
    recipe = loads(recipe_of(*ALL_STEPS[steps]))
    for family in FAMILY_NAMES:
        if any(step.declined(declared(family)) for step in recipe.steps):
            continue
        model = tiny_model(family, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / family, max_shard_size="40KB")
        assert len(list((tmp_path / family).glob("*.safetensors"))) > 1
        out = run(recipe, str(tmp_path / family), str(tmp_path / f"{family}-out"), Options(max_shard_size="30KB")).out
        assert len(list(out.glob("*.safetensors"))) > 1
        parent = open_model(str(out))
        found, expected = parent.weights, in_memory(model, recipe)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == torch.bfloat16
            assert torch.equal(found[name], tensor), (family, name)
        assert verify_files(out) == []


def test_kv_heads_stream_too(tmp_path):
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "parent")
    recipe = loads(recipe_of("{op: prune_kv_heads, kv_heads: 1}"))
    out = run(recipe, str(tmp_path / "parent"), str(tmp_path / "out"), Options()).out
    found = open_model(str(out)).weights
    for name, tensor in in_memory(model, recipe).items():
        assert torch.equal(found[name], tensor)


@pytest.fixture
def parent(tmp_path):
    return save_tiny(tmp_path / "parent", "llama", tokenizer=True)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def healing(text, *steps, more=""):
    calibration = f"calibration: {{text: {text}, self_share: 0, tokens: 768, sequence_length: 16}}\n"
    return loads(recipe_of(*steps, "{op: refit}", more=calibration + more))


@pytest.mark.parametrize("free", [10**12, 1000])
def test_fits_that_memory_does_not_hold_are_told_before_they_start(parent, text, tmp_path, monkeypatch, free):
    said = []
    monkeypatch.setattr(sys.modules["llmsurgeon.run"], "room", lambda: Room(free, "a test"))
    run(healing(text, *ALL_STEPS["fold"]), str(parent), str(tmp_path / "out"), Options(say=said.append))
    short = [line for line in said if "GB of memory, and 0.0 GB are free (a test)" in line]
    assert bool(short) == (free == 1000), said


def test_the_files_of_a_run(parent, text, tmp_path):
    recipe = healing(text, *ALL_STEPS["fold"])
    outcome = run(recipe, str(parent), str(tmp_path / "out"), Options())
    out = outcome.out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "modeling_surgeon_llama.py",
        "surgeon_blocks.py",
        "surgeon_fff.py",
        "surgeon_fff_numba.py",
        "surgeon_fff_triton.py",
        "surgeon_mlgru.py",
        "surgeon_mlgru_triton.py",
        "surgeon_versions.py",
        "recipe.yaml",
        "surgery.json",
        "README.md",
        "checksums.b3",
    } | (names & {"special_tokens_map.json"})
    assert not list(tmp_path.glob("*.partial"))
    config = json.loads((out / "config.json").read_text())
    # A sentence in place of the width: stock classes refuse it.
    assert config["model_type"] == "surgeon_llama" and "trust_remote_code" in config["hidden_size"]
    assert len(config["block_configs"]) == 4
    assert [block["parents"] for block in config["block_configs"]] == [[0], [1, 2, 3], [4], [5]]
    surgery = json.loads((out / "surgery.json").read_text())
    assert surgery["format"] == "surgeon" and surgery["gate_missed"] == []
    assert (surgery["before"]["blocks"], surgery["after"]["blocks"]) == (6, 4)
    assert surgery["after"]["attentions"] == 4
    parameters = sum(t.numel() for t in open_model(str(out)).weights.values())
    assert surgery["after"]["parameters"] == parameters
    assert surgery["evaluation"]["perplexity"] > 1 and surgery["refit"]
    assert verify_files(out) == []
    _, meta, body = (out / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(meta)
    assert card["library_name"] == "transformers"
    assert set(card["tags"]) >= {"llmsurgeon", "custom_code"}
    assert "base_model" not in card, "a folder on this disk is nobody else's base model"
    assert "trust_remote_code=True" in body and "code ships in the checkpoint" in body
    assert "fuse_ffn" in body and "perplexity" in body


def test_the_evaluation_is_that_of_the_written_model(parent, text, tmp_path):
    """Perplexity, KL and agreement in surgery.json against the written checkpoint on the same held-out windows."""
    from llmsurgeon.formats.loading import load_tokenizer
    from llmsurgeon.text.calibration import calibration_sequences
    from llmsurgeon.text.sequences import held_out
    from llmsurgeon.text.wanted import Calibration

    for name, steps in (("fold", ALL_STEPS["fold"]), ("parallel", ALL_STEPS["parallel"])):
        outcome = run(healing(text, *steps), str(parent), str(tmp_path / name), Options())
        windows = calibration_sequences(
            "m", load_tokenizer(str(parent)), Calibration(text=str(text), tokens=768, sequence_length=16, seed=0)
        )
        tokens = windows[held_out(windows.kinds, 0.125)].tokens
        p, q = (
            torch.log_softmax(logits(load_model(str(f)), tokens).double(), -1)[:, :-1] for f in (parent, outcome.out)
        )
        loss = -q.gather(-1, tokens[:, 1:, None]).mean()
        assert outcome.evaluation.perplexity == pytest.approx(loss.exp().item(), rel=1e-3), name
        agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        assert outcome.evaluation.top1_agreement == pytest.approx(agreement, abs=0.05)
        assert outcome.evaluation.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.1)


def test_the_written_recipe_runs_again_to_the_same_weights(parent, text, tmp_path):
    """What the analysis chose is in it by layer number."""
    recipe = healing(text, "{op: prune_attention, count: 2}", "{op: fuse_ffn, runs: auto, max_run: 3}")
    first = run(recipe, str(parent), str(tmp_path / "first"), Options()).out
    written = load(first / "recipe.yaml")
    prune, fuse, _ = written.steps
    assert prune.count is None and len(prune.layers) == 2
    assert fuse.runs != "auto"
    assert written.model and Path(written.model).resolve() == parent.resolve()
    second = run(written, written.model, str(tmp_path / "second"), Options()).out
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert load(second / "recipe.yaml") == written


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_healed_native_checkpoints(family, text, tmp_path):
    """A healed model in the family's own form, under published tensor names."""
    parent = save_tiny(tmp_path / "parent", family, tokenizer=True)
    outcome = run(healing(text, "{op: prune_blocks, layers: [2]}"), str(parent), str(tmp_path / "out"), Options())
    config = json.loads((outcome.out / "config.json").read_text())
    assert config["model_type"] == family and "auto_map" not in config
    assert (family == "gpt_neox") == ("embed_out.weight" in open_checkpoint(str(outcome.out)))
    unhealed, _, _ = operate(load_model(str(parent)), *loads(recipe_of("{op: prune_blocks, layers: [2]}")).steps)
    tokens = some_tokens()
    assert not torch.equal(logits(load_model(str(outcome.out)), tokens), logits(unhealed, tokens))


def test_a_missed_gate(parent, text, tmp_path):
    recipe = healing(text, *ALL_STEPS["fold"], more="gate: {max_kl: 0.00001, max_perplexity_ratio: 100}\n")
    with pytest.raises(GateFailed, match=r"out is written, but it misses the recipe's gate: KL \d"):
        run(recipe, str(parent), str(tmp_path / "out"), Options())
    out = tmp_path / "out"
    assert verify_files(out) == [] and load_model(str(out))
    assert "**The quality gate of the recipe failed:** KL" in (out / "README.md").read_text()
    (missed,) = json.loads((out / "surgery.json").read_text())["gate_missed"]
    assert missed.startswith("KL ")


def test_a_met_gate_without_healing(parent, text, tmp_path):
    calibration = f"calibration: {{text: {text}, tokens: 256, sequence_length: 16}}\n"
    gate = "gate: {max_perplexity_ratio: 1000, max_kl: 1000, min_top1_agreement: 0}\n"
    recipe = loads(recipe_of(*ALL_STEPS["blocks"], more=calibration + gate))
    outcome = run(recipe, str(parent), str(tmp_path / "out"), Options())
    assert outcome.gate == () and outcome.evaluation.kl > 0
    assert "quality gate" not in (tmp_path / "out" / "README.md").read_text()


def test_without_text_nothing_is_measured(parent, tmp_path):
    outcome = run(loads(recipe_of(*ALL_STEPS["fold"])), str(parent), str(tmp_path / "out"), Options())
    assert outcome.evaluation is None
    assert "Its quality has not been measured" in (tmp_path / "out" / "README.md").read_text()


def deep(folder: Path, layers: int) -> Path:
    """A Llama of many layers and next to no width."""
    sizes = dict(num_hidden_layers=layers, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    return save_tiny(folder, "llama", intermediate_size=8, **sizes)


def runs_fused(model, dropped, runs):
    """The parent with runs of FFNs side by side, from its own modules."""
    stages = {j: (lambda x, parts, j=j: x + parts.ffn(j, x)) for j in dropped}
    for run_ in runs:
        stages |= dict.fromkeys(run_, skip)
        stages[run_[0]] = lambda x, parts, r=run_: x + sum(parts.ffn(j, x) for j in r)
    return naive(model, stages)


@pytest.mark.parametrize(
    ("name", "layers", "dropped", "runs", "blocks"),
    [
        ("ultra", 126, [*range(66, 116)], [(66, 73), (74, 85), (86, 100), (101, 114)], 80 + 1),
        ("nemotron-49b", 80, [*range(42, 52), *range(53, 71)], [(42, 50), (53, 69)], 56),
    ],
)
def test_published_recipes(tmp_path, name, layers, dropped, runs, blocks):
    parent = deep(tmp_path / "parent", layers)
    outcome = run(load(name), str(parent), str(tmp_path / "out"), Options())
    runs = [tuple(range(a, b + 1)) for a, b in runs]
    spec = open_model(str(outcome.out)).spec
    assert len(spec.layers) == blocks == layers - sum(len(r) - 1 for r in runs)
    assert len(spec.attentions) == layers - len(dropped)
    assert [b.parents for b in outcome.planned.spec.layers if len(b.parents) > 1] == runs
    tokens = some_tokens(batch=1, length=12)
    expected = logits(runs_fused(load_model(str(parent)), dropped, runs), tokens)
    torch.testing.assert_close(logits(load_model(str(outcome.out)), tokens), expected, atol=1e-3, rtol=1e-3)


LLAMA_405B = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "intermediate_size": 53248,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def test_a_dry_run_needs_config_json_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_405B))
    for path in (tmp_path, tmp_path / "config.json"):
        planned = plan(open_config(str(path)), load("ultra"), {})
        assert planned.before.parameters == 405_853_388_800
        attention = 2 * 16384 * 16384 + 2 * 16384 * 1024 + 16384
        assert planned.after.parameters == planned.before.parameters - 50 * attention - (50 - 5) * 16384
        assert (planned.after.blocks, planned.after.attentions) == (81, 76)
        assert planned.before.kv_bytes_per_token == 126 * 2 * 8 * 128 * 2
        assert planned.after.kv_bytes_per_token == 76 * 2 * 8 * 128 * 2
        assert planned.after.disk_bytes == 2 * planned.after.parameters
        # Fused a block of rows at a time: the widest FFN of 26 GB never exists whole.
        peak = planned.peak_bytes
        assert 0 < peak < 2**28
    with pytest.raises(SurgeryError, match="needs the score 'attention_order'"):
        plan(open_config(str(tmp_path)), loads(recipe_of("{op: prune_attention, count: 4}")), {})


def test_the_plan_equals_the_outcome(parent, tmp_path):
    recipe = loads(recipe_of(*ALL_STEPS["all"]))
    planned = plan(open_config(str(parent)), recipe, {})
    outcome = run(recipe, str(parent), str(tmp_path / "out"), Options())
    assert planned.after == outcome.planned.after and planned.spec == outcome.planned.spec
    tensors = sum(t.numel() * t.dtype.itemsize for t in open_checkpoint(str(outcome.out)).values())
    assert tensors == planned.after.disk_bytes


def test_a_converted_model_can_be_operated_on_again(parent, tmp_path):
    """Its layers are then numbered as inspect lists them."""
    first = run(loads(recipe_of(*ALL_STEPS["all"])), str(parent), str(tmp_path / "first"), Options()).out
    layers = open_model(str(first)).spec.layers
    assert [len(layer.branches) for layer in layers] == [0, 0, 2]
    recipe = loads(recipe_of("{op: prune_blocks, layers: [1]}"))
    second = run(recipe, str(first), str(tmp_path / "second"), Options()).out
    tokens = some_tokens()
    model = load_model(str(first))
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    torch.testing.assert_close(logits(load_model(str(second)), tokens), logits(model, tokens))


def test_tied_embeddings_stay_tied(tmp_path):
    parent = save_tiny(tmp_path / "parent", "llama", tie_word_embeddings=True)
    out = run(loads(recipe_of(*ALL_STEPS["fold"])), str(parent), str(tmp_path / "out"), Options()).out
    assert "lm_head.weight" not in open_checkpoint(str(out))
    model = load_model(str(out))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 7}, r"model\.layers\.6\.\S+ is missing \(expected shape"),
        ({"num_hidden_layers": 5}, r"model\.layers\.5\.\S+ is not part of the model"),
        ({"hidden_size": 64}, r"has shape \[.*\], the config asks for \["),
        ({"intermediate_size": 97}, r"down_proj\.weight has shape \[32, 96\], the config asks for \[32, 97\]"),
        ({"num_attention_heads": 0}, "num_attention_heads|does not describe"),
        ({"hidden_size": 33}, "does not describe|cannot build|disagree"),
        ({"model_type": "gptj"}, "'gptj' is not supported; supported are llama"),
    ],
    ids=str,
)
def test_a_config_that_lies(parent, tmp_path, change, message):
    config = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SurgeryError, match=message):
        run(loads(recipe_of(*ALL_STEPS["fold"])), str(parent), str(tmp_path / "out"), Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


@pytest.mark.parametrize("healed", [False, True])
def test_nan_weights_are_refused(tmp_path, text, healed):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "parent")
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    recipe = healing(text, *ALL_STEPS["fold"]) if healed else loads(recipe_of(*ALL_STEPS["fold"]))
    message = (
        r"layer 2, FFN: tensor model\.layers\.2\.mlp\.up_proj\.weight holds NaN"
        if healed
        else r"layers\.1\.mlp\.up_proj.*holds NaN or infinity"
    )
    with pytest.raises(SurgeryError, match=message):
        run(recipe, str(tmp_path / "parent"), str(tmp_path / "out"), Options())
    assert not (tmp_path / "out").exists()


def test_shards_that_lack_a_tensor(tmp_path):
    model = tiny_model("llama")
    state = {n: t for n, t in model.state_dict().items() if n != "model.layers.3.mlp.up_proj.weight"}
    model.save_pretrained(tmp_path / "parent", state_dict=state)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight is missing"):
        run(loads(recipe_of(*ALL_STEPS["fold"])), str(tmp_path / "parent"), str(tmp_path / "out"), Options())
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from llmsurgeon.checkpoint import writer
from llmsurgeon.healing.refit import refit
from llmsurgeon.recipe.recipe import load
from llmsurgeon.run import Options, run

place, after = sys.argv[4], int(sys.argv[5])
owner, name = {"refit": (refit, "fitted_layer"), "shards": (writer.Stage, "_record")}[place]
real, calls = getattr(owner, name), []

def counted(*arguments):
    made = real(*arguments)
    calls.append(1)
    if len(calls) == after:
        os.kill(os.getpid(), signal.SIGKILL)
    return made

setattr(owner, name, counted)
run(load(sys.argv[1]), sys.argv[2], sys.argv[3], Options(max_shard_size="30KB"))
"""


@pytest.mark.parametrize(("place", "after"), [("refit", 2), ("shards", 3)])
def test_a_killed_run_goes_on(tmp_path, text, place, after):
    """SIGKILL in the middle of healing or of writing; the same command again gives the very same files."""
    parent = save_tiny(tmp_path / "parent", "gpt_neox", tokenizer=True)
    recipe = tmp_path / "recipe.yaml"
    more = f"calibration: {{text: {text}, tokens: 512, sequence_length: 16}}\n"
    recipe.write_text(recipe_of(*ALL_STEPS["fold"], "{op: refit}", more=more))
    # Sums over another number of threads round otherwise.
    alike = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = warm.start(KILLED, recipe, parent, tmp_path / "out", place, after, env=alike)
    _, err = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    options = Options(max_shard_size="30KB")
    resumed = run(load(recipe), str(parent), str(tmp_path / "out"), options).out
    whole = run(load(recipe), str(parent), str(tmp_path / "whole"), options).out
    assert not (tmp_path / "out.partial").exists()
    assert {p.name for p in resumed.iterdir()} == {p.name for p in whole.iterdir()}
    for path in whole.iterdir():
        assert (resumed / path.name).read_bytes() == path.read_bytes(), path.name


def test_old_names_are_mended_and_written_back(tmp_path):
    """GPT-2 and GPT-NeoX as they were published: prefix missing, head of another name, old buffers."""
    from safetensors.torch import load_file, save_file

    parent = save_tiny(tmp_path / "gpt2", "gpt2")
    old = {n.removeprefix("transformer."): t for n, t in load_file(parent / "model.safetensors").items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(old, parent / "model.safetensors", {"format": "pt"})
    out = run(loads(recipe_of("{op: prune_blocks, layers: [0]}")), str(parent), str(tmp_path / "out"), Options()).out
    expected = naive(tiny_model("gpt2"), {0: skip})
    torch.testing.assert_close(logits(load_model(str(out)), some_tokens()), logits(expected, some_tokens()))


def test_canonical_leaves_nothing_behind(family_name):
    subject, weights, _ = subject_of(tiny_model(family_name))
    assert set(canonical(weights, subject.family)) == set(weights)
