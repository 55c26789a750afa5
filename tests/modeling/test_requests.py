"""What transformers asks of a model: answered for every form, or refused at the door."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from conftest import MIXTURE_NAMES, tiny_model
from modeling.forms import DECODERS, FORMS, built, mixed
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from llmsurgeon.model.families import FAMILIES, SURGEON_PREFIX
from llmsurgeon.modeling.surgeon_blocks import ParallelBlock, SubRMSNorm
from llmsurgeon.modeling.surgeon_fff import FastFeedForward
from llmsurgeon.modeling.surgeon_mlgru import MLGRU, BitLinear
from llmsurgeon.operations.prune_attention import PruneAttention

CLOSE = 2e-5
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
MIXERS = [name for name in DECODERS if name.startswith("mlgru")]
BLOCK = [name for name in DECODERS if name.startswith("block")]
OWN = (MLGRU, BitLinear, SubRMSNorm, FastFeedForward)


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def close(mine, theirs, name=""):
    torch.testing.assert_close(mine, theirs, atol=0.05 if "ternary" in name else CLOSE, rtol=0)


# Hidden states


def stack_of(model):
    """The model's layers."""
    return next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("name", [name for name in FORMS if name not in BLOCK])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_hidden_states_are_those_between_layers(name, as_tuple):
    model = built(name)
    layers, seen = stack_of(model), []
    hooks = [
        layer.register_forward_hook(lambda m, i, o: seen.append(o[0] if isinstance(o, tuple) else o))
        for layer in layers
    ]
    with torch.no_grad():
        out = model.base_model(input_ids=IDS, output_hidden_states=True, return_dict=not as_tuple)
    for hook in hooks:
        hook.remove()
    states = next(value for value in out if isinstance(value, tuple)) if as_tuple else out.hidden_states
    assert len(states) == len(layers) + 1
    for mine, theirs in zip(states[1:-1], seen[:-1], strict=True):
        close(mine, theirs, name)
    assert torch.equal(states[-1], out[0])


def test_a_choice_of_hidden_states_is_refused_where_blocks_are_parallel():
    with pytest.raises(ValueError, match="choose from the output"):
        built("llama")(input_ids=IDS, output_hidden_states=[1])


def test_parallel_blocks_are_hooked_once():
    assert any(isinstance(module, ParallelBlock) for module in built("llama").modules())
    assert [len(built("llama").model._forward_hooks), len(built("decilm").model._forward_hooks)] == [1, 0]


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in BLOCK])
def test_attention_weights_are_given(name):
    """One for each attention that there is; where a body gathers them layer by layer, None stands for the others."""
    model = copy.deepcopy(built(name))
    model.set_attn_implementation("eager")
    if name.startswith("falcon"):  # chosen while it is made
        model.config._attn_implementation = "eager"
    with torch.no_grad():
        found = model(input_ids=IDS, output_attentions=True).attentions
    given = [weights for weights in found if weights is not None]
    slots = len(model(input_ids=IDS, use_cache=True)[1].layers) - name.count("mlgru")
    assert given and len(given) >= slots - 2
    for weights in given:
        assert weights.shape == (2, 4, 20, 20)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 20))


def test_what_is_no_single_graph_says_so():
    """As torch's compiler finds it."""
    claims = {name: built(name)._can_compile_fullgraph for name in ("llama", "llama-leaf-trees", "mlgru-hybrid")}
    assert claims == {"llama": True, "llama-leaf-trees": False, "mlgru-hybrid": False}
    for name in ("llama-leaf-trees", "mlgru-hybrid"):
        compiled = torch.compile(copy.deepcopy(built(name)), backend="eager", fullgraph=True)
        with torch.no_grad(), pytest.raises(RuntimeError):
            compiled(input_ids=IDS, use_cache=False)
        torch.compiler.reset()


# Missing tensors


@pytest.mark.parametrize("name", FORMS)
def test_what_a_file_lacks_is_initialised(name, tmp_path):
    """Beside what is there: values that each part begins with, not what memory happened to hold."""
    model = built(name)
    model.save_pretrained(tmp_path)
    lost = {
        f"{path}.{key}": (module, key)
        for path, module in model.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        if isinstance(module, OWN)
        or any(part in path for part in ("block_embedder", "context_expansion", "cross_attn"))
    }
    file = tmp_path / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if key not in lost}
    save_file(kept, file, metadata={"format": "pt"})
    with poisoned_memory():
        found = type(model).from_pretrained(tmp_path)
    values = dict(found.named_parameters())
    for key, tensor in model.state_dict().items():
        if key not in lost:
            assert torch.equal(values.get(key, found.state_dict()[key]), tensor), key
    for key, (module, parameter) in lost.items():
        value = values[key]
        if parameter == "lower_bound":
            assert value.item() == -4
        elif parameter == "gain" or isinstance(module, SubRMSNorm) or "norm" in key:
            assert (value == 1).all(), key
        elif "bias" in parameter:
            assert (value == 0).all(), key
        else:
            bound = 32**-0.5 if isinstance(module, FastFeedForward) else 0.2
            assert value.abs().max() <= bound and 0.001 < value.std() < bound, key
    assert (
        logits(found).isfinite().all() and bool(lost) == any(isinstance(m, OWN) for m in model.modules())
    ) or name in BLOCK


class poisoned_memory:
    """Fresh tensors hold NaN, as they may in a process that has used its memory before."""

    def __enter__(self):
        self.before = torch.empty_like

        def empty_like(*args, **kwargs):
            made = self.before(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        torch.empty_like = empty_like

    def __exit__(self, *_):
        torch.empty_like = self.before


# Generation


@pytest.mark.parametrize("name", MIXERS)
def test_sequences_packed_into_a_row_do_not_mix(name):
    model, sizes = built(name), (7, 1, 12)
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    for row in IDS[:, None]:
        packed = logits(model, row, position_ids=positions, use_cache=False)
        alone = torch.cat([logits(model, part, use_cache=False) for part in row.split(sizes, 1)], 1)
        close(packed, alone, name)
    assert (
        logits(model, IDS[:1], use_cache=False) - logits(model, IDS[:1], position_ids=positions, use_cache=False)
    ).abs().max() > 0.01


@pytest.mark.parametrize("name", MIXERS)
def test_positions_of_padded_rows_begin_nothing(name):
    """Positions as generate counts them: from the first token, 0 or 1 where there is padding."""
    model, mask = built(name), torch.ones(1, 20, dtype=torch.long)
    mask[:, :5] = 0
    for filler in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
        padded = logits(model, IDS[:1], attention_mask=mask, position_ids=positions, use_cache=False)
        close(padded[:, 5:], logits(model, IDS[:1, 5:], use_cache=False), name)


@pytest.mark.parametrize("name", MIXERS + BLOCK)
def test_what_cannot_go_back_is_refused_before_a_token_is_made(name):
    model = built(name)
    for arguments in ({"assistant_model": tiny_model("llama")}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(IDS[:1], max_new_tokens=4, **arguments)


@pytest.mark.parametrize("name", DECODERS)
def test_continuous_batching_is_refused(name):
    with pytest.raises(ValueError, match="call generate on a batch of prompts"):
        built(name).generate_batch(inputs=[[5, 6, 7], [8, 9]], max_new_tokens=2)


def test_attentions_alone_are_not_refused():
    model = built("llama")
    assert not model._is_stateful
    made = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=0)
    assert torch.equal(made, model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0))


# Learnt prefixes


def with_prefix(model):
    """A model whose caches begin with three learnt tokens, for as many attentions as there are."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=layers))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by names that transformers has replaced
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_learnt_prefix_is_read_by_every_attention_that_is_left(family):
    model = mixed(family, PruneAttention(layers=(0, 3)))
    # What is written to, as the size of the vocabulary is, is the config itself.
    assert model.config.get_text_config() is model.config
    tuned = with_prefix(copy.deepcopy(model)).eval()
    table = tuned.prompt_encoder.default.embedding.weight
    assert table.shape[1] % 8 == 0 and tuned.peft_config["default"].num_layers == 4
    tuned(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    assert (table.grad.unflatten(1, (8, -1)).abs().amax((0, 2)) > 0).all()
    assert (logits(tuned, attention_mask=torch.ones_like(IDS)) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "decilm", "mlgru-hybrid"])
def test_what_is_changed_on_the_caches_view_reaches_the_model(name):
    config = copy.deepcopy(built(name).config)
    view, whole = config.get_text_config(decoder=True), config.num_hidden_layers
    assert view is not config
    view.output_router_logits, view.use_cache = True, False
    assert config.output_router_logits is True and config.use_cache is False
    view.num_hidden_layers, view.block_configs = 1, []
    assert config.num_hidden_layers == whole == len(config.block_configs)
    # A copy of the view, and what is sent to another process, stands alone.
    for alone in (copy.copy(view), copy.deepcopy(view)):
        alone.use_cache = True
    assert config.use_cache is False and view.use_cache is False
    assert "_viewed" not in view.to_dict() and "_viewed" not in json.loads(view.to_json_string(use_diff=False))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name, says", [("mlgru-hybrid", "state of an MLGRU"), ("block-llama", "a cache of its own")])
def test_a_learnt_prefix_is_refused_where_there_is_no_place_for_it(name, says):
    with pytest.raises(ValueError, match=says):
        with_prefix(copy.deepcopy(built(name)))(input_ids=IDS, attention_mask=torch.ones_like(IDS))


# Experts


@pytest.mark.parametrize("name", MIXTURE_NAMES)
def test_experts_are_computed_in_each_way_that_the_stock_model_has(name, tmp_path):
    model = built(name)
    model.save_pretrained(tmp_path)
    for way in ("eager", "batched_mm", "grouped_mm"):
        again = type(model).from_pretrained(tmp_path, experts_implementation=way)
        assert again.config._experts_implementation == way
        close(logits(again), logits(model))


# Vocabulary


@pytest.mark.parametrize("name", FORMS)
def test_more_tokens_and_fewer(name, tmp_path):
    """The old tokens' logits stay; new ones can be read and written; it saves and loads."""
    model = copy.deepcopy(built(name))
    mine = logits(model)
    model.resize_token_embeddings(70)
    wider = logits(model)
    assert wider.shape[-1] == 70 == model.config.vocab_size
    close(wider[..., :64], mine, name)
    assert logits(model, torch.full((1, 9), 69)).isfinite().all()
    model.save_pretrained(tmp_path)
    close(logits(type(model).from_pretrained(tmp_path)), wider, name)
    model.resize_token_embeddings(64, mean_resizing=False)
    close(logits(model), mine, name)


def test_new_rows_of_a_block_transformer_are_the_mean_or_random():
    model = copy.deepcopy(built("block-llama"))
    table = model.model.block_embedder.embed_tokens.weight.clone()
    model.resize_token_embeddings(66)
    rows = model.model.block_embedder.embed_tokens.weight
    assert torch.equal(rows[:64], table)
    torch.testing.assert_close(rows[64:], table.mean(0).expand(2, -1))
    model.resize_token_embeddings(72, mean_resizing=False)
    rows = model.model.block_embedder.embed_tokens.weight
    assert 0.005 < rows[66:].std() < 0.1


# Copies


@pytest.mark.parametrize("name", ["llama", "llama-normed", "llama-leaf-trees", "mlgru-hybrid", "decilm", "block-qwen3"])
def test_models_are_pickled_and_copied(name):
    # Made anew: a model that has given hidden states holds hooks of transformers that cannot be pickled.
    model = FORMS[name]()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(again), logits(model))
        assert all(getattr(module, "config", again.config) is again.config for module in again.modules())


def test_every_family_is_here():
    assert {built(name).config.model_type for name in FORMS} >= {SURGEON_PREFIX + name for name in FAMILIES}
