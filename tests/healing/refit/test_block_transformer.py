"""The closed-form start of a block transformer: against least squares, against the slow obvious walk, by its effect."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_model
from operations.helpers import operate, subject_of

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.healing.batches import Batches
from llmsurgeon.healing.refit import block_transformer
from llmsurgeon.healing.refit.block_transformer import affine_map, refit_block_transformer
from llmsurgeon.healing.refit.context import Context, RefitOptions
from llmsurgeon.healing.store import LayerStore
from llmsurgeon.operations.block import Block
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.parallel_blocks import ParallelBlocks
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.operations.prune_kv_heads import PruneKVHeads
from llmsurgeon.operations.refit import Refit
from llmsurgeon.walk.runner import LayerRunner

FAMILIES = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}, "qwen3": {}}


def ids(rows=40, length=26, seed=1):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def fitted(store, parent, steps, tokens, ridges=(1e-4, 1e-2, 1.0), batch=7):
    """(the student as it starts, what the refit read and found, the student behind it, names of what it changed)."""
    steps = steps if isinstance(steps, tuple) else (steps,)
    start, *_ = operate(parent, *steps)
    student, _, spec = operate(parent, *steps)
    for parameter in student.parameters():
        parameter.data = parameter.data.clone()
    subject, weights, _ = subject_of(parent)
    runner = LayerRunner(normalised(parent.config.to_dict()), weights, torch.float32)
    held_out = torch.arange(len(tokens)) % 8 == 3
    text = Batches.of(tokens, held_out, batch)
    context = Context(runner, student, subject.spec, spec, text, RefitOptions(ridges), LayerStore(store))
    with patch.object(block_transformer, "fit_decoders", wraps=block_transformer.fit_decoders) as spy:
        made = refit_block_transformer(context)
    p = spy.call_args.args[0].p if spy.called else None
    work = SimpleNamespace(tokens=text.tokens, held_out=text.held_out, p=p, updates=made.updates)
    return start, work, student, made.files


def states(parent, tokens):
    with torch.no_grad():
        return parent.model(tokens, output_hidden_states=True, use_cache=False).hidden_states


@torch.no_grad()
def states_in_front_of_the_norm(parent, tokens):
    seen = []
    hook = parent.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    parent(input_ids=tokens, use_cache=False)
    hook.remove()
    return seen[0]


@torch.no_grad()
def away(parent, student, tokens, length):
    """Mean squared distance of the two models' last streams, in front of the final norm, second block left out."""
    theirs, mine = (states_in_front_of_the_norm(model, tokens) for model in (parent, student))
    return (theirs - mine)[:, 1 + length :].square().mean().item()


def test_an_affine_map_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator) + 3
    y = x @ torch.randn(5, 4, generator=generator) + 7 + 0.1 * torch.randn(300, 4, generator=generator)
    held_out = torch.arange(300) % 5 == 0
    weight, bias, ridge, error = affine_map(x, y, held_out, (1e-7,))
    centred = (each[~held_out] - each[~held_out].mean(0) for each in (x, y))
    slope = torch.linalg.lstsq(*centred).solution
    torch.testing.assert_close(weight, slope.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias, y[~held_out].mean(0) - x[~held_out].mean(0) @ slope, atol=1e-2, rtol=1e-2)
    assert ridge == 1e-7 and 0 < error < 0.1
    noise = torch.randn(300, 4, generator=generator)
    weight, bias, ridge, error = affine_map(x, noise, held_out, (1e-7, 1e-3))
    assert (ridge, error) == (None, 1.0) and not weight.any()
    torch.testing.assert_close(bias, noise[~held_out].mean(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_fitted_layers_come_nearer_to_the_parent(tmp_path, family, length):
    """Than the same student with the parent's own layers, on text that was not fitted to."""
    parent = tiny_model(family, **FAMILIES[family])
    start, work, student, changed = fitted(tmp_path, parent, Block(block_length=length), ids(64))
    projections = {update.projection for update in work.updates}
    between = {"context_expansion", "token_projection"} if length > 1 else {"context_expansion"}
    assert projections == {"self_attn.o_proj", "mlp.down_proj"} | between
    layers = {name for name in changed if ".layers." in name}
    assert {name.split(".", 3)[3] for name in layers} <= {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    lower = {name for name in layers if int(name.split(".")[2]) < 3}
    assert bool(lower) == (length > 1) and layers - lower
    fresh = ids(16, seed=9)
    found = away(parent, student, fresh, length)
    student.load_state_dict({name: start.state_dict()[name] for name in layers}, strict=False)
    assert found < away(parent, student, fresh, length)


def test_the_prefix_is_the_parent_s_first_token_and_its_state_at_the_block_s_end(tmp_path):
    """Blocks of one token: the context is the parent's state already, and the map of it the identity."""
    parent, tokens = tiny_model("llama"), ids(64)
    _, work, student, _ = fitted(tmp_path, parent, Block(block_length=1), tokens, (1e-6,))
    hidden = states(parent, work.tokens)[3]
    expansion = student.model.context_expansion
    torch.testing.assert_close(expansion.bias[:32], hidden[:, 0].mean(0), atol=1e-5, rtol=1e-4)
    assert not expansion.weight[:32].any()
    torch.testing.assert_close(expansion.weight[32:], torch.eye(32), atol=2e-2, rtol=0)


@torch.no_grad()
def test_the_fits_are_those_of_the_slow_walk(tmp_path):
    """Contexts, token map and the first fitted layer of the token decoder, each by least squares over the rows that
    the model itself computes, one block at a time."""
    parent, tokens, length, split = tiny_model("llama"), ids(48, 22), 4, 3
    step = Block(block_length=length, split=split)
    _, work, student, _ = fitted(tmp_path, parent, step, tokens, (1e-6,))
    tokens, held = work.tokens, work.held_out
    hidden, body = states(parent, tokens), student.model
    embedded = parent.model.embed_tokens(tokens)[:, 1:].flatten(0, 1)
    weight, bias, *_ = affine_map(embedded, hidden[split][:, 1:].flatten(0, 1), held.repeat_interleave(21))
    torch.testing.assert_close(body.token_projection.weight, weight, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(body.token_projection.bias, bias, atol=1e-3, rtol=1e-2)
    # Six blocks are closed by 22 tokens behind three places of padding: the context of block j ends at token 4 j.
    contexts, wanted = [], []
    seen = {}
    hook = body.context_expansion.register_forward_pre_hook(lambda _, inputs: seen.update(context=inputs[0]))
    for row, states_TD in zip(tokens, hidden[split], strict=True):
        for j in range(1, 5):
            student(input_ids=row[None, : 4 * j + 1], use_cache=False, logits_to_keep=1)
            contexts.append(seen["context"][-1])
            wanted.append(states_TD[4 * j])
    hook.remove()
    found = torch.stack(contexts) @ body.context_expansion.weight[32:].T + body.context_expansion.bias[32:]
    weight, bias, _, _ = affine_map(torch.stack(contexts), torch.stack(wanted), held.repeat_interleave(4))
    torch.testing.assert_close(found, torch.stack(contexts) @ weight.T + bias, atol=5e-3, rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("layer", [0, 1, 3, 4])
def test_projections_are_fitted_to_the_parent_s_stream(tmp_path, layer, part):
    """Against least squares on augmented rows, features as the finished model itself computes them."""
    parent, tokens, ridge = tiny_model("llama"), ids(48, 22), 1e-2
    start, work, student, _ = fitted(tmp_path, parent, Block(block_length=2), tokens, (ridge,))
    seen, wanted = {}, {}
    norm = "post_attention_layernorm"
    hooks = [
        student.model.layers[layer].get_submodule(part).register_forward_pre_hook(lambda _, i: seen.update(read=i[0])),
        student.model.layers[layer].register_forward_pre_hook(lambda _, i: seen.update(entered=i[0])),
        student.model.layers[layer].get_submodule(norm).register_forward_pre_hook(lambda _, i: seen.update(mid=i[0])),
        parent.model.layers[layer].get_submodule(norm).register_forward_pre_hook(lambda _, i: wanted.update(mid=i[0])),
        parent.model.layers[layer].register_forward_hook(lambda _, i, output: wanted.update(end=output)),
    ]
    student(input_ids=work.tokens, use_cache=False)
    parent(input_ids=work.tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    attends = part.startswith("self")
    stream, target = (seen["entered"], wanted["mid"]) if attends else (seen["mid"], wanted["end"])
    # 22 tokens behind one place of padding: eleven blocks are closed, block i ends at token 2 i.
    if layer < 3:
        read, stream, target = seen["read"][:, 1:11], stream[:, 1:11], target[:, 2:22:2]
    else:
        # Rows of prefix 0, prefix 1, one token, ten for each sequence; the first is said from the text's first token.
        read, stream = (x.unflatten(0, (48, 10))[:, 1:, 1:] for x in (seen["read"], stream))
        target = target[:, 2:20].unflatten(1, (9, 2))
    read, stream, target = (x[~work.held_out].flatten(0, -2).double() for x in (read, stream, target))
    before = start.model.layers[layer].get_submodule(part).weight.double()
    update = next(each for each in work.updates if (each.layer, each.projection) == (layer, part))
    expected = before
    if update.accepted:
        damping = (ridge * read.square().sum(0).mean()).sqrt() * torch.eye(read.shape[1], dtype=torch.float64)
        rows = torch.cat([target - stream - read @ before.T, torch.zeros(read.shape[1], 32, dtype=torch.float64)])
        expected = before + torch.linalg.lstsq(torch.cat([read, damping]), rows).solution.T
        assert update.error_ratio < 1
    found = student.model.layers[layer].get_submodule(part).weight.double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "cuts",
    [
        (PruneBlocks(layers=(1, 4)),),
        (PruneAttention(layers=(2,)), FuseFFN(runs=((1, 2),))),
        (PruneAttention(layers=(1, 4)), PruneFFN(layers=(5,))),
        (PruneKVHeads(layers=(0, 4), kv_heads=1),),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2])
def test_layers_that_were_cut_are_held_against_what_they_stand_for(tmp_path, cuts, length):
    parent = tiny_model("llama")
    start, work, student, changed = fitted(tmp_path, parent, (*cuts, Block(block_length=length, split=3)), ids(96))
    # The parent went through all of its layers.
    torch.testing.assert_close(work.p, states_in_front_of_the_norm(parent, work.tokens), atol=1e-5, rtol=1e-5)
    layers = {name for name in changed if ".layers." in name}
    assert any(int(name.split(".")[2]) < student.model.split for name in layers)
    fresh = ids(16, seed=9)
    found = away(parent, student, fresh, length)
    student.load_state_dict({name: start.state_dict()[name] for name in layers}, strict=False)
    assert found < away(parent, student, fresh, length)


def test_a_killed_run_takes_what_was_stored(tmp_path):
    parent, tokens = tiny_model("llama"), ids(32)
    *_, changed = fitted(tmp_path, parent, Block(block_length=2), tokens)
    *_, untouched, again = fitted(tmp_path, parent, Block(block_length=2), tokens)
    assert again == changed
    start, *_ = operate(parent, Block(block_length=2))
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), untouched.parameters(), strict=True))


def test_bad_input():
    parent = tiny_model("llama")
    with pytest.raises(SurgeryError, match=r"8 tokens hold fewer than the three blocks of 8 .*sequence_length to 17"):
        fitted(None, parent, Block(block_length=8), ids(8, 8))
    for steps, message in (
        ((Block(affine=False),), "this one has affine: false"),
        ((Block(decoder="summation"),), "this one has decoder summation"),
        ((ParallelBlocks(windows=((1, 2),)), Block(split=3)), "the layers 1 to 2 run side by side"),
    ):
        subject, _, _ = subject_of(parent)
        for step in steps:
            subject = subject.after(step.resolve(subject).plan(subject))
        with pytest.raises(SurgeryError, match=message):
            Refit().plan(subject)
