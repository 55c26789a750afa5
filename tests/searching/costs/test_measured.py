"""Seconds of layers: which models are timed, what follows from their times, and what is kept. No test reads a clock."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
from conftest import save_encoder, save_tiny
from gguf_models import save_uneven, save_uniform

from llmsurgeon.engines.llamacpp import LlamaCppKind
from llmsurgeon.engines.transformers import TransformersKind
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.speed import Speedup
from llmsurgeon.planning.opened import open_model
from llmsurgeon.searching.costs import Engine, Shapes, meters, parse_targets
from llmsurgeon.searching.costs.columns import REST, ROWS, Columns
from llmsurgeon.searching.costs.design import base_of, design
from llmsurgeon.searching.costs.fit import fit
from llmsurgeon.searching.costs.timed import MOST_ROUNDS
from llmsurgeon.searching.costs.timing import FEWEST_ROUNDS, Ratio, time_in_turn


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parent(tmp_path):
    return open_model(str(save_tiny(tmp_path / "parent", "llama")))


def seconds_of(spec):
    """What a model takes in the engine of these tests: linear in widths, heads, rows, and something for being there."""
    layers = sum(
        (2 + 0.5 * a.heads + 0.25 * a.kv_heads if (a := layer.attention) else 0)
        + (1 + 0.05 * layer.ffn.width if layer.ffn else 0)
        for layer in spec.layers
    )
    return 1e-3 * (3 + 0.02 * spec.vocab + layers)


def fake_clock(monkeypatch, kind=TransformersKind, noise=0.0, slow=False):
    """Engines whose models take `seconds_of`, times a noise; returns what was timed."""
    timed, generator = [], random.Random(0)

    @contextmanager
    def of(self, model, setting, steps):
        timed.append(model.spec)
        # The machine's speed changes from round to round.
        yield lambda: seconds_of(model.spec) * (1 + noise * generator.gauss(0, 1))

    monkeypatch.setattr(kind, "timed", of)
    return timed


def decode_of(parent, engine="transformers", target="decode=1.5x"):
    (found,) = meters(parse_targets([target]), Engine.parse(engine), parent)
    return found


def options_of(layer):
    attention, ffn = layer.attention, layer.ffn
    attentions = [attention, replace(attention, kv_heads=1), replace(attention, heads=2, kv_heads=1), None]
    widths = [ffn.width, 80, 64, 48, 32, None]
    return [
        replace(layer, attention=a, ffn=None if width is None else replace(ffn, width=width))
        for a in attentions
        for width in widths
    ]


def test_times_of_layers_follow_from_times_of_models(parent, monkeypatch):
    timed = fake_clock(monkeypatch)
    meter = decode_of(parent)
    spec, layers = meter.parent, options_of(meter.parent.layers[0])
    assert meter.preparation(layers).startswith("6 models of random weights to be timed for decode, about ")
    meter.prepare(layers)
    assert len(set(timed)) == 7  # the base, too
    assert meter.preparation(layers) == ""
    assert meter.parent_total == pytest.approx(seconds_of(spec), rel=1e-3)
    for layer in layers:
        one = seconds_of(spec.with_layers([layer])) - seconds_of(spec.with_layers([]))
        assert meter.layer(layer) == pytest.approx(one, rel=5e-3, abs=1e-5), layer
    mixed = spec.with_layers(random.Random(1).choices(layers, k=6))
    assert meter.total(mixed) == pytest.approx(seconds_of(mixed), rel=5e-3)
    assert meter.budget() == pytest.approx(seconds_of(spec) / 1.5, rel=1e-3)
    assert meter.ratio(meter.budget()) == pytest.approx(1.5)
    assert meter.layer(replace(layers[0], attention=None, ffn=None)) == 0


def test_a_vocabulary_has_a_time_of_its_own(parent, monkeypatch):
    fake_clock(monkeypatch)
    meter = decode_of(parent)
    small = [replace(meter.parent, vocab=rows) for rows in (48, 32)]
    meter.prepare((), small)
    for spec in small:
        assert meter.total(spec) == pytest.approx(seconds_of(spec), rel=1e-3)


def test_noise_is_told(parent, monkeypatch):
    fake_clock(monkeypatch, noise=0.02)
    meter = decode_of(parent)
    layers = options_of(meter.parent.layers[0])
    meter.prepare(layers)
    assert all(FEWEST_ROUNDS <= ratio.rounds <= MOST_ROUNDS["decode"] for ratio in meter.timings.known.values())
    mixed = meter.parent.with_layers(random.Random(1).choices(layers, k=6))
    assert 0 < meter.half(mixed) < 0.1 * meter.total(mixed)
    assert abs(meter.total(mixed) - seconds_of(mixed)) < 2 * meter.half(mixed) + 0.02 * seconds_of(mixed)


def test_a_model_that_was_timed_costs_what_it_took(parent, monkeypatch):
    """Parts know nothing of what a model of many shapes loses by that: the model itself does, and its like follow."""
    plain, layers = seconds_of, options_of(parent.spec.layers[0])

    def more_by_shapes(spec):
        shapes = {replace(layer, parents=()) for layer in spec.layers}
        return plain(spec) * (1 + 0.02 * max(0, len(shapes) - 2))

    monkeypatch.setitem(globals(), "seconds_of", more_by_shapes)
    timed = fake_clock(monkeypatch)
    meter = decode_of(parent)
    meter.prepare(layers)
    mixed = meter.parent.with_layers(random.Random(1).choices(layers, k=6))
    alike = meter.parent.with_layers(random.Random(2).sample(mixed.layers, k=6))
    before = [abs(meter.total(spec) / more_by_shapes(spec) - 1) for spec in (mixed, alike)]
    timed.clear()
    meter.learn(mixed)
    after = [abs(meter.total(spec) / more_by_shapes(spec) - 1) for spec in (mixed, alike)]
    assert len(set(timed)) == 2 and min(before) > 0.03  # the base, too
    assert max(after) < 3e-3
    again = decode_of(parent)
    again.prepare(layers)
    again.learn(mixed)
    assert len(set(timed)) == 2 and again.total(mixed) == pytest.approx(meter.total(mixed))


def test_where_an_engine_runs_no_uneven_model_sums_are_measured_and_the_prior_splits(tmp_path, monkeypatch):
    timed = fake_clock(monkeypatch, LlamaCppKind)
    meter = decode_of(open_model(str(save_uniform(tmp_path / "parent", "qwen3"))), "llama.cpp:q8_0")
    spec = meter.parent
    layer = spec.layers[0]
    narrow = replace(layer, ffn=replace(layer.ffn, width=32))
    meter.prepare([narrow])
    assert all(len(set(map(str, (replace(each, parents=()) for each in spec.layers)))) == 1 for spec in timed)
    for uniform in (spec, spec.with_layers([narrow] * 6), spec.with_layers(spec.layers[:4])):
        assert meter.total(uniform) == pytest.approx(seconds_of(uniform), rel=2e-2)


def test_what_was_timed_is_kept_and_believed_only_whole(parent, monkeypatch, tmp_path):
    timed = fake_clock(monkeypatch, noise=0.01)
    layers = options_of(parent.spec.layers[0])
    first = decode_of(parent)
    first.prepare(layers)
    files = sorted((tmp_path / "cache" / "costs").glob("*.json"))
    assert len(files) == 6
    timed.clear()
    again = decode_of(parent)
    again.prepare(layers)
    assert timed == []
    assert again.total(parent.spec) == first.total(parent.spec)
    # What the engine computes in counts, not how it was asked for that: the checkpoint's dtype, which is float32 here.
    assert decode_of(parent, "transformers:f32").timings.missing(list(first.timings.known)) == []
    # Another engine's setting, another quantity and another shape are something else.
    for other in (decode_of(parent, "transformers:bf16"), decode_of(parent, target="prefill=1.2x")):
        assert len(other.timings.missing(list(first.timings.known))) == 6
    files[0].write_text(files[0].read_text().replace("0", "1"))
    files[1].write_bytes(b"")
    files[2].unlink()
    third = decode_of(parent)
    third.prepare(layers)
    assert len(set(timed)) == 4
    assert len(list((tmp_path / "cache" / "costs").glob("*.json"))) == 6


def test_what_was_timed_in_a_hurry_is_timed_anew_where_there_is_time(parent, monkeypatch):
    timed = fake_clock(monkeypatch, noise=0.1)
    layers = options_of(parent.spec.layers[0])

    def rounds(hurried):
        meter = decode_of(parent)
        if hurried:
            meter.hurry(0.0)
        meter.prepare(layers)
        return {ratio.rounds for ratio in meter.timings.known.values()}

    assert rounds(hurried=True) == {FEWEST_ROUNDS}
    timed.clear()
    assert rounds(hurried=True) == {FEWEST_ROUNDS} and timed == []
    assert rounds(hurried=False) == {80} and timed
    timed.clear()
    assert rounds(hurried=True) == {80} and timed == []


def test_a_cache_that_cannot_be_written_costs_time_alone(parent, monkeypatch, tmp_path):
    fake_clock(monkeypatch)
    (tmp_path / "cache").write_text("in the way")
    assert decode_of(parent).parent_total == pytest.approx(seconds_of(parent.spec), rel=1e-3)


def test_an_option_more_is_timed_alone(parent, monkeypatch):
    timed = fake_clock(monkeypatch)
    meter = decode_of(parent)
    meter.prepare(options_of(meter.parent.layers[0]))
    timed.clear()
    layer = meter.parent.layers[0]
    wide = replace(layer, attention=None, ffn=replace(layer.ffn, width=4 * layer.ffn.width))
    one = seconds_of(meter.parent.with_layers([wide])) - seconds_of(meter.parent.with_layers([]))
    assert meter.layer(wide) == pytest.approx(one, rel=1e-2)
    assert 2 <= len(timed) <= 3


def test_a_bench_scales_to_the_predicted_parent(parent, monkeypatch, tmp_path):
    fake_clock(monkeypatch)
    meter = decode_of(parent)
    monkeypatch.setattr(type(meter), "speedup", lambda self, path, parent: Speedup.of([1.4, 1.6, 1.5]))
    assert meter.measured(tmp_path, tmp_path) == pytest.approx(meter.parent_total / 1.5)
    assert meter.say(meter.parent_total / 1.5).startswith("1.5x decode (")
    assert "ms a step" in meter.say(meter.parent_total)


def test_absolute_speeds(parent, monkeypatch):
    fake_clock(monkeypatch)
    rate = 1 / seconds_of(parent.spec)
    assert decode_of(parent, target=f"decode={2 * rate:.3f}tok/s").budget() == pytest.approx(0.5 / rate, rel=1e-3)
    with pytest.raises(SurgeryError, match="the model is there already, at 1x decode"):
        decode_of(parent, target=f"decode={0.5 * rate:.3f}tok/s").budget()


def test_an_encoder_decodes_nothing(tmp_path, monkeypatch):
    fake_clock(monkeypatch)
    encoder = open_model(str(save_encoder(tmp_path / "bert", "bert")))
    with pytest.raises(SurgeryError, match=r"target decode=1\.5x: an encoder decodes nothing; ask for prefill"):
        decode_of(encoder)
    meter = decode_of(encoder, target="prefill=1.5x")
    assert meter.parent_total == pytest.approx(seconds_of(encoder.spec), rel=1e-3)


def test_columns_mix_knots(parent):
    layers = options_of(parent.spec.layers[0])
    columns = Columns.of(layers, parent.spec)
    ffn = parent.spec.layers[0].ffn
    assert [each.width for each in columns.ffns] == [32, 64, 96]
    fused = [replace(layers[0], ffn=replace(ffn, width=width)) for width in (160, 192, 288)]
    assert [each.width for each in Columns.of([*layers, *fused], parent.spec).ffns] == [32, 64, 96, 288]
    row = columns.row(parent.spec.with_layers([replace(layers[0], ffn=replace(ffn, width=80))]))
    assert row == {
        REST: 1,
        ROWS: 1,
        layers[0].attention: 1,
        replace(ffn, width=64): 0.5,
        replace(ffn, width=96): 0.5,
    }
    with pytest.raises(KeyError):
        columns.of_layer(replace(layers[0], ffn=replace(ffn, width=97)))
    with pytest.raises(KeyError):
        columns.of_layer(replace(layers[0], attention=replace(layers[0].attention, window=4)))


def test_no_timed_model_is_much_larger_than_the_base(parent):
    spec = parent.spec
    layer = spec.layers[0]
    wide = replace(layer, attention=None, ffn=replace(layer.ffn, width=4 * layer.ffn.width))
    made = design(spec, Columns.of([wide], spec), set(), lambda _: True)
    most = sum(each.ffn.width for each in spec.layers)
    assert all(sum(each.ffn.width for each in one.layers if each.ffn) <= most for one in made)
    assert any(each.ffn == wide.ffn for one in made for each in one.layers)


def test_a_large_parent_is_timed_by_some_of_its_layers(parent):
    spec = parent.spec
    assert base_of(spec, lambda s: 1_000_000 * len(s.layers)) == spec
    assert len(base_of(spec, lambda s: 10**9 + 40_000_000 * len(s.layers)).layers) == 5
    assert len(base_of(spec, lambda s: 10**12 * len(s.layers)).layers) == 4


def test_rounds_go_on_until_ratios_are_known():
    calls = []

    def of(name, seconds):
        values = iter(seconds)

        def run():
            calls.append(name)
            return next(values)

        return run

    steady = time_in_turn(of("a", [1.0] * 30), [of("b", [2.0] * 30)], 25)
    assert steady == [Ratio(2.0, 0.0, FEWEST_ROUNDS, 1.0)]
    assert calls == ["a", "b"] * (FEWEST_ROUNDS + 1)
    shaky = time_in_turn(of("a", [1.0] * 30), [of("b", [1.0, 3.0] * 15)], 25)
    assert shaky[0].rounds == 25
    shaky = time_in_turn(of("a", [1.0] * 30), [of("b", [1.0, 3.0] * 15)], 25, seconds=0.0)
    assert shaky[0].rounds == FEWEST_ROUNDS
    calls.clear()
    both = time_in_turn(of("a", [1.0] * 99), [of("b", [2.0] * 30), of("c", [3.0] * 30)], 25)
    assert calls == [*"abc", *"abac" * FEWEST_ROUNDS]
    assert [ratio.value for ratio in both] == [2.0, 3.0]
    # A machine that becomes half as fast midway changes no ratio.
    slower = [1.0] * 4 + [2.0] * 26
    assert time_in_turn(of("a", slower), [of("b", [0.5 * s for s in slower])], 25)[0].value == 0.5


def test_fit_weighs_what_is_known_better():
    rows = [{"x": 1.0}, {"x": 1.0}]
    found = fit(rows, [(1.0, 0.01), (2.0, 0.1)], {"x": 1.5})
    assert found.time({"x": 2.0}) == pytest.approx(2.02, abs=0.02)
    assert 0 < found.half({"x": 1.0}) < 0.011
    assert found.time({"x": -1.0}) == 0


def test_real_engines_time_random_models(tmp_path):
    uneven = Shapes(open_model(str(save_uneven(tmp_path / "uneven"))))
    model = uneven.of(uneven.parent.spec)
    for text in ("transformers", "transformers:bf16", "llama.cpp:q8_0", "llama.cpp:f16"):
        engine = Engine.parse(text, context=16, threads=1)
        if engine.kind.name == "llama.cpp":
            pytest.importorskip("xllamacpp")
        for steps in (0, 3):
            with engine.kind.timed(model, engine.setting, steps) as run:
                assert run() > 0 < run()
        made = engine.bench(uneven.parent.checkpoint.path, uneven.parent.checkpoint.path, 1)
        assert made.engine == engine.kind.name
        assert made.decode_speedup.median > 0
