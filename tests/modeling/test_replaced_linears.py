"""Linears that quantisers and adapters put something else in the place of: what hangs on them stays."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from modeling.forms import FORMS, built
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from llmsurgeon.modeling.surgeon_mlgru import BitLinear

CLOSE = 2e-5
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, atol=CLOSE, rtol=0)


class Stored(nn.Module):
    """What a quantiser puts in the place of a linear, here without an error: it knows a weight and a bias, no more."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("stored", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x):
        return F.linear(x, self.stored, self.bias)


def replaced(model, make=Stored):
    """As quantisers do: every nn.Linear of the blocks, by its parent and name. Returns their paths."""
    paths = [path for path, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        holder, _, name = path.rpartition(".")
        setattr(model.base_model.get_submodule(holder), name, make(model.base_model.get_submodule(path)))
    return paths


@pytest.mark.parametrize("name", [name for name in FORMS if name != "gpt2"])  # of GPT-2 no linear is an nn.Linear
@pytest.mark.parametrize("used", [False, True])
def test_a_quantiser_without_error_changes_nothing(name, used):
    """Whether the model was run before or not."""
    model = copy.deepcopy(built(name))
    mine = logits(built(name))
    if used:
        logits(model)
    assert replaced(model)
    close(logits(model), mine)
    close(logits(copy.deepcopy(model)), mine)


def test_the_tensors_of_a_norm_are_called_as_ever():
    names = [name for name in built("llama-normed").state_dict() if name.startswith("model.layers.1.")]
    assert {"model.layers.1.self_attn.attn_sub_norm.weight", "model.layers.1.mlp.ffn_sub_norm.weight"} <= set(names)
    assert {"model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= set(names)
    assert len(names) == 11


def test_a_norm_that_is_lost_would_be_found():
    model = copy.deepcopy(built("llama-normed"))
    for layer in model.model.layers:
        layer.mlp._forward_pre_hooks.clear()
    replaced(model)
    assert (logits(model) - logits(built("llama-normed"))).abs().max() > 0.1


def test_torch_s_own_quantiser():
    """It takes hooks of a linear along, which must not norm twice."""
    mine = logits(built("llama-normed"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(built("llama-normed")), {nn.Linear})
        found = logits(model)
    assert type(model.model.layers[1].mlp.down_proj).__name__ == "Linear" and not hasattr(
        model.model.layers[1].mlp.down_proj.weight, "requires_grad"
    )
    assert 0 < (found - mine).abs().mean() < 0.1 * mine.std()


def adapted(name, targets):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(built(name)), config).eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama-normed", ["o_proj", "down_proj"]),
        ("mlgru-hybrid", ["i_proj", "o_proj", "q_proj"]),
        ("block-qwen3", ["q_proj", "o_proj", "context_expansion"]),
    ],
)
def test_an_adapter_merged_is_the_adapter(name, targets):
    model = adapted(name, targets)
    beside = logits(model)
    assert (beside - logits(built(name))).abs().max() > 0.05
    model.merge_adapter()
    close(logits(model), beside)
    model.unmerge_adapter()
    close(logits(model), beside)
    close(logits(copy.deepcopy(model).unload()), logits(built(name)))
    merged = model.merge_and_unload()
    close(logits(merged), beside)
    assert merged.state_dict().keys() == built(name).state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_reads_what_its_projection_reads():
    """Behind the norm: x -> W norm(x) + B A norm(x) * scale."""
    model = adapted("llama-normed", ["down_proj"])
    part, x = model.base_model.model.model.layers[1].mlp, torch.randn(3, 32)
    inner = part.ffn_sub_norm(part.act_fn(part.gate_proj(x)) * part.up_proj(x))
    lora = part.down_proj
    expected = F.linear(inner, lora.base_layer.weight)
    expected = expected + lora.lora_B["default"](lora.lora_A["default"](inner)) * lora.scaling["default"]
    close(part(x), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_bit_linears_are_left_alone_or_refused():
    model = copy.deepcopy(built("mlgru-ternary"))
    bit = {path for path, module in model.base_model.named_modules() if isinstance(module, BitLinear)}
    assert len(bit) == 7 and not bit & set(replaced(model))
    with pytest.raises(ValueError, match=r"BitLinear.* is not supported"):
        adapted("mlgru-ternary", ["down_proj"])


def test_a_compiler_takes_it_in_one_piece():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("torch 2.7's compiler does not follow the hooks of these models; docs/formats.md says so")
    for name in ("llama-normed", "llama"):
        model = copy.deepcopy(built(name))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            close(compiled(input_ids=IDS, use_cache=False).logits, logits(model))
        torch.compiler.reset()
