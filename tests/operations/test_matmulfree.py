"""Attentions into MLGRUs: what is planned, that it runs as a model, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ENCODER_NAMES, FAMILY_NAMES, tiny_encoder, tiny_model
from generation import generate, in_pieces
from operations.helpers import declared, logits, operate, some_tokens, subject_of
from pydantic import ValidationError

from llmsurgeon.checkpoint.transform import TransformedWeights
from llmsurgeon.errors import SurgeryError
from llmsurgeon.inspect import LayerRow
from llmsurgeon.model.parts import AttentionSpec, BitFFNSpec, MLGRUSpec
from llmsurgeon.model.spec import from_block_configs, to_block_configs
from llmsurgeon.modeling.surgeon_mlgru import MLGRU, BitLinear
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.matmulfree import MatMulFree, memory_bias, unit_rows
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.prune_width import PruneWidth
from llmsurgeon.operations.refit import Refit

TAKING = tuple(name for name in FAMILY_NAMES if MatMulFree.declined(declared(name)) is None)
ATTENTION = AttentionSpec(heads=6, kv_heads=2, head_dim=8)


def test_llama_like_families_take_it():
    assert set(TAKING) == {"llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"}


@pytest.mark.parametrize("family", TAKING)
def test_a_block_is_its_equations_on_the_parents_weights(family):
    parent = tiny_model(family)
    student, _, spec = operate(parent, MatMulFree(layers=(1, 3), context=16))
    assert [isinstance(a, MLGRUSpec) for a in spec.attentions] == [False, True, False, True, False, False]
    old, new = parent.model.layers[1], student.model.layers[1]
    x = torch.randn(2, 7, 32)
    normed = old.input_layernorm(x)

    def as_heads(linear):  # key/value heads repeated for the two query heads that share each
        return linear.view(2, 7, 2, -1).repeat_interleave(2, dim=2).flatten(2)

    k, q = old.self_attn.k_proj, old.self_attn.q_proj
    gain = old.input_layernorm.weight
    scores = as_heads(F.linear(normed, unit_rows(k.weight, gain))) + new.self_attn.f_proj.bias
    low = torch.sigmoid(new.self_attn.lower_bound)
    keep, value = low + (1 - low) * torch.sigmoid(scores), F.silu(as_heads(old.self_attn.v_proj(normed)))
    # A bias shrinks with the row that it belongs to.
    gate = torch.sigmoid(q(normed) / (q.weight * gain).norm(dim=1))
    state, expected = torch.zeros(2, value.shape[-1]), []
    for t in range(7):
        state = keep[:, t] * state + (1 - keep[:, t]) * value[:, t]
        expected.append(old.self_attn.o_proj(gate[:, t] * state))
    found = new.attend(x) / new.residual_multiplier
    torch.testing.assert_close(found, torch.stack(expected, 1), atol=1e-5, rtol=1e-4)
    for name in ("mlp.down_proj.weight", "post_attention_layernorm.weight"):
        assert torch.equal(new.get_parameter(name), old.get_parameter(name))


def test_memories_reach_from_one_token_to_the_context():
    bias = memory_bias(ATTENTION, 1000)
    kept = 0.02 + 0.98 * torch.sigmoid(bias)
    tokens = (1 / (1 - kept)).sort().values
    assert tokens[0] < 1.1 and 500 < tokens[-1] < 1000 and len(tokens.unique()) > 40
    # The three copies of a key/value channel remember over different lengths.
    copies = bias.view(2, 3, 8)
    assert ((copies[:, 0] - copies[:, 1]).abs() > 0.05).all() and ((copies[:, 1] - copies[:, 2]).abs() > 0.05).all()


def test_rows_make_numbers_of_unit_size():
    weight, gain = 20 * torch.randn(50, 32), 1 + 0.5 * torch.randn(32)
    x = F.rms_norm(torch.randn(4000, 32), (32,), gain)
    assert (x @ unit_rows(weight, gain).T).std(0).sub(1).abs().max() < 0.1


@pytest.mark.parametrize(("family", "changes"), [("llama", {"attention_bias": True}), ("qwen2", {}), ("qwen3", {})])
def test_nothing_is_dropped_or_left_over(family, changes):
    """`operate` holds names and shapes against the written class; biases and head norms are where families differ."""
    student, written, spec = operate(tiny_model(family, **changes), MatMulFree(keep_attention=(0,)))
    assert written.format == "surgeon" and "MLGRU" in written.why
    mixers = [m for m in student.modules() if isinstance(m, MLGRU)]
    assert len(mixers) == 5 and spec.kv_numbers_per_token() == 2 * 2 * spec.layers[0].attention.head_dim
    assert (mixers[0].i_proj.bias is not None) is (family in ("llama", "qwen2"))
    assert (mixers[0].o_proj.bias is not None) is (family == "llama")
    assert torch.isfinite(logits(student, some_tokens())).all()


@pytest.mark.parametrize("family", TAKING)
@pytest.mark.parametrize("step", [MatMulFree(layers=(0, 3)), MatMulFree()], ids=["hybrid", "all"])
def test_token_by_token_as_in_one_pass(family, step):
    student, _, _ = operate(tiny_model(family), step)
    tokens = some_tokens()
    whole = logits(student, tokens)
    pieces, cache = in_pieces(student, tokens, tuple(range(10, 24)))
    torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=1e-4)
    states = [layer for layer in cache.layers if type(layer).__name__ == "MLGRUState"]
    assert len(states) == (2 if step.layers else 6) and cache.get_seq_length() == 24
    assert all(layer.state.shape == (2, layer.state.shape[1]) for layer in states)


@pytest.mark.parametrize("step", [MatMulFree(layers=(0, 3)), MatMulFree()], ids=["hybrid", "all"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generation_with_left_padding_and_beams(step, implementation):
    student, _, _ = operate(tiny_model("llama"), step)
    student.set_attn_implementation(implementation)
    tokens = some_tokens(1, 8)
    how = {"max_new_tokens": 6, "min_new_tokens": 6}
    alone = generate(student, tokens, **how)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 8)], 1).long()
    batch = torch.cat([padded, some_tokens(2, 13)[1:]])
    batched = generate(student, batch, attention_mask=torch.cat([mask, torch.ones(1, 13).long()]), **how)
    assert torch.equal(batched[0, 5:], alone[0])
    with torch.no_grad():
        behind = student(input_ids=padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(behind, logits(student, tokens), atol=2e-5, rtol=1e-4)
    generate(student, batch, attention_mask=torch.cat([mask, torch.ones(1, 13).long()]), num_beams=3, **how)
    with pytest.raises(ValueError, match="takes no static cache; leave cache_implementation out"):
        generate(student, tokens, cache_implementation="static", **how)


def test_ternary_linears_compute_the_same_before_rounding():
    parent = tiny_model("llama")
    float_model, _, _ = operate(parent, MatMulFree(layers=(2,)))
    student, _, spec = operate(parent, MatMulFree(layers=(2,), linears="ternary"))
    found = [m for m in student.modules() if isinstance(m, BitLinear)]
    assert len(found) == 7 and isinstance(spec.layers[2].ffn, BitFFNSpec) and spec.layers[2].attention.ternary
    assert type(spec.layers[1].ffn) is not BitFFNSpec
    # Apart from the two that write, whose norms the parent does not have.
    x = torch.randn(2, 5, 32)
    mine, theirs = student.model.layers[2].train(), float_model.model.layers[2]
    for module in found:
        module.share = 0.0
    for name in ("i_proj", "f_proj", "g_proj"):
        expected = getattr(theirs.self_attn, name)(theirs.input_layernorm(x))
        torch.testing.assert_close(
            getattr(mine.self_attn, name)(mine.input_layernorm(x)), expected, atol=1e-4, rtol=1e-3
        )
    expected = theirs.mlp.up_proj(theirs.post_attention_layernorm(x))
    torch.testing.assert_close(mine.mlp.up_proj(mine.post_attention_layernorm(x)), expected, atol=1e-4, rtol=1e-3)


def test_float_mixers_become_ternary_later():
    parent = tiny_model("llama")
    both, _, spec = operate(parent, MatMulFree(layers=(2,)), MatMulFree(linears="ternary", layers=(2,)))
    at_once, _, other = operate(parent, MatMulFree(layers=(2,), linears="ternary"))
    assert spec == other
    torch.testing.assert_close(logits(both, some_tokens()), logits(at_once, some_tokens()))
    _, _, spec = operate(parent, MatMulFree(layers=(2,)), MatMulFree(linears="ternary"))
    assert all(a.ternary for a in spec.attentions)


def test_the_description_survives_json():
    _, _, spec = operate(tiny_model("qwen2"), MatMulFree(layers=(1, 3)), MatMulFree(layers=(4,), linears="ternary"))
    configs = json.loads(json.dumps(to_block_configs(spec)))
    windows = [layer.attention.window for layer in spec.layers]
    assert from_block_configs(configs, 8, windows) == spec.layers
    rows = [LayerRow(i, b.attentions, b.ffns, None, parameters=0).to_dict() for i, b in enumerate(spec.layers)]
    assert rows[1]["attention"] == [{"kind": "mlgru", "width": 32, "linears": "float"}]
    assert rows[4]["attention"][0]["linears"] == "ternary" and rows[4]["ffn"][0]["kind"] == "bitlinear"


def test_count_takes_the_attentions_that_cost_least():
    subject, _, _ = subject_of(tiny_model("llama"), {"attention_kl": [0.5, 0.1, 0.4, 0.2, 0.9, 0.3]})
    assert MatMulFree(count=3).resolve(subject).layers == (1, 3, 5)
    assert MatMulFree(count=3).needs() == {"attention_kl"} and not MatMulFree(layers=(1,)).needs()
    again = MatMulFree(count=3).resolve(subject)
    assert again.count is None and again.resolve(subject) == again
    # Those that are MLGRUs already do not count.
    hybrid = subject.after(MatMulFree(layers=(1,)).plan(subject))
    assert MatMulFree(count=2).resolve(hybrid).layers == (3, 5)
    alike, _, _ = subject_of(tiny_model("llama"), {"attention_similarity": [0.5, 0.1, 0.4, 0.2, 0.9, 0.3]})
    assert MatMulFree(count=2, score="similarity").resolve(alike).layers == (0, 4)


def test_blocks_may_go_before_and_after():
    parent = tiny_model("llama")
    _, _, spec = operate(parent, PruneBlocks(layers=(1,)), MatMulFree(layers=(2, 4)), PruneBlocks(layers=(4,)))
    assert [b.parents for b in spec.layers] == [(0,), (2,), (3,), (5,)] and isinstance(
        spec.layers[1].attention, MLGRUSpec
    )
    student, _, spec = operate(parent, MatMulFree(layers=(2, 4)), PruneAttention(layers=(2,)))
    assert spec.layers[2].attention is None and torch.isfinite(logits(student, some_tokens())).all()


def test_ffns_may_be_fused_and_narrowed_before_and_after():
    parent = tiny_model("llama")
    cuts = (PruneWidth(width=40, score="magnitude"), PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),)))
    before, _, spec = operate(parent, *cuts, MatMulFree(layers=(1, 4)))
    after, _, other = operate(parent, MatMulFree(layers=(1, 4)), *cuts)
    assert spec == other and spec.layers[1].ffn.width == 120 and isinstance(spec.layers[1].attention, MLGRUSpec)
    torch.testing.assert_close(logits(before, some_tokens()), logits(after, some_tokens()))


def test_both_executors_agree_on_a_bfloat16_model():
    student, _, _ = operate(tiny_model("llama", dtype=torch.bfloat16), MatMulFree(layers=(1,)))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(student, some_tokens())).all()


def refused(name, *steps, **changes):
    with pytest.raises(SurgeryError) as error:
        operate(tiny_model(name, **changes), *steps)
    return str(error.value)


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in TAKING])
def test_other_decoders_are_refused(family):
    assert "matmulfree: an MLGRU takes the place of an attention that reads through" in refused(family, MatMulFree())


@pytest.mark.parametrize("family", ENCODER_NAMES)
def test_encoders_are_refused(family):
    subject, _, _ = subject_of(tiny_encoder(family))
    with pytest.raises(SurgeryError, match="it is an encoder and reads in both directions"):
        MatMulFree().resolve(subject)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((MatMulFree(layers=(3, 9)),), "matmulfree: layer 9 is not in the model: it has layers 0 to 5"),
        ((MatMulFree(keep_attention=(7,)),), "matmulfree: keep_attention: layer 7 is not in the model"),
        ((MatMulFree(keep_attention=(0, 1, 2, 3, 4, 5)),), "nothing to do"),
        ((PruneAttention(layers=(2,)), MatMulFree(layers=(2,))), "layer 2 has no attention"),
        ((PruneAttention(layers=(2,)), MatMulFree(keep_attention=(2,))), "layer 2 has no attention"),
        ((MatMulFree(layers=(2,)), MatMulFree(layers=(2,))), "layer 2 has an MLGRU already"),
        ((MatMulFree(), MatMulFree()), "no layer is left"),
        (
            (MatMulFree(layers=(2,)), PruneKVHeads(kv_heads=1)),
            "layer 2 has an MLGRU in the place of its attention;",
        ),
        (
            (MatMulFree(layers=(2,)), ParallelBlocks(windows=((1, 2),))),
            "layer 2 has an MLGRU in the place of its attention; cut first, matmulfree comes last",
        ),
        (
            (MatMulFree(layers=(2,), linears="ternary"), PruneWidth(width=16, score="magnitude")),
            "layer 2 has BitLinears",
        ),
        ((MatMulFree(layers=(2,), linears="ternary"), Refit()), "layer 2 has BitLinears"),
        ((MatMulFree(count=2),), "needs the score 'attention_kl'"),
    ],
)
def test_bad_steps(steps, message):
    assert message in refused("llama", *steps)


def test_one_way_to_name_layers():
    with pytest.raises(ValidationError, match="takes one of layers, keep_attention and count"):
        MatMulFree(layers=(1,), count=2)


@pytest.mark.parametrize("wanted", ["native", "nemotron-nas"])
def test_formats_that_cannot_hold_it_name_the_block(wanted):
    with pytest.raises(SurgeryError, match="block 3 has an MLGRU in the place of its attention; formats that can: "):
        operate(tiny_model("llama", intermediate_size=256), MatMulFree(layers=(3, 4)), format=wanted)


def test_in_memory_and_streamed_are_one(tmp_path):
    from llmsurgeon.planning.opened import open_model

    parent = tiny_model("llama")
    parent.save_pretrained(tmp_path / "parent")
    opened = open_model(str(tmp_path / "parent"))
    plan = MatMulFree(layers=(1,), linears="ternary").plan(opened.subject({}))
    streamed = TransformedWeights(opened.weights, plan.transforms)
    student, _, _ = operate(parent, MatMulFree(layers=(1,), linears="ternary"))
    state = student.state_dict()
    assert set(streamed) == set(state) and all(torch.equal(streamed[name], state[name]) for name in state)
