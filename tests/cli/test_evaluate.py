"""`llmsurgeon eval` and `bench`, on tiny checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from conftest import byte_tokenizer, save_tiny, tiny_model
from typer.testing import CliRunner

from llmsurgeon.cli import bench, evaluate
from llmsurgeon.errors import SurgeryError

EVAL_KEYS = {"perplexity", "parent_perplexity", "kl", "top1_agreement", "perplexity_ratio"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    app = typer.Typer()
    evaluate.register(app)
    bench.register(app)

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def models(tmp_path):
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.9)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model", parent


def test_eval_prints_one_json_object(run, models, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    result = run("eval", models[0], "--against", models[1], "--text", text, "--tokens", 64, "--seq-len", 16, "--json")
    report = json.loads(result.stdout)
    for key in EVAL_KEYS:
        low, high = report[f"{key}_interval"]
        assert low <= report[key] <= high
    assert report["tokens"] == 4 * 15
    assert 0 < report["kl"] < 1
    assert report["text"] == f"64 tokens of {text}"
    assert (report["model"], report["parent"]) == tuple(map(str, models))


def test_eval_without_text_samples_from_the_parent_and_says_so(run, models):
    result = run("eval", models[0], "--against", models[1], "--tokens", 64, "--seq-len", 16)
    assert "text: 64 tokens sampled from the parent (no --text given)" in result.stderr
    for words in ("perplexity ratio", "top-1 agreement", "95 % interval"):
        assert words in result.stdout
    alone = json.loads(run("eval", models[0], "--tokens", 64, "--seq-len", 16, "--json").stdout)
    assert alone["text"].startswith("64 tokens sampled from the model itself (no --text given): ")
    assert alone["kl"] is None and alone["perplexity"] > 1


def test_eval_in_another_dtype(run, models):
    arguments = ("eval", models[0], "--tokens", 64, "--seq-len", 16, "--json")
    exact, rounded = (json.loads(run(*arguments, "--dtype", d).stdout) for d in ("float32", "bfloat16"))
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.2)
    with pytest.raises(SurgeryError, match="--dtype int8: expected one of float32, bfloat16, float16"):
        run(*arguments, "--dtype", "int8")


def test_eval_compares_other_vocabularies_by_bytes(run, models, tmp_path):
    more = save_tiny(tmp_path / "more", "llama", tokenizer=True, vocab_size=70)
    sizes = ("--tokens", 64, "--seq-len", 16)
    shown = run("eval", models[0], "--against", more, *sizes).stdout
    assert "bits per byte, ratio" in shown and "KL" in shown
    # A parent with fewer tokens does not have all of the model's: nothing but bytes to go by.
    shown = run("eval", more, "--against", models[0], *sizes).stdout
    assert "bits per byte, ratio" in shown and "KL" not in shown


def test_eval_refuses_as_many_tokens_that_are_others(run, models):
    file = models[0] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    names = list(vocab)
    tokenizer["model"]["vocab"] = dict(zip(names, [*list(vocab.values())[1:], vocab[names[0]]], strict=True))
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(SurgeryError, match="have the same number in its tokenizer"):
        run("eval", models[0], "--against", models[1])
    file.unlink()
    (models[0] / "tokenizer_config.json").unlink()
    assert "perplexity ratio" in run("eval", models[0], "--against", models[1], "--tokens", 64, "--seq-len", 16).stdout


def test_eval_tasks_without_the_extra(run, models, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match=r"llmsurgeon\[eval\]"):
        run("eval", models[0], "--tasks", "piqa")


def test_bench_prints_one_json_object(run, models):
    sizes = ("--prompt", 12, "--new-tokens", 3, "--rounds", 2)
    report = json.loads(run("bench", models[0], "--against", models[1], *sizes, "--json").stdout)
    assert report["decode_speedup"]["median"] > 0
    assert report["model"]["kv_bytes_per_token"] == report["parent"]["kv_bytes_per_token"] == 6 * 32 * 4
    assert (report["name"], report["parent_name"], report["prompt"]) == (*map(str, models), 12)
    shown = run("bench", models[0], *sizes).stdout
    assert "decode, tokens/s" in shown
