"""A trimmed model in llama.cpp: the same tokens as in transformers, and the same scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmsurgeon.formats.loading import load_tokenizer
from tests.conftest import tiny_model
from tests.odd_text import odd_lines
from tests.vocabulary.conftest import tokenizer_of

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("kind", ["byte-level", "sentence-piece"])
def test_tokens_and_scores(kind: str, tmp_path: Path, run: Any) -> None:
    pytest.importorskip("xllamacpp")
    from llmsurgeon.evaluation.llama_server import LlamaCpp

    inner = tokenizer_of(kind)
    ids = {"bos_token_id": inner.token_to_id("<s>"), "eos_token_id": inner.token_to_id("</s>")}
    parent = tmp_path / "parent"
    tiny_model("llama", vocab_size=inner.get_vocab_size(), tie_word_embeddings=True, **ids, **SIZES).save_pretrained(
        parent
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(parent)
    (tmp_path / "text.txt").write_text("\n".join(odd_lines(80, seed=21)), encoding="utf-8")
    recipe = {"version": 1, "steps": [{"op": "trim_vocab", "keep": {"text": str(tmp_path / "text.txt")}}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for arguments in (
        ("run", tmp_path / "r.yaml", parent, "-o", tmp_path / "out"),
        ("export", tmp_path / "out", "--to", "gguf", "--type", "F32", "-o", tmp_path / "out.gguf"),
    ):
        code, _, err = run(*arguments)
        assert code == 0, err
    mine = load_tokenizer(str(tmp_path / "out"))
    assert len(mine) < inner.get_vocab_size()
    # The sign that stands for a space is cut otherwise there: see the exporter's notes.
    lines = [line for line in odd_lines(200, seed=22) if "▁" not in line]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with LlamaCpp(tmp_path / "out.gguf", context=256, threads=1) as engine:
        assert [engine.tokenize(line) for line in lines] == mine(lines, add_special_tokens=False)["input_ids"]
        for line in lines[:5]:
            tokens = mine(line)["input_ids"]
            with torch.no_grad():
                expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            found = engine.next_logprobs(tokens, top=50)
            assert found and all(abs(expected[i].item() - value) < 0.02 for i, value in found.items())
    # Read back from the file, it is the same model with the same tokenizer.
    back = load_tokenizer(str(tmp_path / "out.gguf"))
    assert back(lines, add_special_tokens=False)["input_ids"] == mine(lines, add_special_tokens=False)["input_ids"]
    code, shown, err = run(
        *("eval", tmp_path / "out.gguf", "--against", parent, "--text", tmp_path / "text.txt"),
        *("--tokens", 512, "--seq-len", 32),
    )
    assert code == 0, err
    assert "bits per byte, ratio" in shown and "KL" in shown
