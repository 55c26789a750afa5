"""Converted checkpoints load, generate and train where this package does not exist; without trust they refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_NAMES, save_tiny
from formats.forms import BLOCK, MIXERS, NAS, NAS_STEPS, STEPS, SURGEON
from operations.helpers import declared, logits
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from llmsurgeon.formats.loading import load_model
from llmsurgeon.recipe.recipe import Recipe, loads
from llmsurgeon.run import Options, run

CLOSE = 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """name -> converted checkpoint; native-FAMILY has two blocks fewer and nothing else."""
    base = tmp_path_factory.mktemp("alone")
    made = {}
    for name, (family, changes) in SURGEON.items():
        parent = save_tiny(base / f"parent-{name}", family, **changes)
        steps = tuple(step for step in STEPS if step.declined(declared(family, changes)) is None)
        made[name] = run(Recipe(version=1, steps=steps), str(parent), str(base / name), Options()).out
    for name, (family, changes, steps) in MIXERS.items():
        parent = save_tiny(base / f"parent-{name}", family, **changes)
        made[name] = run(Recipe(version=1, steps=steps), str(parent), str(base / name), Options()).out
    for name, (family, changes) in NAS.items():
        parent = save_tiny(base / f"parent-{name}", family, **changes)
        recipe = loads(f"version: 1\nformat: nemotron-nas\nsteps:{NAS_STEPS}")
        made[name] = run(recipe, str(parent), str(base / name), Options()).out
    for name, (family, changes, step) in BLOCK.items():
        parent = save_tiny(base / f"parent-{name}", family, **changes)
        made[name] = run(Recipe(version=1, steps=(step,)), str(parent), str(base / name), Options()).out
    for family in FAMILY_NAMES:
        recipe = loads("version: 1\nsteps:\n  - {op: prune_blocks, layers: [1, 4]}\n")
        made[f"native-{family}"] = run(
            recipe, str(base / f"parent-{family}"), str(base / f"native-{family}"), Options()
        ).out
    return made


@pytest.fixture(scope="module")
def reports(folders, tmp_path_factory):
    """What loads_alone.py says about each: one process for all, as starting one takes seconds."""
    empty = tmp_path_factory.mktemp("elsewhere")
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key != "TRANSFORMERS_CACHE"
    }
    environment |= {"HF_HOME": str(empty / "hf"), "HF_MODULES_CACHE": str(empty / "modules"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("loads_alone.py")
    result = subprocess.run(
        [sys.executable, "-I", str(script), *map(str, folders.values())],
        cwd=empty,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    by_folder = json.loads(result.stdout.splitlines()[-1])
    return {name: by_folder[str(folder)] for name, folder in folders.items()}


def here(folder):
    """The same model through this package."""
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    return logits(load_model(str(folder)), tokens)[0, -1]


NOTHING = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


@pytest.mark.parametrize("name", [*SURGEON, *NAS])
def test_checkpoints_work_alone(reports, folders, name):
    found = reports[name]
    assert found["class"] == "DeciLMForCausalLM" if name in NAS else found["class"].startswith("Surgeon")
    assert found["loading"] == NOTHING
    torch.testing.assert_close(torch.tensor(found["logits"]), here(folders[name]), atol=CLOSE, rtol=0)
    assert found["slots"] == 4
    assert found["filled"] == [24] * 4
    assert found["cached"] < CLOSE
    assert found["generate"] == [True, True] and found["left_padding"]
    # Eager Falcon adds alibi twice, to the scores and within the mask; transformers' own class differs there, too.
    assert (found["eager"] < CLOSE) is (name != "falcon-alibi") and found["sdpa"] < CLOSE
    assert found["without_gradient"] == found["checkpointed"] == []
    assert set(found["saved"]) == {path.name for path in folders[name].glob("*.py")}
    assert found["again"] == 0 and found["same_tensors"]


@pytest.mark.parametrize("name", MIXERS)
def test_recurrent_mixers_work_alone(reports, folders, name):
    found, close = reports[name], 0.05 if name == "mlgru-ternary" else CLOSE
    assert found["class"].startswith("Surgeon") and found["loading"] == NOTHING
    torch.testing.assert_close(torch.tensor(found["logits"]), here(folders[name]), atol=close, rtol=0)
    assert found["filled"] == [24] * (5 if name == "mlgru-windows" else 6)
    assert max(found["cached"], found["eager"], found["sdpa"]) < close
    assert found["generate"] == [True, True] and found["left_padding"]
    assert found["without_gradient"] == found["checkpointed"] == []
    assert "surgeon_mlgru.py" in found["saved"] and found["again"] == 0 and found["same_tensors"]


@pytest.mark.parametrize("name", BLOCK)
def test_block_transformers_work_alone(reports, folders, name):
    found, step = reports[name], BLOCK[name][2]
    length, split = step.block_length, step.split or 3
    assert found["class"].startswith("Block") and found["loading"] == NOTHING
    torch.testing.assert_close(torch.tensor(found["logits"]), here(folders[name]), atol=CLOSE, rtol=0)
    # The first of 24 tokens is alone in its block; of the block that is open, the token decoder has read all.
    blocks, opened = divmod(24 + length - 1, length)
    lead = step.prefix_length if step.decoder == "prefix" else 1
    assert found["filled"] == [blocks] * split + [lead + opened] * (6 - split)
    assert found["cached"] < CLOSE and found["eager"] < CLOSE and found["sdpa"] < CLOSE
    assert found["generate"] == [True, True] and found["left_padding"]
    assert found["without_gradient"] == found["checkpointed"] == []
    assert set(found["saved"]) == {path.name for path in folders[name].glob("*.py")}
    assert "surgeon_block_transformer.py" in found["saved"]
    assert found["again"] == 0 and found["same_tensors"]


@pytest.mark.parametrize("name", [*SURGEON, *MIXERS, *NAS, *BLOCK])
def test_other_auto_classes_load(reports, folders, name):
    """The body alone and heads on it: all that config.json lists, and what transformers has of the family's."""
    config = json.loads((folders[name] / "config.json").read_text())
    bodies, close = reports[name]["bodies"], 0.05 if name == "mlgru-ternary" else CLOSE
    assert {"AutoConfig", "AutoModelForCausalLM", *bodies} == set(config["auto_map"])
    family = {**SURGEON, **MIXERS, **NAS, **BLOCK}[name][0]
    lists = {
        "AutoModel": MODEL_MAPPING_NAMES,
        "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    assert set(bodies) == {auto for auto, names in lists.items() if family in names}
    for auto, found in bodies.items():
        assert config["auto_map"][auto].endswith(f".{found['class']}")
        assert max(found["difference"]) < close and found["again"], (auto, found)
        assert all(key.startswith(("score.", "classifier.")) for key in found["missing_keys"])
        assert all(key.startswith(("lm_head.", "embed_out.")) for key in found["unexpected_keys"])
        assert found["mismatched_keys"] == []


@pytest.mark.parametrize("name", [*SURGEON, *MIXERS, *NAS, *BLOCK])
def test_a_stock_class_named_by_hand_raises(reports, name):
    """Model class and config class, on what this package wrote and on what transformers saved again."""
    key = "intermediate_size" if name in NAS else "'(hidden_size|n_embd)'"
    for refusal in (*reports[name]["by_hand"], reports[name]["saved_by_hand"]):
        assert refusal is not None, "weights would be filled in at random"
        assert refusal.startswith("StrictDataclassFieldValidationError") and re.search(key, refusal)
        assert name in NAS or "load with trust_remote_code=True" in refusal


@pytest.mark.parametrize("name", [*SURGEON, *MIXERS, *NAS, *BLOCK])
def test_without_trust_the_load_refuses(reports, name):
    for refusal in reports[name]["refusals"]:
        assert refusal is not None, "weights would be filled in at random"
        assert "trust_remote_code" in refusal


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_native_checkpoints_are_plain(reports, folders, family):
    found, folder = reports[f"native-{family}"], folders[f"native-{family}"]
    assert not found["class"].startswith("Surgeon")
    assert found["loading"] == NOTHING
    torch.testing.assert_close(torch.tensor(found["logits"]), here(folder), atol=CLOSE, rtol=0)
    assert not list(folder.glob("*.py"))
