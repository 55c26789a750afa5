"""Mixtures of experts: names of files and of the class, parts and blocks that go, refit, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import LAYERS, MIXTURE_NAMES, byte_tokenizer, save_tiny, tiny_config, tiny_model
from operations.helpers import logits, naive, operate, skip, some_tokens, subject_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmsurgeon.analysis.measure import measure
from llmsurgeon.checkpoint.opening import open_checkpoint
from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.experts import class_form, file_form, file_shapes
from llmsurgeon.formats.loading import load_model
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.planning.opened import open_config, open_model
from llmsurgeon.planning.plan import plan
from llmsurgeon.recipe.recipe import loads
from llmsurgeon.run import Options, run
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk

DOWN = {"mixtral": "block_sparse_moe.experts.{}.w2.weight", "qwen3_moe": "mlp.experts.{}.down_proj.weight"}
TEXT = "The quick brown fox jumps over the lazy dog; 0123, and so on. Pack my box with five dozen jugs.\n" * 40


@pytest.fixture(params=MIXTURE_NAMES)
def name(request):
    return request.param


def recipe_of(*steps, more=""):
    return loads("version: 1\n" + more + "steps:\n" + "".join(f"  - {step}\n" for step in steps))


def ffn(layer, x):
    return layer.mlp(layer.post_attention_layernorm(x))


class Parts:
    """The parent's attention and mixture, for `naive`."""

    @staticmethod
    def no_attention(index):
        return lambda x, parts: x + ffn(parts.layers[index], x)

    @staticmethod
    def no_ffn(index):
        return lambda x, parts: x + parts.attention(index, x)


def test_the_class_and_the_file_hold_the_same(name):
    model, family = tiny_model(name), FAMILIES[name]
    state = model.state_dict()
    apart = file_form(state, family)
    assert family.layer(0) + DOWN[name].format(3) in apart and not [n for n in apart if n.endswith("gate_up_proj")]
    assert file_shapes({n: tuple(t.shape) for n, t in state.items()}, family) == {
        n: tuple(apart[n].shape) for n in apart
    }
    again = class_form(apart, family)
    assert set(again) == set(state)
    assert all(torch.equal(again[n], state[n]) for n in state)


def test_file_names_are_those_that_transformers_publishes(name, tmp_path):
    parent = save_tiny(tmp_path / "parent", name)
    assert set(load_file(parent / "model.safetensors")) == set(file_form(tiny_model(name).state_dict(), FAMILIES[name]))


def test_describe(name):
    spec = FAMILIES[name].describe(normalised(tiny_config(name)))
    layer = spec.layers[0]
    assert (layer.ffn.width, layer.ffn.experts, layer.ffn.per_token) == (24, 4, 2)
    assert spec.uniform and len(spec.layers) == LAYERS


def test_parts_and_blocks_go(name):
    model, tokens = tiny_model(name), some_tokens()
    steps = PruneAttention(layers=(0, 3)), PruneFFN(layers=(1,)), PruneBlocks(layers=(4,))
    pruned, written, _ = operate(model, *steps)
    stages = {0: Parts.no_attention(0), 3: Parts.no_attention(3), 1: Parts.no_ffn(1), 4: skip}
    torch.testing.assert_close(logits(pruned, tokens), logits(naive(model, stages), tokens), atol=1e-4, rtol=1e-4)
    assert written.format == "surgeon"
    native, written, _ = operate(model, PruneBlocks(layers=(1, 4)))
    torch.testing.assert_close(logits(native, tokens), logits(naive(model, {1: skip, 4: skip}), tokens))
    assert written.format == "native"


def test_zeros_stand_for_an_attention_that_went(name):
    model, tokens = tiny_model(name), some_tokens()
    padded, written, _ = operate(model, PruneAttention(layers=(2,)), format="native")
    assert written.format == "native"
    expected = logits(naive(model, {2: Parts.no_attention(2)}), tokens)
    torch.testing.assert_close(logits(padded, tokens), expected, atol=1e-4, rtol=1e-4)


def test_blocks_in_parallel(name):
    model, tokens = tiny_model(name), some_tokens()
    parallel, _, _ = operate(model, ParallelBlocks(windows=((2, 3),)))

    def both(x, parts):
        return x + sum(parts.block(i, x) - x for i in (2, 3))

    expected = logits(naive(model, {2: both, 3: skip}), tokens)
    torch.testing.assert_close(logits(parallel, tokens), expected, atol=1e-4, rtol=1e-4)


def test_kv_heads_merge(name):
    merged, written, _ = operate(tiny_model(name), PruneKVHeads(kv_heads=1))
    assert written.config["num_key_value_heads"] == 1 and torch.isfinite(logits(merged, some_tokens())).all()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (FuseFFN(runs=((1, 2),)), "fuse_ffn: a token goes to the experts that its layer's router chooses"),
        (PruneWidth(width=8, score="magnitude"), "prune_width: its channels lie in experts that see different tokens"),
    ],
    ids=lambda value: getattr(value, "op", ""),
)
def test_operations_on_dense_ffns_are_refused(name, step, reason):
    subject, _, _ = subject_of(tiny_model(name))
    with pytest.raises(SurgeryError, match=f"{name}: {reason}"):
        step.plan(subject)


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}], ids=str)
def test_layers_that_differ_by_number_are_refused(changes):
    with pytest.raises(SurgeryError, match=r"cannot be operated on: which layers have a dense FFN depends on"):
        FAMILIES["qwen3_moe"].describe({**normalised(tiny_config("qwen3_moe")), **changes})


def test_more_experts_a_token_than_there_are():
    with pytest.raises(SurgeryError, match="5 experts a token, and 4 in all"):
        FAMILIES["mixtral"].describe({**normalised(tiny_config("mixtral")), "num_experts_per_tok": 5})


def test_scores_and_variants(name):
    """A walk with parts left out gives what the operated model gives; the scores need no dense FFN."""
    model, tokens = tiny_model(name), some_tokens(batch=4, length=12)
    _, weights, config = subject_of(model)
    runner = LayerRunner(config, weights, torch.float32)
    gone = Variant(no_attention=frozenset({2}))
    streams = walk(runner, tokens, [Variant(), gone])
    for stream, steps in zip(streams, ((), (PruneAttention(layers=(2,)),)), strict=True):
        found = torch.stack([runner.final(row) for row in stream])
        torch.testing.assert_close(found, logits(operate(model, *steps)[0], tokens), atol=1e-4, rtol=1e-4)
    measured = measure(runner, tokens)
    assert "ffn_channel" not in measured.arrays
    assert all(kl > 0 for kl in measured.scores["ffn_kl"].mean)


@pytest.mark.parametrize("stacked", [False, True])
def test_written_checkpoints_load_in_transformers(name, stacked, tmp_path):
    """From files of either form, byte for byte where nothing was cut; native and surgeon."""
    parent = save_tiny(tmp_path / "parent", name)
    if stacked:
        state = {n: t.contiguous() for n, t in tiny_model(name).state_dict().items()}
        save_file(state, parent / "model.safetensors", {"format": "pt"})
    for label, step in (
        ("native", "{op: prune_blocks, layers: [1]}"),
        ("surgeon", "{op: prune_attention, layers: [1]}"),
    ):
        out = run(recipe_of(step), str(parent), str(tmp_path / label), Options()).out
        trust = {"trust_remote_code": label == "surgeon"}
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, **trust)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(model).__name__.startswith("Surgeon") is (label == "surgeon")
        tokens = some_tokens()
        torch.testing.assert_close(logits(model.eval(), tokens), logits(load_model(str(out)), tokens))
        found = open_checkpoint(str(out))
        layer = 1 if label == "native" else 2
        theirs = file_form(open_checkpoint(str(parent)), FAMILIES[name])
        for expert in range(4):
            prefix, suffix = FAMILIES[name], DOWN[name].format(expert)
            assert torch.equal(found[prefix.layer(layer) + suffix], theirs[prefix.layer(2) + suffix])
        model.save_pretrained(tmp_path / f"{label}-again")
        assert set(load_file(tmp_path / f"{label}-again" / "model.safetensors")) == set(found)


def test_bytes_of_experts_are_copied(name, tmp_path):
    parent = open_model(str(save_tiny(tmp_path / "parent", name)))
    made = plan(parent, recipe_of("{op: prune_blocks, layers: [0]}"), {})
    experts = [n for n in made.weights if ".experts." in n]
    assert len(experts) == (LAYERS - 1) * 4 * 3 and all(made.weights.origin(n) for n in experts)


def test_refit_moves_attention_alone(name, tmp_path):
    parent = save_tiny(tmp_path / "parent", name)
    byte_tokenizer().save_pretrained(parent)
    (tmp_path / "text.txt").write_text(TEXT)
    more = f"calibration: {{text: {tmp_path / 'text.txt'}, tokens: 1536, sequence_length: 16}}\n"
    steps = "{op: prune_blocks, layers: [2]}", "{op: prune_attention, layers: [4]}"
    gate = "gate: {max_kl: 100}\n"
    cut = run(recipe_of(*steps, more=more + gate), str(parent), str(tmp_path / "cut"), Options())
    healed = run(recipe_of(*steps, "{op: refit}", more=more), str(parent), str(tmp_path / "healed"), Options())
    assert healed.evaluation.kl < cut.evaluation.kl
    before, after = open_checkpoint(str(cut.out)), open_checkpoint(str(healed.out))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(".self_attn." in n for n in moved)
    assert {update.projection for update in healed.results["refit"].updates} <= {"attention input", "self_attn.o_proj"}


def test_costs_count_the_experts_of_a_token(tmp_path):
    sizes = {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    costs = plan(open_config(str(tmp_path)), recipe_of("{op: prune_blocks, layers: [0]}"), {}).before
    assert costs.parameters == 46_702_792_704
    assert costs.flops_per_token == pytest.approx(2 * 12.75e9, rel=0.01)  # 12.9 B active less the embedding
