"""What is set on a loaded model reaches every part of it, as in transformers' own models."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import MIXTURE_NAMES
from modeling.forms import DECODERS, FORMS, built
from transformers import PreTrainedConfig

from llmsurgeon.modeling import surgeon_blocks
from llmsurgeon.modeling.surgeon_versions import OUTPUT_CACHE

CLOSE = 2e-5
# Eager Falcon adds alibi twice, to the scores and within the mask; transformers' own class differs there, too.
ALIKE = [name for name in FORMS if name != "falcon-alibi"]
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def fresh(name):
    return copy.deepcopy(built(name))


@pytest.mark.parametrize("name", FORMS)
def test_every_part_reads_the_model_s_own_config(name):
    model = built(name)
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            assert not isinstance(value, PreTrainedConfig) or value is model.config, f"{path}.{key}"


@pytest.mark.parametrize("name", FORMS)
def test_attention_is_switched_as_a_whole(name, tmp_path):
    """Loaded with one implementation and switched to another, it gives the same; no token sees what comes after it."""
    built(name).save_pretrained(tmp_path)
    mine, changed = logits(built(name)), IDS.clone()
    changed[:, 14:] = 3 + (changed[:, 14:] + 5) % 60
    for first, then in (("eager", "sdpa"), ("sdpa", "eager")):
        if not built(name)._supports_sdpa:
            continue
        model = type(built(name)).from_pretrained(tmp_path, attn_implementation=first)
        for wanted in (first, then, first):
            model.set_attn_implementation(wanted)
            found = logits(model)
            if name in ALIKE:
                torch.testing.assert_close(found, mine, atol=0.05 if name == "mlgru-ternary" else CLOSE, rtol=0)
            if name in DECODERS:
                with torch.no_grad():
                    later = model(input_ids=changed).logits
                torch.testing.assert_close(later[:, :14], found[:, :14], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", FORMS)
def test_sizes_in_the_config_are_read_while_blocks_are_made_and_never_after(name):
    """Blocks of differing shape share one config: a part that looked sizes up later would find another block's."""
    model = fresh(name)
    mine = logits(model)
    for key in ("intermediate_size", "num_key_value_heads", "num_kv_heads", "n_inner", "ffn_dim", "hidden_dim"):
        if hasattr(model.config, key):
            model.config.__dict__[key] = 7
    assert torch.equal(logits(model), mine)


@pytest.mark.parametrize("name", DECODERS)
def test_use_cache_of_the_config(name):
    model = fresh(name)
    with torch.no_grad():
        assert getattr(model(input_ids=IDS), OUTPUT_CACHE) is not None
        model.config.use_cache = False
        assert getattr(model(input_ids=IDS), OUTPUT_CACHE) is None


@pytest.mark.parametrize("name", [name for name in FORMS if name not in MIXTURE_NAMES])  # experts know no float64
def test_dtypes(name):
    """float64 and back is what it was: nothing keeps a dtype of its own that a cast does not reach."""
    model = fresh(name)
    mine = logits(model)
    wide = logits(model.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), mine, atol=0.2 if name == "mlgru-ternary" else 1e-3, rtol=1e-3)
    assert torch.equal(logits(model.float()), mine)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", FORMS)
def test_gradient_checkpointing_is_switched_on_and_off(name):
    model = fresh(name).train()
    found = []
    for switch in (None, model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        if switch:
            switch()
        flags = {
            module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")
        }
        assert flags == {switch == model.gradient_checkpointing_enable}
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed, after in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-4, rtol=1e-3)
        assert torch.equal(after, plain)


def test_blocks_with_a_config_of_their_own_would_be_found(monkeypatch, tmp_path):
    """A model whose masks alone are switched sees the future."""
    built("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(surgeon_blocks, "follow", lambda *_: None)
    model = type(built("llama")).from_pretrained(tmp_path, attn_implementation="eager")
    model.set_attn_implementation("sdpa")
    assert (logits(model) - logits(built("llama"))).abs().max() > 0.1
