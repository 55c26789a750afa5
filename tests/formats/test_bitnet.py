"""Packed ternary linears, held against transformers' own modules: packing, scales of both classes, logits, generate."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from generation import generate
from operations.helpers import operate, some_tokens
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from llmsurgeon.errors import SurgeryError
from llmsurgeon.export import export
from llmsurgeon.formats.bitnet import packed, packing_of
from llmsurgeon.formats.models import empty_model
from llmsurgeon.model.ternary import Grid, is_ternary, rounded
from llmsurgeon.operations.ternary import Ternary
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run

with warnings.catch_warnings():  # importing torch's compiler warns of torch's own doings
    warnings.simplefilter("ignore")
    from transformers.integrations import bitnet

TOKENS = some_tokens(3, 12)


@pytest.fixture(autouse=True)
def uncompiled():
    """transformers compiles the small functions of its bitnet modules; that is slow and changes no number."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def ternary_folder(folder, family="llama", dtype=torch.float32, step=None, **changes):
    """A plain checkpoint with ternary linears in layers 1 and 4."""
    model, _, _ = operate(tiny_model(family, dtype=dtype, **changes), step or Ternary(method="round", layers=(1, 4)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def with_int8_inputs(model):
    """The plain model with what its ternary linears read rounded as BitNet does: 127 / absmax of each token."""

    def quantised(module, inputs):
        x = inputs[0].float()
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (((x * scale).round().clamp(-128, 127) / scale).to(inputs[0].dtype),)

    for module in model.modules():
        if isinstance(module, nn.Linear) and is_ternary(module.weight):
            module.register_forward_pre_hook(quantised)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "olmo2"])
def test_stock_transformers_computes_what_the_plain_model_does_on_int8_inputs(tmp_path, linear_class, family):
    changes = {"attention_bias": False} if family == "gpt_neox" else {}
    plain = ternary_folder(tmp_path / "plain", family, **changes)
    biased = linear_class == "autobitlinear" and family == "gpt_neox"
    if biased:
        with pytest.raises(SurgeryError, match="has a bias, which transformers' autobitlinear multiplies by the scale"):
            export(str(plain), str(tmp_path / "packed"), "bitnet", linear_class=linear_class)
        return
    export(str(plain), str(tmp_path / "packed"), "bitnet", linear_class=linear_class)
    model, reference = stock(tmp_path / "packed"), with_int8_inputs(stock(plain))
    kind = bitnet.AutoBitLinear if linear_class == "autobitlinear" else bitnet.BitLinear
    swapped = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert swapped == {n.removesuffix(".weight") for n, t in stock(plain).state_dict().items() if is_ternary(t)}
    torch.testing.assert_close(logits(model), logits(reference), atol=2e-4, rtol=2e-4)
    exact = logits(stock(plain))
    assert 0 < (logits(model) - exact).abs().max() < 0.2 * exact.std()
    prompt = TOKENS[:1, :6]
    assert torch.equal(generate(model, prompt, max_new_tokens=12), generate(reference, prompt, max_new_tokens=12))


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_one_linear_against_the_modules_themselves(linear_class):
    weight = rounded(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), Grid())
    bits, scale = packed("w", linear_class, weight)
    assert torch.equal(bitnet.unpack_weights(bits, dtype=torch.float32), torch.sign(weight))
    assert torch.equal(bitnet.pack_weights(torch.sign(weight)), bits)
    size = weight.abs().max()
    if linear_class == "bitlinear":
        module = bitnet.BitLinear(96, 64, bias=False, dtype=torch.float32)
        module.weight, module.weight_scale = bits, scale
        assert scale.item() == pytest.approx(1 / size.item())
    else:
        module = bitnet.AutoBitLinear(96, 64, bias=False, dtype=torch.float32)
        module.weight.data, module.weight_scale = torch.sign(weight), scale
        assert scale.item() == size.item()
    x = torch.randint(-127, 128, (5, 96), generator=torch.Generator().manual_seed(1)).float()
    x[:, 0] = 127  # int8 holds these inputs exactly
    torch.testing.assert_close(module(x), x @ weight.T, rtol=1e-5, atol=1e-3)


def test_biases_are_read_by_bitlinear(tmp_path):
    plain = ternary_folder(tmp_path / "plain", "qwen2", use_sliding_window=False)
    export(str(plain), str(tmp_path / "packed"), "bitnet")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    assert config["quantization_config"]["linear_class"] == "bitlinear"
    torch.testing.assert_close(
        logits(stock(tmp_path / "packed")), logits(with_int8_inputs(stock(plain))), atol=2e-4, rtol=2e-4
    )


def test_what_is_written(tmp_path):
    plain = ternary_folder(tmp_path / "plain", dtype=torch.bfloat16, tie_word_embeddings=True)
    made = export(str(plain), str(tmp_path / "packed"), "bitnet")
    tensors, before = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "plain"))
    assert "rounds what these linears read to int8" in made.loads
    assert "rounds what these linears read to int8" in (tmp_path / "packed/README.md").read_text()
    name = "model.layers.4.mlp.up_proj"
    assert tensors[f"{name}.weight"].dtype == torch.uint8 and tensors[f"{name}.weight"].shape == (24, 32)
    assert tensors[f"{name}.weight_scale"] == before[f"{name}.weight"].abs().max()
    assert torch.equal(tensors["model.layers.2.mlp.up_proj.weight"], before["model.layers.2.mlp.up_proj.weight"])
    config = json.loads((tmp_path / "packed/config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    kept = config["quantization_config"].pop("modules_to_not_convert")
    assert len(kept) == 4 * 7 + 1 and "lm_head" in kept and not any(n.startswith("model.layers.1.") for n in kept)
    assert config["quantization_config"] == {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    }
    assert made.after.disk_bytes < 0.8 * made.before.disk_bytes
    assert made.after.disk_bytes == pytest.approx(sum(t.numel() * t.itemsize for t in tensors.values()), abs=14 * 2)
    with pytest.raises(SurgeryError, match=r"quantised already \(quantization_config: bitnet\)"):
        export(str(tmp_path / "packed"), str(tmp_path / "again"), "native")


def test_a_recipe_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("parent")
    byte_tokenizer().save_pretrained("parent")
    (tmp_path / "text.txt").write_text("The quick brown fox; 0123.\n" * 200)
    text = "version: 1\ncalibration: {text: text.txt, tokens: 512, sequence_length: 16}\nformat: %s\nsteps:\n"
    step = "  - {op: ternary, linears: ffn%s}\n"
    for form in ("native", "bitnet"):
        outcome = run(loads(text % form + step % ""), "parent", form, Options())
        assert outcome.planned.written.format == form and outcome.evaluation is not None
    torch.testing.assert_close(logits(stock("bitnet")), logits(with_int8_inputs(stock("native"))), atol=2e-4, rtol=2e-4)
    with pytest.raises(SurgeryError, match="one scale belongs to each linear"):
        run(loads(text % "bitnet" + step % ", granularity: row"), "parent", "out", Options())
    with pytest.raises(SurgeryError, match="format bitnet packs ternary linears, and there are none"):
        run(loads(text % "bitnet" + "  - {op: prune_blocks, layers: [1]}\n"), "parent", "out", Options())
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("family", "changes", "step", "message"), [
    ("llama", {"intermediate_size": 98}, Ternary(method="round"), r"\w+ has 98 outputs, and four of them share a byte"),
    ("llama", {}, Ternary(method="round", granularity="row"), "has a scale for each row"),
    ("gpt2", {}, Ternary(method="round"), "there are none"),
    ("llama", {}, Ternary(method="round", modules={"mlp.up_proj": (0,)}, embeddings=True), ""),
])  # fmt: skip
def test_what_cannot_be_packed_is_refused(tmp_path, family, changes, step, message):
    plain = ternary_folder(tmp_path / "plain", family, step=step, **changes)
    if not message:  # a ternary embedding stays plain
        export(str(plain), str(tmp_path / "out"), "bitnet")
        assert torch.isfinite(logits(stock(tmp_path / "out"))).all()
        return
    with pytest.raises(SurgeryError, match=message):
        export(str(plain), str(tmp_path / "out"), "bitnet")
    assert not list(tmp_path.glob("out*"))


def test_packing_a_conv_is_refused():
    config = tiny_model("gpt2").config.to_dict()
    meta = {"transformer.h.0.mlp.c_fc.weight": torch.empty(32, 128, device="meta")}
    with pytest.raises(SurgeryError, match=r"transformer\.h\.0\.mlp\.c_fc is not a Linear of gpt2"):
        packing_of(empty_model(config), meta, list(meta))
