"""Parts and whole blocks that go, against the parent with those parts skipped."""

from __future__ import annotations

import pytest
import torch
from conftest import LAYERS, tiny_config, tiny_model
from operations.helpers import VARIANTS, cut_plan, declared, logits, naive, operate, skip, some_tokens, subject_of

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.operations.prune_attention import PruneAttention
from llmsurgeon.operations.prune_blocks import PruneBlocks
from llmsurgeon.operations.prune_ffn import PruneFFN


def no_attention(layer):
    return lambda x, parts: x + parts.ffn(layer, x)


def no_ffn(layer):
    return lambda x, parts: x + parts.attention(layer, x)


@pytest.mark.parametrize(("family_name", "changes"), VARIANTS)
def test_parts_go(family_name, changes):
    """Attention of 0 and 3, the FFN of 1, both of 4: a block with neither vanishes."""
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    pruned, written, spec = operate(model, PruneAttention(layers=(0, 3, 4)), PruneFFN(layers=(1, 4)))
    stages = {0: no_attention(0), 1: no_ffn(1), 3: no_attention(3), 4: skip}
    torch.testing.assert_close(logits(pruned, tokens), logits(naive(model, stages), tokens), atol=1e-4, rtol=1e-4)
    assert cut_plan(spec) == [(0,), (1,), (2,), (3,), (5,)]
    assert [layer.attention is None for layer in spec.layers] == [True, False, False, True, False]
    assert [layer.ffn is None for layer in spec.layers] == [False, True, False, False, False]
    assert written.format == "surgeon"
    assert len(pruned.get_submodule(declared(family_name, changes).layers)) == 5


@pytest.mark.parametrize(("family_name", "changes"), VARIANTS)
def test_blocks_go_and_the_format_stays_native(family_name, changes):
    model, tokens = tiny_model(family_name, **changes), some_tokens()
    pruned, written, spec = operate(model, PruneBlocks(layers=(1, 4)))
    torch.testing.assert_close(logits(pruned, tokens), logits(naive(model, {1: skip, 4: skip}), tokens))
    assert cut_plan(spec) == [(0,), (2,), (3,), (5,)]
    assert (written.format, written.code) == ("native", ())
    assert type(pruned).__name__ == declared(family_name, changes).model_class
    assert written.config["model_type"] == family_name
    assert "block_configs" not in written.config and "auto_map" not in written.config


@pytest.mark.parametrize("family_name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("gone", [(0, 1), (1, 4), (4, 5), (3, 4, 5), (0, 1, 2)], ids=str)
def test_sliding_windows_are_cut_along(family_name, gone):
    """Longer than the window, so a layer with the wrong mask would show; also for readers of max_window_layers."""
    model = tiny_model(family_name, use_sliding_window=True, sliding_window=5, max_window_layers=3)
    tokens = some_tokens(length=20)
    for format in ("native", "surgeon"):
        pruned, written, _ = operate(model, PruneBlocks(layers=gone), format=format)
        expected = logits(naive(model, dict.fromkeys(gone, skip)), tokens)
        torch.testing.assert_close(logits(pruned, tokens), expected, atol=1e-5, rtol=1e-5)
        types = [kind for i, kind in enumerate(model.config.layer_types) if i not in gone]
        assert written.config["layer_types"] == types
        assert written.config["max_window_layers"] == types.count("full_attention")


@pytest.mark.parametrize(
    ("family_name", "changes", "rule"),
    [
        ("gemma2", {"layer_types": None}, "layer_types"),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 3}, "sliding_window_pattern"),
        # Longer than the model, as its config allows.
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0, 0, 1, 1]}, "no_rope_layer_interval"),
    ],
)
@pytest.mark.parametrize("format", ["native", "surgeon"])
def test_lists_of_one_entry_a_layer_are_cut_along(family_name, changes, rule, format):
    """Alternating windows with a rotary base each, rotary positions in some layers only."""
    model, tokens = tiny_model(family_name, **changes), some_tokens(length=20)
    pruned, written, spec = operate(model, PruneBlocks(layers=(1, 2)), format=format)
    torch.testing.assert_close(logits(pruned, tokens), logits(naive(model, {1: skip, 2: skip}), tokens))
    for key in declared(family_name).per_layer_lists:
        assert written.config[key] == [getattr(model.config, key)[i] for i in (0, 3, 4, 5)]
    assert rule == "layer_types" or rule not in written.config, "a reader would make the list of a whole model from it"
    kept = subject_of(model)[0].spec.layers
    assert [layer.attention for layer in spec.layers] == [kept[i].attention for i in (0, 3, 4, 5)]


def test_a_list_that_is_too_short_is_refused_before_anything_is_written():
    config = {**normalised(tiny_config("smollm3")), "no_rope_layers": [1] * 5}
    with pytest.raises(SurgeryError, match="no_rope_layers has 5 entries, num_hidden_layers says 6"):
        declared("smollm3").describe(config)


def test_layers_keep_the_parents_numbers():
    subject, _, _ = subject_of(tiny_model("llama"))
    after = subject.after(PruneBlocks(layers=(1, 2)).plan(subject))
    assert [after.position(layer) for layer in (0, 3, 4, 5)] == [0, 1, 2, 3]
    with pytest.raises(SurgeryError, match="layer 2 is not in the model: it has layers 0, 3, 4, 5;"):
        PruneAttention(layers=(2,)).plan(after)
    last = after.after(PruneBlocks(layers=(5,)).plan(after))
    assert [block.parents for block in last.spec.layers] == [(0,), (3,), (4,)]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (PruneAttention(layers=(6,)), "prune_attention: layer 6 is not in the model: it has layers 0 to 5"),
        (PruneFFN(layers=(99,)), "prune_ffn: layer 99 is not in the model"),
        (PruneBlocks(layers=(6,)), "prune_blocks: layer 6 is not in the model"),
        (PruneAttention(layers=tuple(range(6))), "no attention would be left"),
        (PruneBlocks(layers=tuple(range(6))), "no attention would be left"),
        (PruneBlocks(count=2), "needs the score 'block_influence'"),
        (PruneBlocks(window=2), "needs the score 'angular_distance'"),
        (PruneAttention(count=2), "needs the score 'attention_order'"),
    ],
    ids=str,
)
def test_steps_that_do_not_fit(step, message):
    subject, _, _ = subject_of(tiny_model("llama"))
    with pytest.raises(SurgeryError, match=message):
        step.resolve(subject).plan(subject)


def test_what_is_gone_cannot_go_again():
    subject, _, _ = subject_of(tiny_model("llama"))
    subject = subject.after(PruneAttention(layers=(3,)).plan(subject))
    with pytest.raises(SurgeryError, match="layer 3 has no attention to drop"):
        PruneAttention(layers=(3,)).plan(subject)


@pytest.mark.parametrize("given", [{}, {"layers": (1,), "count": 2}])
@pytest.mark.parametrize("step", [PruneAttention, PruneFFN, PruneBlocks])
def test_exactly_one_way_of_choosing(step, given):
    with pytest.raises(ValueError, match="takes exactly one of layers, count"):
        step(**given)


LOW = [5.0, 1.0, 4.0, 0.5, 3.0, 2.0]


def scored(**scores):
    return subject_of(tiny_model("llama"), scores)[0]


def test_counts_take_the_layers_that_matter_least():
    assert PruneAttention(count=2, score="kl").resolve(scored(attention_kl=LOW)).layers == (1, 3)
    # A high similarity means that the part changes little.
    assert PruneAttention(count=2, score="similarity").resolve(scored(attention_similarity=LOW)).layers == (0, 2)
    assert PruneFFN(count=2, score="kl").resolve(scored(ffn_kl=LOW)).layers == (1, 3)
    assert PruneBlocks(count=3).resolve(scored(block_influence=LOW)).layers == (1, 3, 5)
    assert PruneBlocks(count=1, score="kl").resolve(scored(block_kl=LOW)).layers == (3,)
    assert PruneAttention(count=2).resolve(scored(attention_order=[4, 1, 3])).layers == (1, 4)


def test_counts_pass_over_layers_that_have_lost_the_part():
    subject = scored(attention_kl=LOW)
    subject = subject.after(PruneAttention(layers=(3,)).plan(subject))
    assert PruneAttention(count=2, score="kl").resolve(subject).layers == (1, 5)


def test_more_than_there_are():
    with pytest.raises(SurgeryError, match="count 7 asked for, only 6 layers qualify"):
        PruneAttention(count=7, score="kl").resolve(scored(attention_kl=LOW))
    with pytest.raises(SurgeryError, match="3 attentions asked for, only 2 can go"):
        PruneAttention(count=3).resolve(scored(attention_order=[4, 1]))


def test_the_window_of_least_angular_distance():
    distances = torch.full((LAYERS, LAYERS), float("nan"))
    for size in range(1, LAYERS + 1):
        for start in range(LAYERS - size + 1):
            distances[size - 1, start] = 0.1 if (size, start) == (2, 3) else 0.5
    assert PruneBlocks(window=2).resolve(scored(angular_distance=distances)).layers == (3, 4)
    assert PruneBlocks(window=3).resolve(scored(angular_distance=distances)).layers == (0, 1, 2)
    with pytest.raises(SurgeryError, match="window 7 is longer than the model"):
        PruneBlocks(window=7).resolve(scored(angular_distance=distances))
