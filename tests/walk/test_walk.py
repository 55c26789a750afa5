"""The layer-major walk: every variant's stream equals the operated model, at the promised cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from conftest import ENCODER_NAMES, LAYERS, tiny_encoder, tiny_model
from operations.helpers import VARIANTS, logits, operate, some_tokens, subject_of, taken

from llmsurgeon.operations.fuse_ffn import FuseFFN
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN
from llmsurgeon.walk import streams as streams_module
from llmsurgeon.walk.memory import Room
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import Course, walk


def runner_of(model) -> LayerRunner:
    _, weights, config = subject_of(model)
    return LayerRunner(config, weights, model.dtype)


class CountingReads(Mapping):
    """Weights that remember how often each was read."""

    def __init__(self, weights):
        self.weights, self.reads = weights, Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.weights[name]

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


CUTS = [
    (Variant(), ()),
    (Variant(no_attention=frozenset({2})), (PruneAttention(layers=(2,)),)),
    (Variant(no_ffn=frozenset({5})), (PruneFFN(layers=(5,)),)),
    (
        Variant(no_attention=frozenset({1, 3}), no_ffn=frozenset({0})),
        (PruneAttention(layers=(1, 3)), PruneFFN(layers=(0,))),
    ),
    (Variant(no_attention=frozenset({4}), no_ffn=frozenset({4})), (PruneBlocks(layers=(4,)),)),
    (
        Variant(no_attention=frozenset({1, 2, 4, 5}), runs=((0, 1, 2), (4, 5))),
        (PruneAttention(layers=(1, 2, 4, 5)), FuseFFN(runs=((0, 1, 2), (4, 5)))),
    ),
    (Variant(no_attention=frozenset({3}), runs=((2, 3),)), (PruneAttention(layers=(3,)), FuseFFN(runs=((2, 3),)))),
]


@pytest.mark.parametrize(("family_name", "changes"), VARIANTS)
def test_every_variant_is_the_operated_model(family_name, changes):
    """Five sequences in batches of two, longer than the tiny families' sliding windows."""
    model, tokens = tiny_model(family_name, **changes), some_tokens(batch=5)
    runner = runner_of(model)
    cuts = [(variant, steps) for variant, steps in CUTS if taken(model, steps) == steps]
    streams = walk(runner, tokens, [variant for variant, _ in cuts], batch=2)
    assert streams.shape == (len(cuts), 5, 24, 32)
    for stream, (_, steps) in zip(streams, cuts, strict=True):
        student, _, _ = operate(model, *steps)
        with torch.no_grad():
            torch.testing.assert_close(runner.final(stream), logits(student, tokens), atol=1e-4, rtol=1e-4)


def test_the_first_variant_may_be_a_cut_itself():
    model, tokens = tiny_model("llama"), some_tokens(batch=3)
    runner = runner_of(model)
    base = Variant(no_attention=frozenset({2, 3}), runs=((1, 2, 3),))
    cuts = [
        ((2, 3), ((1, 2, 3),)),
        ((2, 3, 5), ((1, 2, 3), (4, 5))),
        ((2, 3, 4), ((1, 2, 3, 4),)),  # the same run goes on: it shares variant 0's stream up to layer 4
        ((2, 3, 4, 5), ((1, 2, 3, 4, 5),)),
        ((1, 2, 3), ((0, 1, 2, 3),)),
        ((2, 3), ((1, 2),)),  # the run ends earlier
    ]
    variants = [Variant(no_attention=frozenset(dropped), runs=runs) for dropped, runs in cuts]
    streams = walk(runner, tokens, [*variants, base], batch=2)
    with torch.no_grad():
        for stream, (dropped, runs) in zip(streams, cuts, strict=False):
            student, _, _ = operate(model, PruneAttention(layers=dropped), FuseFFN(runs=runs))
            torch.testing.assert_close(runner.final(stream), logits(student, tokens), atol=1e-4, rtol=1e-4)
    assert torch.equal(streams[-1], streams[0])


def test_each_weight_is_read_once_and_leaves_memory(family_name):
    _, weights, config = subject_of(tiny_model(family_name))
    counted = CountingReads(weights)
    runner = LayerRunner(config, counted, torch.float32)
    walk(runner, some_tokens(batch=5), [variant for variant, _ in CUTS], batch=2)
    assert set(counted.reads) == set(weights)
    assert set(counted.reads.values()) == {1}
    for layer in runner.layers:
        assert all(parameter.is_meta for parameter in layer.parameters())


def test_removing_each_block_in_turn_costs_half_a_square():
    """N evaluations for the parent, and for the variant without block i only those from i on: N(N+1)/2."""
    model, tokens = tiny_model("llama"), some_tokens(batch=3, length=7)
    done = []
    variants = [Variant(), *(Variant(frozenset({i}), frozenset({i})) for i in range(LAYERS))]
    walk(runner_of(model), tokens, variants, batch=2, course=Course(progress=done.append))
    assert sum(done) == (LAYERS + LAYERS * (LAYERS + 1) // 2) * tokens.numel()


def test_variants_may_run_on_fewer_sequences():
    model, tokens = tiny_model("llama"), some_tokens(batch=4)
    variants = [Variant(), Variant(no_attention=frozenset({1})), Variant(no_ffn=frozenset({2}))]
    whole = walk(runner_of(model), tokens, variants, batch=2)
    seen = Counter()
    few = walk(
        runner_of(model),
        tokens,
        variants,
        lambda layer, part, variant, mine, base: seen.update([variant]),
        batch=2,
        course=Course(rows=[4, 2, 4]),
    )
    assert torch.equal(few[0], whole[0]) and torch.equal(few[2], whole[2])
    assert torch.equal(few[1, :2], whole[1, :2])
    assert seen == {0: 2 * LAYERS, 1: 1 * (LAYERS - 1), 2: 2 * (LAYERS - 2)}


def test_variants_go_through_a_layer_together(family_name):
    """Weights are multiplied once for several variants; what each leaves is what it leaves alone."""
    runner, tokens = runner_of(tiny_model(family_name)), some_tokens(batch=6)
    variants = [variant for variant, _ in CUTS]
    sizes = []
    for part in ("attend", "feed_forward"):
        compute = getattr(runner, part)
        setattr(runner, part, lambda index, x, compute=compute: sizes.append(len(x)) or compute(index, x))
    alone = walk(runner, tokens, variants, batch=2)
    calls = len(sizes)
    together = walk(runner, tokens, variants, batch=8, course=Course(side_by_side=2))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert set(sizes[:calls]) == {2} and max(sizes[calls:]) == 8
    assert len(sizes) - calls < 0.7 * calls


def test_one_runner_takes_sequences_of_any_length():
    """How the model calls a layer is learnt anew for each length, also for sizes that were never embedded."""
    model = tiny_model("llama")
    runner, variants = runner_of(model), [variant for variant, _ in CUTS]
    walk(runner, some_tokens(batch=4), variants, batch=4, course=Course(side_by_side=1))
    short = some_tokens(batch=4, length=9)
    found = walk(runner, short, variants, batch=4, course=Course(side_by_side=1))
    torch.testing.assert_close(found, walk(runner_of(model), short, variants, batch=1), atol=1e-5, rtol=1e-5)


def test_large_streams_live_in_a_file(monkeypatch, tmp_path):
    model, tokens = tiny_model("llama"), some_tokens(batch=5)
    variants = [variant for variant, _ in CUTS]
    expected = walk(runner_of(model), tokens, variants, batch=2)
    monkeypatch.setattr(streams_module, "room", lambda: Room(1024, "a test"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = []
    real = streams_module.tempfile.NamedTemporaryFile
    monkeypatch.setattr(
        streams_module.tempfile, "NamedTemporaryFile", lambda *a, **k: made.append(real(*a, **k)) or made[-1]
    )
    found = walk(runner_of(model), tokens, variants, batch=2)
    assert torch.equal(found, expected)
    assert made and all(file.name.startswith(str(tmp_path)) for file in made)
    made.clear()
    assert not list(tmp_path.iterdir()), "temporary files stay behind"


def test_observed_parts_add_up(family_name):
    """What leaves a layer is what entered plus what attention and FFN added; the FFN reads what its family says."""
    runner = runner_of(tiny_model(family_name))
    variants = [Variant(), Variant(no_attention=frozenset({1})), Variant(no_ffn=frozenset({2}))]

    def check(layer, part, variant, mine, parent):
        assert (mine.attention is None) == (variant == 1 and layer == 1)
        assert (mine.ffn is None) == (variant == 2 and layer == 2)
        zero = torch.zeros_like(mine.entered)
        attention, ffn = (zero if x is None else x for x in (mine.attention, mine.ffn))
        torch.testing.assert_close(mine.left, mine.entered + attention + ffn)
        read = mine.entered if runner.parallel_residual else mine.entered + attention
        torch.testing.assert_close(mine.ffn_input, read)

    walk(runner, some_tokens(batch=3), variants, check, batch=2)


def test_whole_layers_of_a_converted_model_run_too(family_name):
    """The student's runner: fused, narrow and attention-free blocks, one at a time."""
    model, tokens = tiny_model(family_name), some_tokens(batch=2)
    steps = taken(model, (PruneAttention(layers=(2, 3)), FuseFFN(runs=((1, 2, 3),))))
    student, written, _ = operate(model, *steps)
    config = {**student.config.to_dict(), "model_type": written.config["model_type"]}
    runner = LayerRunner(config, dict(student.state_dict()), torch.float32)
    x = runner.embed(tokens)
    with torch.no_grad():
        for index in range(len(runner.layers)):
            with runner.loaded(index):
                x = runner.whole(index, x)
        torch.testing.assert_close(runner.final(x), logits(student, tokens), atol=1e-5, rtol=1e-5)


def test_first_difference():
    base = Variant()
    assert base.first_difference(base, 6) == 6
    assert Variant(no_attention=frozenset({3})).first_difference(base, 6) == 3
    assert Variant(no_ffn=frozenset({5, 2})).first_difference(base, 6) == 2
    assert Variant(no_attention=frozenset({3}), runs=((2, 3),)).first_difference(base, 6) == 3


@pytest.mark.parametrize("family_name", ENCODER_NAMES)
def test_padded_sequences_are_those_without_padding(family_name):
    model = tiny_encoder(family_name)
    padding, lengths = 3, (9, 16, 12, 5, 16)
    tokens = some_tokens(5, 16)
    tokens[tokens == padding] = 7
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = padding
    _, weights, config = subject_of(model)
    runner = LayerRunner(config, weights, torch.float32, padding=padding)
    found = walk(runner, tokens, [Variant()], batch=2)[0]
    alone = LayerRunner(config, weights, torch.float32)
    for row, sequence, length in zip(found, tokens, lengths, strict=True):
        assert not row[length:].any() and runner.real(row).sum() == length
        expected = walk(alone, sequence[None, :length], [Variant()])[0, 0]
        torch.testing.assert_close(row[:length], expected, atol=4e-5, rtol=1e-4)
