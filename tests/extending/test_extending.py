"""An extension from outside: what docs/extending.md shows is what these files hold, and it runs end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
RECIPE = "version: 1\ncalibration: {{text: {text}, self_share: 0, tokens: 8192, sequence_length: 64}}\nsteps:\n{steps}"


def letters(seed, count):
    """Text without a pattern: what is fitted on one seed is judged on another."""
    return "".join(Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=count))


def extended(*arguments):
    """The command line with the extension, in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "extending", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(parent, student by the best run of two layers, the same run without a refit)."""
    folder = tmp_path_factory.mktemp("extended")
    parent = save_tiny(folder / "parent", "llama", tokenizer=True)
    (folder / "text.txt").write_text(letters(0, 20_000))
    out = {}
    for name, steps in {
        "fitted": "  - {op: linear_run, length: 2}\n  - {op: refit}\n",
        "zero": "  - {op: linear_run, layers: '2-3'}\n",
    }.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(RECIPE.format(text=folder / "text.txt", steps=steps))
        done = extended("run", recipe, parent, "-o", folder / name)
        assert done.returncode == 0, done.stderr
        out[name] = folder / name
    return parent, out["fitted"], out["zero"]


def test_the_page_shows_what_is_there():
    shown = re.findall(r"`((?:tests|llmsurgeon)/[\w/]+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    mine = {f"tests/extending/{path.name}" for path in HERE.glob("*.py")}
    apart = {"tests/extending/__init__.py", "tests/extending/test_extending.py"}
    assert {name for name, _ in shown if name.startswith("tests")} == mine - apart
    for name, code in shown:
        text = (ROOT / name).read_text()
        # Of a long file the page shows the parts that matter.
        assert all(piece.strip() in text for piece in code.split("    ...\n")), name


def test_what_was_planned_and_said(made):
    _, fitted, _ = made
    surgery = json.loads((fitted / "surgery.json").read_text())
    config = json.loads((fitted / "config.json").read_text())
    (place,) = [i for i, layer in enumerate(config["block_configs"]) if layer["ffn"].get("kind") == "linear"]
    first, last = config["block_configs"][place]["parents"]
    assert last == first + 1 and surgery["after"]["blocks"] == surgery["before"]["blocks"] - 1
    assert config["block_configs"][place]["attention"]["no_op"]
    (update,) = [each for each in surgery["refit"] if each["projection"] == "linear map"]
    assert update["error_ratio"] < 1 and update["ridge"] is not None
    assert f"Layers {first} to {last} are one linear map." in (fitted / "README.md").read_text()


def test_the_map_is_the_least_squares_one(made):
    """Against the slow obvious way: hidden states of the stock model, and one call of lstsq."""
    parent, fitted, _ = made
    config = json.loads((fitted / "config.json").read_text())
    (place,) = [i for i, layer in enumerate(config["block_configs"]) if layer["ffn"].get("kind") == "linear"]
    first = config["block_configs"][place]["parents"][0]
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(parent)(letters(1, 20_000), return_tensors="pt").input_ids
    tokens = tokens[:, : tokens.shape[1] // 64 * 64].reshape(-1, 64)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    x, added = states[first].flatten(0, 1), (states[first + 2] - states[first]).flatten(0, 1)
    tensors = load_file(fitted / "model.safetensors")
    prefix = f"model.layers.{place}."
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], tensors[f"{prefix}post_attention_layernorm.weight"], 1e-6)
    mine = normed @ tensors[f"{prefix}mlp.weight"].T + tensors[f"{prefix}mlp.bias"]
    ones = torch.cat([normed, torch.ones(len(normed), 1)], dim=1)
    best = ones @ torch.linalg.lstsq(ones, added).solution
    # Fitted on other text, and with a ridge: near the best map, and far better than none.
    left, least = (mine - added).square().sum(), (best - added).square().sum()
    assert least <= left < 1.15 * least < 0.8 * added.square().sum(), (left, least, added.square().sum())


def test_it_loads_where_nothing_of_the_extension_is_known(made, tmp_path):
    parent, fitted, zero = made
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "tokens = torch.arange(40)[None]\n"
        "parent, *students = (AutoModelForCausalLM.from_pretrained(p, trust_remote_code=True, dtype=torch.float32)\n"
        "                     for p in sys.argv[1:])\n"
        "want = parent(tokens).logits.log_softmax(-1)\n"
        "print(*(float((want.exp() * (want - s(tokens).logits.log_softmax(-1))).sum(-1).mean()) for s in students))\n"
        "assert 'llmsurgeon' not in sys.modules and 'extending' not in sys.modules\n"
        "greedy = {'max_new_tokens': 8, 'do_sample': False}\n"
        "out = [students[0].generate(tokens, use_cache=cached, **greedy).tolist() for cached in (False, True)]\n"
        "assert out[0] == out[1]\n"
    )
    variables = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", code, parent, fitted, zero]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with_map, without = map(float, done.stdout.split())
    assert with_map < without


def test_other_verbs_take_it(made, tmp_path):
    parent, fitted, _ = made
    done = extended("inspect", fitted)
    assert done.returncode == 0 and "linear" in done.stdout, done.stderr
    done = extended("eval", fitted, "--against", parent, "--tokens", "512", "--seq-len", "64")
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    (tmp_path / "cut.yaml").write_text("version: 1\nsteps:\n  - {op: prune_width, keep: 0.5, score: magnitude}\n")
    done = extended("run", tmp_path / "cut.yaml", fitted, "-o", tmp_path / "out")
    assert done.returncode == 2 and "has a linear map in the place of its FFN; cut first" in done.stderr


def test_without_the_extension_its_kind_is_refused(made):
    done = subprocess.run(
        [sys.executable, "-m", "llmsurgeon", "inspect", made[1]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "kind 'linear'" in done.stderr
