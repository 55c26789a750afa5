"""Block transformers compute what they are said to: against hand-built references, cached and not, batched and not."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from conftest import tiny_model
from generation import generate, in_pieces
from operations.helpers import logits, operate
from torch.nn import functional as F
from transformers import DynamicCache

from llmsurgeon.formats.caches import cached_call
from llmsurgeon.modeling.surgeon_versions import OUTPUT_CACHE
from llmsurgeon.operations.block import Block
from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention

FAMILIES = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}, "qwen3": {}}
# Each value of each setting at least twice, not every combination.
SHAPES = (
    (1, "projected", "prefix", 2),
    (2, "concat", "prefix", 1),
    (2, "projected", "cross_attention", 1),
    (4, "projected", "prefix", 2),
    (4, "concat", "summation", 1),
    (4, "concat", "cross_attention", 2),
    (8, "projected", "summation", 2),
)
CLOSE = 2e-5


@cache
def parent_of(family="llama"):
    return tiny_model(family, **FAMILIES[family])


@cache
def made(length=4, embedder="projected", decoder="prefix", prefix=2, family="llama", split=3, start=False, affine=True):
    """A block model; its new weights are random, unless it is to be as it starts."""
    shape = dict(block_length=length, embedder=embedder, decoder=decoder, prefix_length=prefix, split=split)
    step = Block(**shape, affine=affine)
    model, *_ = operate(parent_of(family), step)
    if not start:
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.split(".")[1] in ("context_expansion", "block_embedder", "token_projection"):
                    parameter.copy_(torch.randn_like(parameter) * 0.6 / parameter.shape[-1] ** 0.5)
                elif "cross_attn" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(batch=2, length=24, seed=1):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal(count):
    return torch.full((count, count), float("-inf")).triu(1)[None, None]


def through(model, layers, x, mask):
    """Layers on x [1, T, D] at positions 0 .. T - 1."""
    positions = torch.arange(x.shape[1])[None]
    rotary = model.model.rotary_emb(x, position_ids=positions)
    for layer in layers:
        x = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    return x


def cross(layer, x, context):
    """Cross-attention, head by head and query by query."""
    attention = layer.cross_attn
    d = attention.head_dim
    query, keys = layer.cross_attn_layernorm(x)[0], layer.cross_attn_layernorm(context)[0]
    q, k, v = attention.q_proj(query), attention.k_proj(keys), attention.v_proj(keys)
    rows = []
    for t in range(len(query)):
        heads = []
        for h in range(q.shape[1] // d):
            g = h // attention.num_key_value_groups
            mine, theirs = q[t, h * d : (h + 1) * d], k[:, g * d : (g + 1) * d]
            if hasattr(attention, "q_norm"):
                mine, theirs = attention.q_norm(mine), attention.k_norm(theirs)
            weights = (theirs @ mine * d**-0.5).softmax(0)
            heads.append(weights @ v[:, g * d : (g + 1) * d])
        rows.append(torch.cat(heads))
    return attention.o_proj(torch.stack(rows))[None]


@torch.no_grad()
def slow(model, ids, padding):
    """Logits [T, V] of one row, a token at a time: the block decoder over all, the token decoder from scratch."""
    halves, body = model.config.block_transformer, model.model
    length, split, decoder = halves["block_length"], halves["split"], halves["decoder"]
    found = []
    for t in range(len(ids)):
        columns = [None] * padding + ids[: t + 1].tolist()
        full, rest = divmod(len(columns), length)
        if not full:
            found.append(torch.zeros(model.config.vocab_size))
            continue
        embedded = []
        for block in range(full):
            table = body.block_embedder.embed_tokens.weight
            rows = [torch.zeros(table.shape[1]) if c is None else table[c] for c in columns[block * length :][:length]]
            embedded.append(body.block_embedder.projection(torch.cat(rows)))
        context = through(model, body.layers[:split], torch.stack(embedded)[None], causal(full))[:, -1]
        expanded = body.context_expansion(context).view(1, -1, context.shape[-1])
        mine = torch.tensor(columns[full * length :], dtype=torch.long)
        if decoder == "prefix":
            x = torch.cat([expanded, body.token_projection(body.embed_tokens(mine))[None]], 1)
        else:
            read = torch.tensor([columns[full * length - 1], *mine.tolist()])
            x = body.token_projection(body.embed_tokens(read))[None]
        x = x + expanded[:, : rest + 1] if decoder == "summation" else x
        mask = causal(x.shape[1])
        for layer in body.layers[split:]:
            if decoder == "cross_attention":
                plain = copy.copy(layer)
                attended = x + plain.attend(x, **call(model, x, mask))
                attended = attended + cross(layer, attended, expanded)
                x = attended + plain.feed_forward(attended)
            else:
                x = layer(x, **call(model, x, mask))
        found.append(model.lm_head(body.norm(x))[0, -1])
    return torch.stack(found)


def call(model, x, mask):
    positions = torch.arange(x.shape[1])[None]
    rotary = model.model.rotary_emb(x, position_ids=positions)
    return dict(attention_mask=mask, position_embeddings=rotary, position_ids=positions)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_forward_is_the_slow_obvious_one(shape):
    model, ids = made(*shape), text(1, 21)
    for padding in {0, shape[0] // 2, shape[0] - 1}:
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False, block_padding=padding).logits[0]
        torch.testing.assert_close(found, slow(model, ids[0], padding), atol=CLOSE, rtol=0)
    assert torch.equal(found if padding == shape[0] - 1 else logits(model, ids)[0], logits(model, ids)[0])


def test_the_paper_s_form():
    """Without biases and without a map of the token decoder's embeddings."""
    model, ids = made(4, affine=False), text(1, 13)
    assert model.model.context_expansion.bias is None and not list(model.model.token_projection.parameters())
    torch.testing.assert_close(logits(model, ids)[0], slow(model, ids[0], 3), atol=CLOSE, rtol=0)
    started, plain = made(4, start=True), made(4, start=True, affine=False)
    torch.testing.assert_close(logits(started, ids), logits(plain, ids), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    for shape in ((4, "projected", "prefix", 2), (2, "concat", "cross_attention", 2)):
        model, ids = made(*shape, family=family), text(1, 13)
        torch.testing.assert_close(logits(model, ids)[0], slow(model, ids[0], shape[0] - 1), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_one_token_that_never_split_are_the_parent(family, prefix):
    """L = 1, all layers over blocks: the parent. L = 1, none: the parent on each token alone."""
    parent, ids = parent_of(family), text()
    model = made(1, prefix=prefix, family=family, split=6, start=True)
    torch.testing.assert_close(logits(model, ids), logits(parent, ids), atol=CLOSE, rtol=0)
    model = made(1, prefix=prefix, family=family, split=0, start=True)
    alone = logits(parent, ids.reshape(-1, 1)).view(*ids.shape, -1)
    torch.testing.assert_close(logits(model, ids), alone, atol=CLOSE, rtol=0)
    assert not torch.allclose(alone, logits(parent, ids), atol=0.1)


def test_blocks_of_one_token_split_in_the_middle():
    """The parent, its upper layers seeing one token each."""
    parent, ids = parent_of(), text(1)
    model = made(1, prefix=1, split=4, start=True)
    with torch.no_grad():
        x = through(parent, parent.model.layers[:4], parent.model.embed_tokens(ids), causal(ids.shape[1]))
        x = through(parent, parent.model.layers[4:], x.transpose(0, 1), causal(1))
        expected = parent.lm_head(parent.model.norm(x)).transpose(0, 1)
    torch.testing.assert_close(logits(model, ids), expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("split", [0, 6])
def test_one_of_the_decoders_may_be_empty(split):
    for length in (2, 4):
        model, ids = made(length, split=split), text(1, 14)
        torch.testing.assert_close(logits(model, ids)[0], slow(model, ids[0], length - 1), atol=CLOSE, rtol=0)
        out = generate(model, ids[:, :9], max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(out, greedily(model, ids[0, :9], 6)[None])


@torch.no_grad()
def greedily(model, prompt, count):
    """Token by token from the full forward, the prompt ending where a block ends."""
    padding = -len(prompt) % model.config.block_transformer["block_length"]
    for _ in range(count):
        scores = model(input_ids=prompt[None], use_cache=False, block_padding=padding).logits[0, -1]
        scores[2] = float("-inf")
        prompt = torch.cat([prompt, scores.argmax()[None]])
    return prompt


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_through_the_cache_are_the_whole(shape):
    model, ids = made(*shape), text(2, 30)
    whole = logits(model, ids)
    for sizes in ((1,) * 30, (11, 1, 1, 1, 5, 1, 1, 9), (3, 8, 16, 3), (30,)):
        pieces, cache = [], None
        for part in ids.split(sizes, 1):
            with torch.no_grad():
                out, cache = cached_call(model, cache, input_ids=part)
            pieces.append(out.logits)
            held = [layer.get_seq_length() for layer in cache.layers]
            assert cache.get_seq_length() == sum(piece.shape[1] for piece in pieces)
            assert set(held[:3]) == {(cache.get_seq_length() + shape[0] - 1) // shape[0]}
            assert max(held[3:]) <= (shape[3] if shape[2] == "prefix" else 1) + shape[0] - 1
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generation_with_and_without_cache_and_in_batches(shape):
    """A batch of unequal prompts, padded on the left, is each prompt alone, which is the full forward by tokens."""
    model, ids = made(*shape), text(3, 13)
    lengths, settings = (13, 10, 6), dict(max_new_tokens=11, min_new_tokens=11)
    mask = torch.stack([torch.arange(13) >= 13 - n for n in lengths]).long()
    batch = generate(model, ids * mask, attention_mask=mask, **settings)
    assert batch.shape == (3, 24)
    for row, n in enumerate(lengths):
        expected = greedily(model, ids[row, -n:], 11)
        assert torch.equal(batch[row, -n - 11 :], expected)
        assert torch.equal(generate(model, ids[row : row + 1, -n:], **settings)[0], expected)


def test_padding_changes_nothing():
    """Neither what lies under the mask, nor whole blocks of it, nor the other rows of the batch."""
    model, ids = made(4), text(1, 18)
    for padding in range(4):
        with torch.no_grad():
            alone = model(input_ids=ids, use_cache=False, block_padding=padding).logits
            for columns in (4, 8):
                for filler in (0, 7):
                    wide = F.pad(ids, (columns, 0), value=filler)
                    mask = F.pad(torch.ones_like(ids), (columns, 0))
                    both = torch.cat([wide, text(1, wide.shape[1], seed=5)])
                    masks = torch.cat([mask, torch.ones_like(mask)])
                    found = model(input_ids=both, attention_mask=masks, use_cache=False, block_padding=padding).logits
                    torch.testing.assert_close(found[:1, columns:], alone, atol=CLOSE, rtol=0)
                    assert found.isfinite().all() and not found[0, : columns - 1].any()
            # So many places of padding are block_padding by another name.
            masked = model(
                input_ids=F.pad(ids, (padding, 0)),
                attention_mask=F.pad(torch.ones_like(ids), (padding, 0)),
                block_padding=0,
            ).logits
            torch.testing.assert_close(masked[:, padding:], alone, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_never_changes_what_was_said_before_it(shape):
    model, ids = made(*shape), text(1, 18)
    before = logits(model, ids)
    for t in range(ids.shape[1]):
        other = ids.clone()
        other[0, t] = 3 + (other[0, t] - 2) % 61
        after = logits(model, other)
        assert torch.equal(after[:, :t], before[:, :t])
        changed = (after[:, t:] - before[:, t:]).abs().amax(-1)[0] > 1e-6
        assert changed.all(), "every later token sees it"


def test_the_loss_leaves_out_what_nothing_predicts():
    model, ids = made(4), text(2, 19)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for padding in (0, 1, 3):
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, labels=ids, block_padding=padding, use_cache=False)
        losses = []
        for row, start in ((0, 0), (1, 6)):
            first = (start + padding) // 4 + 1
            for t in range(1, 19):
                if (t + padding) // 4 >= first and (row == 0 or t > start):
                    losses.append(F.cross_entropy(out.logits[row, t - 1], ids[row, t]))
        assert out.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    # By default all tokens but the first have a loss, as in the parent.
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_logits_to_keep_and_prefill():
    model, ids = made(4), text(2, 23)
    whole = logits(model, ids)
    with torch.no_grad():
        for keep in (1, 2, 5, 22):
            found = model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits
            torch.testing.assert_close(found, whole[:, -keep:], atol=CLOSE, rtol=0)
    # A prompt is read by the block decoder: the token decoder sees the last block's prefix and nothing else.
    seen = []
    handle = model.model.layers[3].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    generate(model, ids, max_new_tokens=1)
    handle.remove()
    assert seen == [(2, 2, 32)] * 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    model, ids = made(4), text(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    settings = dict(attention_mask=mask, max_new_tokens=6)
    assert torch.equal(generate(other, ids, **settings), generate(model, ids, **settings))


def test_stop_tokens_end_rows_inside_a_block():
    model, prompt = made(4), text(1, 8)
    free = generate(model, prompt, max_new_tokens=12, min_new_tokens=12)[0]
    for place in (9, 10, 13):
        stop = int(free[place])
        first = int((free[8:] == stop).nonzero()[0]) + 8
        out = generate(model, prompt, max_new_tokens=12, eos_token_id=[stop])
        end = min(first, 8 + int((free[8:] == 2).nonzero()[0]) if (free[8:] == 2).any() else first)
        assert torch.equal(out[0], free[: end + 1])
    # The other row goes on, and is what it is alone.
    pair = torch.cat([prompt, text(1, 8, seed=9)])
    stop = int(free[9])
    settings = dict(max_new_tokens=10, eos_token_id=[stop])
    both, alone = generate(model, pair, **settings), generate(model, pair[1:], **settings)
    assert torch.equal(both[1, : alone.shape[1]], alone[0]) and not both[1, alone.shape[1] :].any()


def test_sampling_and_beams():
    model, prompt = made(4), text(2, 7)
    common = dict(max_new_tokens=9, min_new_tokens=9)
    settings = dict(do_sample=True, temperature=0.8, top_k=9, top_p=0.9, repetition_penalty=1.2)
    assert generate(model, prompt, **settings, **common).shape == (2, 16)
    generate(model, prompt, num_beams=3, **common)
    several = generate(model, prompt, num_return_sequences=2, do_sample=True, top_k=5, **common)
    assert several.shape == (4, 16)


def test_a_cache_can_be_gone_on_from():
    model, ids = made(4), text(1, 16)
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    first = model.generate(ids[:, :10], return_dict_in_generate=True, **settings)
    more = model.generate(first.sequences, **{OUTPUT_CACHE: first[OUTPUT_CACHE]}, **settings)
    assert torch.equal(more, generate(model, ids[:, :10], max_new_tokens=10, min_new_tokens=10))


def test_earlier_cuts_stay():
    """Layers without attention and fused ones work in either half."""
    steps = (PruneAttention(layers=(1, 4)), FuseFFN(runs=((0, 1),)), Block(block_length=2, split=2))
    model, _, spec = operate(parent_of(), *steps)
    assert spec.block_transformer.split == 1 and [len(b.attentions) for b in spec.layers] == [1, 1, 1, 0, 1]
    ids = text(1, 15)
    whole = logits(model, ids)
    pieces, cache = in_pieces(model, ids, tuple(range(6, 15)))
    torch.testing.assert_close(pieces, whole, atol=CLOSE, rtol=0)
    assert [layer.get_seq_length() for layer in cache.layers] == [8, 2, 2, 2]


def test_all_weights_get_gradients():
    for shape in SHAPES:
        model = copy.deepcopy(made(*shape)).train()
        ids = torch.arange(64).view(2, 32)
        model(input_ids=ids, labels=ids).loss.backward()
        idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # Blocks of one token behind a prefix: the token decoder reads no token.
        tokens = ["embed_tokens.weight", "token_projection.weight", "token_projection.bias"]
        assert idle == ([f"model.{name}" for name in tokens] if shape[0] == 1 else [])
        plain = {n: p.grad.clone() for n, p in model.named_parameters() if n not in idle}
        model.zero_grad()
        # The name is new in transformers 5; the older one warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        for name, gradient in plain.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_asked():
    model, ids = made(4), text(1, 8)
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="leave position_ids out"):
        model(input_ids=ids, position_ids=torch.arange(8)[None])
    with pytest.raises(ValueError, match="block_padding 4: expected 0 to 3"):
        model(input_ids=ids, block_padding=4)
    with pytest.raises(ValueError, match="129 tokens: this model was made for at most 128"):
        model(input_ids=text(1, 129))
    with pytest.raises(ValueError, match=r"makes a cache of its own.*DynamicCache"):
        model(input_ids=ids, **{OUTPUT_CACHE: DynamicCache()})
    with pytest.raises(TypeError, match="Model was handed two caches, 'cache' and 'past_key_values'"):
        model(input_ids=ids, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="does not understand: 'memory'"):
        model(input_ids=ids, memory=DynamicCache())
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"sequences of differing length: no {name}"):
            model(input_ids=ids, **{name: True})
    model(input_ids=ids, output_hidden_states=False, memory=None)
    _, cache = cached_call(model, input_ids=ids)
    with pytest.raises(NotImplementedError, match="cannot go back"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    for name in ("cache", "past_key_values"):
        cache.reset()
        torch.testing.assert_close(model(input_ids=ids, **{name: cache}).logits, logits(model, ids))
        assert cache.get_seq_length() == 8
