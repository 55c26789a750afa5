"""OpenVINO loads native forms by optimum-intel, and computes what transformers does. Started by scripts/engines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from compared import BASE, answered, expected, held

pytest.importorskip("optimum.intel")
pytestmark = pytest.mark.engines
NEW = 12


def loaded(folder: str, dtype: str):
    """The checkpoint, exported and compiled: computing in its dtype, weights as they are."""
    from optimum.intel import OVModelForCausalLM

    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    return OVModelForCausalLM.from_pretrained(
        folder, export=True, load_in_8bit=False, ov_config={"INFERENCE_PRECISION_HINT": precision}
    )


@pytest.mark.parametrize("name", [name for name in expected() if name.startswith("native")])
def test_a_checkpoint_is_computed_as_by_transformers(name):
    import torch

    wanted = expected()[name]
    model = loaded(wanted["folder"], wanted["dtype"])
    logs, follow = [], []
    for prompt in wanted["prompts"]:
        ids = torch.tensor([prompt])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        logs.append(logits.log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist())
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        follow.append(made[0, len(prompt) :].tolist())
    held("openvino", name, "optimum-intel's", logs, follow)


@pytest.mark.parametrize("name", [name for name in expected() if name.startswith(("surgeon", "nas"))])
def test_other_forms_are_refused(name):
    """Its exporter knows models by their type: what brings code of its own is not exported, and nothing else is."""
    with pytest.raises((ValueError, ImportError, OSError, RuntimeError)) as refusal:
        loaded(expected()[name]["folder"], "float32")
    assert any(word in str(refusal.value) for word in ("trust_remote_code", "custom", "architecture", "export"))


@pytest.mark.skipif(not expected(), reason="scripts/engines has written no checkpoints")
def test_an_encoder_is_timed():
    said, *_ = answered("openvino_worker.py", str(BASE / "encoder-bert"), encoder=True)
    assert said["weight_bytes"] > 0


@pytest.mark.skipif(not expected(), reason="scripts/engines has written no checkpoints")
@pytest.mark.parametrize("type_", [None, "int8", "int4"])
def test_what_bench_asks_is_timed(type_):
    said, *_ = answered("openvino_worker.py", expected()["native-llama"]["folder"], type=type_)
    assert said["device"] == "cpu" and said["dtype"] == "f32" and said["cache_number_bytes"] in (1, 2, 4)
    # Rounded weights take fewer bytes than the checkpoint's, which are of 32 bits.
    stored = sum(file.stat().st_size for file in Path(expected()["native-llama"]["folder"]).glob("*.safetensors"))
    assert (said["weight_bytes"] < stored / 2) == (type_ is not None)
