"""The structure of a benchmark; its times are the machine's."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from generation import generate
from rich.console import Console

from llmsurgeon.cli.bench import bench_table
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation import graphs, latency
from llmsurgeon.evaluation.latency import benchmark, cache_bytes, parameter_bytes
from llmsurgeon.evaluation.speed import Round, Speedup, Spread, bench_of, speed_of
from llmsurgeon.formats.caches import cached_call


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_measures_model_and_parent(family):
    model, parent = tiny_model(family, num_hidden_layers=3), tiny_model(family)
    bench = benchmark(model, parent, batch=2, prompt=10, new_tokens=3, rounds=3)
    width = 2 * (16 if family == "llama" else 32)  # keys and values; llama has 2 KV heads of 8
    assert bench.model.kv_bytes_per_token == 3 * width * 4
    assert bench.parent.kv_bytes_per_token == 6 * width * 4
    assert bench.model.kv_cache_bytes == 3 * width * 4 * 2 * 13
    assert bench.model.memory_bytes == bench.model.parameter_bytes + bench.model.kv_cache_bytes
    assert bench.model.peak_memory_bytes is None
    for spread in (bench.prefill_speedup, bench.decode_speedup, bench.model.decode_tokens_per_second):
        assert 0 < spread.min <= spread.lower_quartile <= spread.median <= spread.upper_quartile <= spread.max
    rate = bench.model.prefill_tokens_per_second.median
    assert rate == pytest.approx(20 / bench.model.prefill_seconds.median)
    assert json.loads(json.dumps(bench.to_dict()))["model"]["parameter_bytes"] == parameter_bytes(model)


def test_rounds_alternate_and_speedups_are_paired(monkeypatch):
    model, parent = tiny_model("llama", num_hidden_layers=1), tiny_model("llama")
    order, times = [], {"parent": iter([9, 4, 6, 20]), "model": iter([9, 2, 2, 10])}

    def run(each, ids, new_tokens, graph):
        name = "parent" if each is parent else "model"
        order.append(name)
        seconds = next(times[name])
        return Round(seconds, seconds * 2, 64, 64, None)

    monkeypatch.setattr(latency, "timed_round", run)
    bench = benchmark(model, parent, prompt=4, new_tokens=2, rounds=3)
    assert order == ["parent", "model"] * 4
    # Ratios 2, 3 and 2 of the pairs; the warm-up's 1 does not count.
    assert (bench.prefill_speedup.median, bench.prefill_speedup.max) == (2, 3)
    assert bench.model.prefill_seconds.max == 10


def test_decoding_is_greedy_generation_without_a_stop(monkeypatch):
    model = tiny_model("llama")
    seen = []
    forward = model.forward

    def spy(*args, **kwargs):
        seen.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    spy.__signature__ = latency.inspect.signature(forward)
    monkeypatch.setattr(model, "forward", spy)
    prompt = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(0))
    latency.timed_round(model, prompt, 6)
    monkeypatch.undo()
    model.generation_config.eos_token_id = None
    expected = generate(model, prompt, max_new_tokens=6)
    assert torch.equal(torch.cat(seen, 1), expected)


def test_sliding_windows_count_what_they_hold():
    model = tiny_model("mistral")  # a window of 8
    with torch.no_grad():
        _, cache = cached_call(model, input_ids=torch.zeros(1, 40, dtype=torch.long))
    assert cache_bytes(cache) == 6 * 32 * 4 * 7


def test_spread_of_one_value():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0, 3.0)


def text_of(bench):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(bench_table(bench))
    return " ".join(console.export_text().split())


def made_of(parents, models):
    """The bench of two models whose rounds took these seconds."""
    timed = [[Round(each, each, 64, 64, None) for each in seconds] for seconds in (parents, models)]
    speeds = [speed_of(1, rounds, 10, 1, 10) for rounds in timed]
    how = dict(batch=1, prompt=10, new_tokens=10, rounds=len(parents), device="cpu", dtype="float32", threads=1)
    return bench_of(speeds, timed, **how)


def test_a_busy_machine_says_that_it_cannot_tell():
    """Each model's median says slower, the pairs' median faster: the table says what its ratio is of."""
    bench = made_of([1.0, 1.6, 1.62, 3.0, 3.3], [1.8, 1.4, 1.45, 4.0, 2.9])
    medians = bench.parent.decode_tokens_per_second.median, bench.model.decode_tokens_per_second.median
    assert medians[1] < medians[0] * 0.95 and bench.decode_speedup.median > 1.1
    assert bench.decode_speedup.interval == (pytest.approx(1 / 1.8), pytest.approx(1.6 / 1.4))
    assert not bench.decode_speedup.clear
    text = text_of(bench)
    assert "the parent's seconds / the model's in the same round" in text
    assert "decode: too noisy to tell which is faster, the median ratio is between 0.56 and 1.14" in text


def test_a_clear_speedup_says_no_more_than_what_it_is_of():
    text = text_of(made_of([2.0, 2.1, 2.2, 2.0, 2.1], [1.0, 1.0, 1.1, 1.2, 1.0]))
    assert "noisy" not in text and "too few" not in text and "in the same round" in text
    assert "prefill: 3 rounds are too few to tell which is faster" in text_of(made_of([2.0] * 3, [1.0] * 3))


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (20, 5)])
def test_the_interval_is_that_of_order_statistics(count, left_out):
    """Of n values the r-th smallest to the r-th largest hold the median with 95 %: the sign test's table."""
    values = [1 + i / 100 for i in range(count)]
    assert Speedup.of(values).interval == (values[left_out], values[-1 - left_out])
    chance = 2 * sum(math.comb(count, i) for i in range(left_out + 1)) / 2**count
    assert chance <= 0.05 or count < 6
    assert chance + 2 * math.comb(count, left_out + 1) / 2**count > 0.05


def test_table_shows_both():
    bench = benchmark(tiny_model("llama"), tiny_model("llama"), prompt=4, new_tokens=2, rounds=2)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(bench_table(bench))
    text = console.export_text()
    for word in ("parent", "speedup", "decode, tokens/s", "KV cache, bytes a token", "1.00 of parent"):
        assert word in text
    alone = Console(width=160, record=True, file=io.StringIO())
    alone.print(bench_table(benchmark(tiny_model("llama"), prompt=4, new_tokens=2, rounds=1)))
    assert "parent" not in alone.export_text()


def test_sizes_that_do_not_fit():
    model = tiny_model("llama")
    with pytest.raises(SurgeryError, match="new_tokens is 0, expected 1 or more"):
        benchmark(model, new_tokens=0, prompt=4)
    with pytest.raises(SurgeryError, match="make 129 positions, its limit is 128; lower --prompt or --new-tokens"):
        benchmark(model, prompt=100, new_tokens=29)


def test_steps_of_a_graph_are_greedy_generation(monkeypatch):
    """Without a card the recorded step is run as it is: token, cache and positions stay where a replay reads them."""
    model, prompt = tiny_model("llama"), torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(graphs, "captured", lambda function: function)
    with torch.inference_mode():
        steps = graphs.GraphedSteps(model, prompt, 6, {"logits_to_keep": 1})
        place = steps.token_B1.data_ptr()
        written = [steps.token_B1.clone(), *(steps.step().clone() for _ in range(5))]
        assert steps.token_B1.data_ptr() == place
    model.generation_config.eos_token_id = None
    assert torch.equal(torch.cat(written, 1), generate(model, prompt, max_new_tokens=6)[:, -6:])
    made = latency._replays(model, prompt, 3)
    assert made[0] > 0 and cache_bytes(made[1]) == 6 * 2 * 16 * 4 * 2 * (9 + 3 + graphs.WARM_UP + 1)


def test_what_no_graph_can_hold_is_refused(monkeypatch):
    model = tiny_model("llama")
    with pytest.raises(SurgeryError, match="--graph records the decode steps of a decoder on a CUDA device"):
        benchmark(model, prompt=4, new_tokens=2, graph=True)

    def refuses(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "captured", refuses)
    with pytest.raises(SurgeryError, match=r"cannot be recorded as a CUDA graph \(operation not .*leave out --graph"):
        graphs.GraphedSteps(model, torch.zeros(1, 4, dtype=torch.long), 2, {})


def test_a_card_is_timed_by_its_events(monkeypatch):
    marks = iter([1.0, 4.5])

    class Event:
        def __init__(self, enable_timing):
            self.waited = False

        def record(self):
            self.at = next(marks)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, other):
            assert other.waited
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    card = SimpleNamespace(device=torch.device("cuda"))
    assert latency._between(latency._mark(card), latency._mark(card)) == 3.5
