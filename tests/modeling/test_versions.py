"""What layers make of a call: every name that a cache has had, and an error for what they do not know."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, TINY, tiny_encoder, tiny_model
from operations.helpers import logits, some_tokens

from llmsurgeon.errors import CheckpointError
from llmsurgeon.formats.caches import cached_call
from llmsurgeon.formats.models import empty_model, fill
from llmsurgeon.formats.surgeon import as_surgeon, surgeon_module
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.modeling import surgeon_versions as versions

DECODERS = [*FAMILY_NAMES, *MIXTURE_NAMES]
BLOCKS = {
    (name, cls.__name__): cls
    for name in (*DECODERS, *ENCODER_NAMES)
    for cls in vars(surgeon_module(FAMILIES[name])).values()
    if isinstance(cls, type) and hasattr(cls, "argument_names")
}


def surgeon(family: str):
    """A tiny model whose blocks are ours, though each has the shape of its family's."""
    stock = tiny_model(family)
    model = empty_model(as_surgeon({**stock.config.to_dict(), "model_type": family}))
    fill(model, stock.state_dict(), torch.float32, "cpu")
    return stock, model


def test_every_family_is_here():
    assert {name for name, _ in BLOCKS} == {*TINY, *MIXTURE_NAMES, *ENCODER_NAMES}


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_NAMES])
def test_attention_takes_by_the_same_names_what_the_layer_is_handed(family):
    """Blocks call attention by name; a name that differs would vanish in its **kwargs."""
    stock = tiny_encoder(family) if family in ENCODER_NAMES else tiny_model(family)
    model = empty_model(as_surgeon({**stock.config.to_dict(), "model_type": family}))
    block = model.get_submodule(FAMILIES[family].layers)[0]
    names = inspect.signature(getattr(block, block.attention_name).forward).parameters
    assert "attention_mask" in names and "attention_mask" in block.argument_names
    assert (block.cache_name is None) is (family in ("distilbert", "modernbert"))
    assert block.cache_name is None or block.cache_name in names


@pytest.mark.parametrize("family", DECODERS)
def test_a_layer_takes_the_cache_by_any_name(family):
    """Whatever the model calls it, the layer's own attention fills it: three tokens, then one more."""
    stock, model = surgeon(family)
    tokens = some_tokens(1, 9)
    torch.testing.assert_close(logits(model, tokens), logits(stock, tokens), atol=1e-5, rtol=1e-5)
    layers = model.get_submodule(FAMILIES[family].layers)
    for name in versions.CACHE_NAMES:

        def renamed(layer, args, kwargs, name=name):
            call = {**dict(zip(layer.argument_names, args, strict=False)), **kwargs}
            cache = versions.pop_cache("test", call)
            return (), {**call, name: cache}

        hooks = [layer.register_forward_pre_hook(_hidden_first(renamed), with_kwargs=True) for layer in layers]
        with torch.no_grad():
            _, cache = cached_call(model, input_ids=tokens[:, :8])
            output, cache = cached_call(model, cache, input_ids=tokens[:, 8:])
        torch.testing.assert_close(output.logits[:, -1], logits(stock, tokens)[:, -1], atol=1e-5, rtol=1e-4)
        assert cache.get_seq_length() == 9
        for hook in hooks:
            hook.remove()


def _hidden_first(change):
    def hook(layer, args, kwargs):
        rest, kwargs = change(layer, args[1:], kwargs)
        return (args[0], *rest), kwargs

    return hook


@pytest.mark.parametrize("key", BLOCKS, ids="-".join)
def test_what_a_block_does_not_know_it_does_not_swallow(key):
    block_class = BLOCKS[key]
    block = block_class.__new__(block_class)
    torch.nn.Module.__init__(block)
    hidden = torch.zeros(1, 2, 32)
    for unknown in ("memory", "encoder_hidden_states", "per_layer_input"):
        message = f"{key[1]} was handed an argument that it does not understand: '{unknown}'"
        with pytest.raises(TypeError, match=message):
            block.forward(hidden, **{unknown: hidden})
    with pytest.raises(TypeError, match="its family's layer takes"):
        block.forward(hidden, *[None] * 40)
    if block.cache_name is None:
        with pytest.raises(TypeError, match="'cache'"):
            block.forward(hidden, past_key_values=object())


def test_a_mask_that_an_mlgru_cannot_read():
    from operations.helpers import operate

    from llmsurgeon.operations.matmulfree import MatMulFree

    student, _, _ = operate(tiny_model("llama"), MatMulFree(layers=(1,)))
    with pytest.raises(ValueError, match=r"attention_mask of shape \[1, 1, 4, 4\]: a model with MLGRUs takes one of"):
        student(input_ids=some_tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask dict"):
        student.model(some_tokens(1, 4), {"full_attention": None})
    with pytest.raises(TypeError, match="does not understand: 'memory'"):
        student(input_ids=some_tokens(1, 4), memory=object())


def test_the_causal_mask_of_this_release():
    """True where a query may look, by a cache of three positions and padding on the left."""
    from transformers import DynamicCache

    config = tiny_model("llama").config
    config._attn_implementation = "eager"
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    real = torch.tensor([[0, 1, 1, 1, 1]])
    mask = versions.causal_mask(config, torch.zeros(1, 2, 32), real, cache)
    assert (mask[0, 0] == 0).tolist() == [[False, True, True, True, False], [False, True, True, True, True]]


def test_a_part_under_another_name_is_not_taken_for_one_that_is_gone(monkeypatch):
    module = surgeon_module(FAMILIES["llama"])
    monkeypatch.setattr(module.SurgeonLlamaBlock, "ffn_name", "feed_forward_network")
    with pytest.raises(CheckpointError, match="LlamaDecoderLayer has no feed_forward_network in transformers"):
        surgeon("llama")


def test_what_a_release_is_too_old_for():
    versions.needs("5.14", "a model")
    with pytest.raises(ImportError, match=r"^a model needs transformers 99\.0 or newer, and this is \d"):
        versions.needs("99.0", "a model")
