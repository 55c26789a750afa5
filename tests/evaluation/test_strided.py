"""Perplexity over a stream against the plain loop of llama.cpp's tool: what is scored, and with what before it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TEXT, byte_tokenizer, save_tiny

from llmsurgeon.errors import SurgeryError
from llmsurgeon.evaluation.strided import stream, strided
from llmsurgeon.formats.loading import load_model, load_tokenizer


@pytest.fixture
def model(tmp_path):
    return load_model(str(save_tiny(tmp_path / "model", "llama", tokenizer=True)), dtype=torch.float32)


def by_hand(model, tokens, pairs):
    """exp of the mean loss; pairs: (what the model sees, the token that follows)."""
    losses = []
    for seen, target in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[target].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_windows_that_overlap_score_their_ends(model):
    tokens = torch.randint(3, 60, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    found = strided(model, torch.tensor(tokens), byte_tokenizer(), window=12, stride=5)
    # Windows begin at 0, 5, 10, 15: (30 - 12 + 4) // 5 of them.
    pairs = [
        (tokens[start : start + place], tokens[start + place]) for start in (0, 5, 10, 15) for place in range(7, 12)
    ]
    expected, count = by_hand(model, tokens, pairs)
    assert found.perplexity == pytest.approx(expected, rel=1e-5) and found.tokens == count == 20


def test_without_a_stride_second_halves_are_scored_behind_a_beginning_of_text(model, tmp_path):
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.add_bos_token = True
    begin = tokenizer("a")["input_ids"][0]
    assert begin == tokenizer.bos_token_id
    tokens = torch.randint(3, 60, (31,), generator=torch.Generator().manual_seed(0)).tolist()
    found = strided(model, torch.tensor(tokens), tokenizer, window=10, stride=0)
    pairs = [
        ([begin, *tokens[start + 1 : start + place]], tokens[start + place])
        for start in (0, 10, 20)
        for place in range(6, 10)
    ]
    expected, count = by_hand(model, tokens, pairs)
    assert found.perplexity == pytest.approx(expected, rel=1e-5) and found.tokens == count == 12


def test_names_of_special_tokens_in_a_text_are_text(tmp_path):
    tokenizer = byte_tokenizer()
    name = tokenizer.eos_token
    assert tokenizer(f"a {name} b")["input_ids"].count(tokenizer.eos_token_id) == 1
    found = stream(f"a {name} b", tokenizer, 256, "text").tolist()
    assert found == [tokenizer(letter)["input_ids"][0] for letter in f"a {name} b"]


def test_what_cannot_be(model):
    tokens = torch.arange(3, 20)
    with pytest.raises(SurgeryError, match="expected fewer than the 8 tokens"):
        strided(model, tokens, byte_tokenizer(), window=8, stride=8)
    for stride in (0, 4):
        with pytest.raises(SurgeryError, match="fewer than one window of 20"):
            strided(model, tokens, byte_tokenizer(), window=20, stride=stride)
    with pytest.raises(SurgeryError, match="too few to measure on"):
        stream("", byte_tokenizer(), 100, "x.txt")


def test_the_verb_measures_both_models(run, folder):
    import json

    few = ("--text", "text.txt", "--tokens", 256, "--seq-len", 16)
    code, out, err = run("eval", "parent", "--against", "parent", *few, "--stride", 8, "--json")
    assert code == 0, err
    found = json.loads(out)["strided"]
    tokenizer = load_tokenizer("parent")
    expected = strided(load_model("parent"), stream(TEXT, tokenizer, 256, "text"), tokenizer, 16, 8)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6) == found["parent_perplexity"]
    assert "windows of 16" in run("eval", "parent", *few, "--stride", 0)[1]
    code, _, err = run("eval", "parent", "--stride", 8)
    assert code == 2 and "give --text FILE" in err
