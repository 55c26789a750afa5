"""Vision-language checkpoints: the text tower is operated on, everything else keeps its name and its bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing

import pytest
import torch
import transformers
from conftest import byte_tokenizer
from generation import generate
from safetensors.torch import load_file, save_file

from llmsurgeon.checkpoint.manifest import verify_files
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.export import export, export_gguf
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.formats.loading import load_model, load_tokenizer
from llmsurgeon.model.families.vision_language import VISION_LANGUAGE
from llmsurgeon.planning.opened import open_config, open_model
from llmsurgeon.planning.plan import plan
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run

NAMES = tuple(VISION_LANGUAGE)
LAYERS = 4
TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE = 5
SAMPLE = "The quick brown fox jumps over the lazy dog; 0123, and so on. Pack my box with five dozen jugs.\n" * 40
# Text models of their own, whose uneven form no modeling file knows.
OWN_TEXT = {
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "qwen2_vl": {"model_type": "qwen2_vl_text", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
OWN_TEXT["qwen2_vl"] |= {"bos_token_id": 1, "eos_token_id": 2}
OWN_TEXT["gemma3"]["layer_types"] = ["sliding_attention", "full_attention"] * 2
OWN_TEXT["qwen2_vl"]["rope_parameters"]["mrope_section"] = [1, 1, 2]
OWN_TEXT["qwen2_5_vl"] = {**OWN_TEXT["qwen2_vl"], "model_type": "qwen2_5_vl_text"}
FAMILY = {"gemma3": "gemma3_text", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
UNEVEN = [name for name in NAMES if VISION_LANGUAGE[name].uneven]
CUTS = {
    "native": "{op: prune_blocks, layers: [1]}",
    "surgeon": "{op: prune_attention, layers: [0, 2]}",
}


def tiny(name, **text):
    """A random model with images of four patches (one token each for LLaVA, one for all four for the others)."""
    declared = VISION_LANGUAGE[name]
    if name == "llava":
        extra = {"vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}}
        extra |= {"image_token_index": IMAGE, "image_seq_length": 4}
    elif name == "gemma3":
        extra = {"vision_config": {"model_type": "siglip_vision_model", **VISION}, "image_token_index": IMAGE}
        extra |= {"mm_tokens_per_image": 1}
    elif name == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
        extra = {"vision_config": vision, "image_token_id": IMAGE}
    elif name == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4}
        extra = {"vision_config": {**vision, "intermediate_size": 32, "window_size": 16}, "image_token_id": IMAGE}
    else:
        extra = {"vision_config": VISION, "image_token_id": IMAGE, "scale_factor": 2}
    config = transformers.AutoConfig.for_model(name, text_config={**TEXT, **OWN_TEXT.get(name, {}), **text}, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, declared.model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def save(folder, name, **text):
    tiny(name, **text).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def seen(model):
    """Logits for a text with an image in it."""
    kind = type(model).__name__
    patches = 4 if "Llava" in kind else 1
    ids = torch.tensor([[7, 8, *[IMAGE] * patches, 9, 10, 11]])
    pixels, more = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)), {}
    if "Qwen" in kind:  # patches in rows, each twice in time
        pixels, more = pixels.view(4, 48).repeat(1, 2), {"image_grid_thw": torch.tensor([[1, 2, 2]])}
        more["mm_token_type_ids"] = (ids == IMAGE).int()
    elif "Gemma" not in kind and patches == 1:
        pixels = pixels[None]
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, use_cache=False, **more).logits


def tower(model):
    return model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model


def operated(name, form):
    """The parent after CUTS[form], from its own modules."""
    model = tiny(name)
    layers = tower(model).layers
    if form == "native":
        tower(model).layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != 1)
        if name == "gemma3":  # a layer's kind is looked up by its number
            config = tower(model).config
            config.layer_types = [kind for i, kind in enumerate(config.layer_types) if i != 1]
            config.num_hidden_layers = len(config.layer_types)
        return model
    with torch.no_grad():
        for index in (0, 2):
            layers[index].self_attn.o_proj.weight.zero_()
    return model


def recipe_of(*steps, more=""):
    return loads("version: 1\n" + more + "steps:\n" + "".join(f"  - {step}\n" for step in steps))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize(("name", "form"), [(n, f) for n in NAMES for f in CUTS if f == "native" or n in UNEVEN])
def test_what_is_written_loads_in_transformers_and_sees(name, form, tmp_path):
    parent = save(tmp_path / "parent", name)
    out = run(recipe_of(CUTS[form]), str(parent), str(tmp_path / "out"), Options()).out
    assert verify_files(out) == [] and (out / "preprocessor_config.json").exists()
    trust = {"trust_remote_code": form == "surgeon"}
    auto = transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(out, output_loading_info=True, **trust)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(seen(model.eval()), seen(operated(name, form)), atol=1e-5, rtol=1e-5)
    before, after = open_checkpoint(str(parent)), open_checkpoint(str(out))
    beside = [n for n in before if any(part in n for part in ("vision", "connector", "projector", "visual"))]
    assert len(beside) > 20 and all(torch.equal(before[n], after[n]) for n in beside)
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 64 and config["vision_config"]
    assert config["model_type"] == (name if form == "native" else f"surgeon_{name}")
    if form == "native":
        assert config["text_config"]["num_hidden_layers"] == LAYERS - 1
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "pipeline_tag: image-text-to-text" in card


def test_published_names_stay(tmp_path):
    """LLaVA's files spell the tower otherwise than today's class; both spellings come out as they went in."""
    parent = save(tmp_path / "parent", "llava")
    old = load_file(parent / "model.safetensors")
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in old
    new = {n: t.contiguous() for n, t in tiny("llava").state_dict().items()}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in new
    for label, tensors in (("old", old), ("new", new)):
        save_file(tensors, parent / "model.safetensors", {"format": "pt"})
        out = run(recipe_of(CUTS["native"]), str(parent), str(tmp_path / label), Options()).out
        found = set(load_file(out / "model.safetensors"))
        assert found < set(tensors) and len(tensors) - len(found) == 9
        model = transformers.AutoModelForImageTextToText.from_pretrained(out)
        torch.testing.assert_close(seen(model.eval()), seen(operated("llava", "native")), atol=1e-5, rtol=1e-5)


def test_zeros_in_the_native_form(name, tmp_path):
    parent = save(tmp_path / "parent", name)
    recipe = recipe_of(CUTS["surgeon"], more="format: native\n")
    out = run(recipe, str(parent), str(tmp_path / "out"), Options()).out
    model = transformers.AutoModelForImageTextToText.from_pretrained(out)
    torch.testing.assert_close(seen(model.eval()), seen(operated(name, "surgeon")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", UNEVEN)
def test_the_surgeon_form_generates_saves_and_can_be_cut_again(name, tmp_path):
    parent = save(tmp_path / "parent", name)
    first = run(recipe_of(CUTS["surgeon"]), str(parent), str(tmp_path / "first"), Options()).out
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(first, trust_remote_code=True).eval()
    ids = torch.arange(10, 20)[None]
    generate(model, ids, max_new_tokens=8, min_new_tokens=8)
    with torch.no_grad():
        assert len(cached_call(model, input_ids=ids)[1].layers) == 2
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    torch.testing.assert_close(seen(again), seen(model))
    second = run(recipe_of("{op: prune_blocks, layers: [3]}"), str(first), str(tmp_path / "second"), Options()).out
    cut = auto.from_pretrained(second, trust_remote_code=True).eval()
    tower(model).layers = tower(model).layers[:3]
    torch.testing.assert_close(seen(cut), seen(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", UNEVEN)
def test_recurrent_mixers_in_a_tower(name, tmp_path):
    """Cached as in one pass, and blind to padding."""
    parent = save(tmp_path / "parent", name)
    out = run(recipe_of("{op: matmulfree, layers: [0, 2]}"), str(parent), str(tmp_path / "out"), Options()).out
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    ids, greedy = torch.arange(10, 20)[None], dict(max_new_tokens=6, min_new_tokens=6)
    cached = generate(model, ids, **greedy)
    assert torch.isfinite(seen(model)).all()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 10)], 1).long()
    assert torch.equal(generate(model, padded, attention_mask=mask, **greedy)[:, 3:], cached)


def test_without_trust_the_surgeon_form_refuses(tmp_path):
    """Through the Auto class, and through the stock class by name; in a process that has not run the code."""
    script = (
        "import json, sys, transformers\n"
        "for folder, stock in json.loads(sys.argv[1]).items():\n"
        "    for way in ('AutoModelForImageTextToText', stock):\n"
        "        try:\n"
        "            getattr(transformers, way).from_pretrained(folder)\n"
        "        except Exception as error:\n"
        "            print('\\nrefused:', folder, way)\n"
        "        else:\n"
        "            print('\\nloaded:', folder, way)\n"
    )
    stock = {}
    for name in UNEVEN:
        parent = save(tmp_path / f"parent-{name}", name)
        out = run(recipe_of(CUTS["surgeon"]), str(parent), str(tmp_path / name), Options()).out
        stock[str(out)] = VISION_LANGUAGE[name].model_class
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", script, json.dumps(stock)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    said = [line for line in found.stdout.splitlines() if line.startswith(("refused", "loaded"))]
    ways = [(folder, way) for folder, own in stock.items() for way in ("AutoModelForImageTextToText", own)]
    assert said == [f"refused: {folder} {way}" for folder, way in ways], found.stderr


def test_the_tower_is_what_is_measured_and_healed(tmp_path):
    """Analysis, refit and evaluation see the text model by itself, and the whole model comes out."""
    parent = save(tmp_path / "parent", "smolvlm")
    (tmp_path / "text.txt").write_text(SAMPLE)
    text = f"calibration: {{text: {tmp_path / 'text.txt'}, tokens: 1024, sequence_length: 16}}\n"
    cut = recipe_of("{op: prune_attention, count: 1, score: kl}", more=text + "gate: {max_kl: 100}\n")
    healed = recipe_of("{op: prune_attention, count: 1, score: kl}", "{op: refit}", more=text)
    worse = run(cut, str(parent), str(tmp_path / "cut"), Options())
    better = run(healed, str(parent), str(tmp_path / "healed"), Options())
    assert better.evaluation.kl < worse.evaluation.kl
    assert type(load_model(str(parent))).__name__ == "LlamaForCausalLM"
    assert type(load_model(str(better.out))).__name__ == "SurgeonLlamaForCausalLM"
    assert load_tokenizer(str(better.out)).vocab_size == 64
    found = transformers.AutoModelForImageTextToText.from_pretrained(better.out, trust_remote_code=True)
    assert torch.isfinite(seen(found.eval())).all()


def test_costs_and_inspect(name, tmp_path):
    """The rest of the file counts as parameters and bytes, and takes no part in a text token's work."""
    parent = save(tmp_path / "parent", name)
    opened = open_model(str(parent))
    made = plan(opened, recipe_of(CUTS["native"]), {})
    assert made.before.parameters == sum(t.numel() for t in load_file(parent / "model.safetensors").values())
    text = plan(open_config(str(parent)), recipe_of(CUTS["native"]), {})
    assert made.before.flops_per_token == text.before.flops_per_token
    assert all(made.weights.origin(n) for n in opened.beside)
    assert opened.model_type == name and opened.family.model_type == FAMILY.get(name, "llama")


def test_other_text_towers(tmp_path):
    """Of a family that the tower's file does not know, uniform and zero-filled towers can be written."""
    parent = save(tmp_path / "parent", "llava", model_type="qwen2")
    out = run(recipe_of(CUTS["native"]), str(parent), str(tmp_path / "out"), Options()).out
    assert transformers.AutoModelForImageTextToText.from_pretrained(out).config.text_config.num_hidden_layers == 3
    with pytest.raises(
        SurgeryError, match=r"llava with a text tower of qwen2 has no form for blocks that differ .*native"
    ):
        run(recipe_of(CUTS["surgeon"]), str(parent), str(tmp_path / "no"), Options())
    filled = recipe_of(CUTS["surgeon"], more="format: native\n")
    assert run(filled, str(parent), str(tmp_path / "filled"), Options()).planned.written.format == "native"
    assert not (tmp_path / "no").exists()


def test_towers_that_no_modeling_file_knows(tmp_path):
    parent = save(tmp_path / "parent", "gemma3")
    with pytest.raises(SurgeryError, match=r"gemma3 with a text tower of gemma3_text has no form for blocks .*native"):
        run(recipe_of(CUTS["surgeon"]), str(parent), str(tmp_path / "no"), Options())
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_configs_without_a_text_config(name, tmp_path):
    """Published ones hold the text model's sizes beside the vision model's, and its tensors under Qwen2's names."""
    parent = save(tmp_path / "parent", name)
    config = json.loads((parent / "config.json").read_text())
    text = config.pop("text_config")
    flat = {key: value for key, value in text.items() if key not in ("model_type", "rope_parameters")}
    flat |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    (parent / "config.json").write_text(json.dumps({**flat, **config}))
    tensors = load_file(parent / "model.safetensors")
    old = {
        n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t for n, t in tensors.items()
    }
    save_file(old, parent / "model.safetensors", {"format": "pt"})
    out = run(recipe_of(CUTS["native"]), str(parent), str(tmp_path / "out"), Options()).out
    written = json.loads((out / "config.json").read_text())
    assert written["text_config"]["num_hidden_layers"] == 3 and "num_hidden_layers" not in written
    assert written["text_config"]["model_type"] == f"{name}_text"
    model = transformers.AutoModelForImageTextToText.from_pretrained(out)
    torch.testing.assert_close(seen(model.eval()), seen(operated(name, "native")), atol=1e-5, rtol=1e-5)


def test_what_is_refused(tmp_path):
    parent = save(tmp_path / "parent", "idefics3")
    for step, more, message in (
        (
            CUTS["surgeon"],
            "format: nemotron-nas\n",
            "nemotron-nas holds text models alone, this one is vision-language",
        ),
        (
            "{op: distill, steps: 1}",
            "",
            "distill saves the text tower alone, without the rest of this vision-language model",
        ),
    ):
        with pytest.raises(SurgeryError, match=message):
            run(recipe_of(step, more=more), str(parent), str(tmp_path / "out"), Options())
    with pytest.raises(SurgeryError, match="format gguf holds text models alone, this one is vision-language"):
        export_gguf(str(parent), str(tmp_path / "out.gguf"))
    tensors = {n: t for n, t in load_file(parent / "model.safetensors").items() if "text_model" not in n}
    save_file(tensors, parent / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no text tower: no tensor is named model\.text_model\.\*"):
        open_model(str(parent))
    config = json.loads((parent / "config.json").read_text())
    config["text_config"]["model_type"] = "no_such_model"
    (parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(SurgeryError, match="idefics3"):
        open_config(str(parent))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("form", typing.get_args(typing.Literal["native", "surgeon"]))
def test_export_keeps_the_whole_model(form, tmp_path):
    parent = save(tmp_path / "parent", "llava")
    export(str(parent), str(tmp_path / "out"), form)
    trust = {"trust_remote_code": form == "surgeon"}
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", **trust).eval()
    torch.testing.assert_close(seen(model), seen(tiny("llava")), atol=1e-5, rtol=1e-5)
