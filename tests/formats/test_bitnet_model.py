"""Norms before all output projections: transformers' own BitNet class, packed or not, and llama.cpp's bitnet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from gguf_models import largest_difference, save_uniform
from transformers import AutoModelForCausalLM, BitNetForCausalLM

from llmsurgeon.errors import SurgeryError
from llmsurgeon.export import export, export_gguf
from llmsurgeon.formats.loading import load_model
from llmsurgeon.kernels.packed import pack_linears
from llmsurgeon.planning.opened import open_model
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run

IDS = torch.randint(8, 280, (2, 12), generator=torch.Generator().manual_seed(3))
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": True}


def normed(folder, family="llama", format="auto", step=None, **changes):
    """A checkpoint with ternary linears and norms before the output projections, made by a run."""
    parent = save_uniform(folder / "parent", family, **{**WIDE, **changes})
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog lay on the log. " * 60)
    recipe = {
        "version": 1,
        "format": format,
        "calibration": {"text": str(text), "tokens": 512, "sequence_length": 32},
        "steps": [{"op": "ternary", "sub_norm": True, "method": "round", **(step or {})}],
    }
    run(loads(json.dumps(recipe)), str(parent), str(folder / "out"), Options())
    return folder / "out"


def outputs(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_transformers_own_class_computes_it(tmp_path, family):
    folder = normed(tmp_path, family, **({"sliding_window": None} if family == "mistral" else {}))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bitnet" and not list(folder.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(stock) is BitNetForCausalLM
    ours = load_model(str(folder), dtype=torch.float32)
    torch.testing.assert_close(outputs(ours), outputs(stock), rtol=1e-5, atol=1e-5)
    parent = open_model(str(folder))
    assert all(layer.sub_normed == ("attention", "ffn") for layer in parent.spec.layers)
    export(str(folder), str(tmp_path / "surgeon"), "surgeon")
    torch.testing.assert_close(outputs(load_model(str(tmp_path / "surgeon"))), outputs(ours), rtol=0, atol=0)
    assert len(pack_linears(ours)) == 14
    torch.testing.assert_close(outputs(ours), outputs(stock), rtol=1e-3, atol=1e-3)


def test_packed_for_transformers(tmp_path):
    folder = normed(tmp_path)
    export(str(folder), str(tmp_path / "packed"), "bitnet")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["model_type"] == "bitnet" and config["quantization_config"]["quant_method"] == "bitnet"
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        "torch.compiler.set_stance('force_eager')\n"
        "m = M.from_pretrained(sys.argv[1], dtype='auto'); ids = torch.arange(8, 20)[None]\n"
        "print(type(m).__name__, type(m.model.layers[0].mlp.down_proj).__name__)\n"
        "torch.save(m(input_ids=ids).logits.detach(), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "packed"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["BitNetForCausalLM", "AutoBitLinear"], done.stderr
    with torch.no_grad():
        expected = load_model(str(folder))(input_ids=torch.arange(8, 20)[None]).logits
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    # Activations are rounded to 8 bits there.
    assert (found - expected).square().mean() / expected.square().mean() < 1e-3


@pytest.mark.parametrize("kind", ["F32", "TQ2_0"])
def test_llamacpp_agrees(tmp_path, kind):
    pytest.importorskip("xllamacpp")
    folder = normed(tmp_path)
    more = {"float_type": "F32"} if kind == "TQ2_0" else {}
    made = export_gguf(str(folder), str(tmp_path / "model.gguf"), type=kind, **more)
    assert made.architecture == "bitnet"
    difference = largest_difference(load_model(str(folder), dtype=torch.float32), made.path)
    print(f"largest difference {difference:.5f}")
    assert difference < (1e-4 if kind == "F32" else 0.05)


@pytest.mark.parametrize(("changes", "message"), [
    ({"tie_word_embeddings": False}, "takes the embedding for the head"),
    ({"step": {"layers": [1]}}, "norms before both output projections of every block, block 0 not"),
    ({"step": {"linears": "ffn"}}, "norms before both output projections of every block, block 0 not"),
    ({"family": "qwen2"}, "llama.cpp's bitnet is Llama with norms, not qwen2"),
])  # fmt: skip
def test_what_llamacpp_cannot_hold_is_refused(tmp_path, changes, message):
    folder = normed(tmp_path, **changes)
    with pytest.raises(SurgeryError, match=message):
        export_gguf(str(folder), str(tmp_path / "model.gguf"))
    assert not list(tmp_path.glob("model*"))


def test_what_bitnets_class_cannot_hold_keeps_the_surgeon_form(tmp_path):
    folder = normed(tmp_path, step={"linears": "ffn"})
    assert json.loads((folder / "config.json").read_text())["model_type"] == "surgeon_llama"
    with pytest.raises(SurgeryError, match="format native cannot hold this model: block 0 has a norm before an output"):
        export(str(folder), str(tmp_path / "native"), "native")
    assert not (tmp_path / "native").exists()
