"""A model judged by kind of text: rows, gates, and what is said of a kind that fares much worse."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_tiny, tiny_encoder, tiny_model

from llmsurgeon.errors import GateFailed, SurgeryError
from llmsurgeon.evaluation.decoders import evaluate_decoder
from llmsurgeon.evaluation.encoders import Masking, evaluate_encoder, mask_tokens
from llmsurgeon.evaluation.gate import check_gate, missed
from llmsurgeon.evaluation.kinds import much_worse
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.recipe.recipe import Gate, loads
from llmsurgeon.run import Options
from llmsurgeon.run import run as run_recipe

KINDS = ("prose", "code", "prose", "code", "prose", "maths", "maths", "prose")


def some_tokens(seed=0, rows=8):
    return torch.randint(3, 64, (rows, 16), generator=torch.Generator().manual_seed(seed))


def test_each_kind_has_the_figures_of_its_sequences_alone():
    tokens, model, parent = some_tokens(), tiny_model("llama"), tiny_model("llama", seed=1)
    found = evaluate_decoder(model, tokens, parent, kinds=KINDS)
    assert found.to_dict() == {
        **evaluate_decoder(model, tokens, parent).to_dict(),
        "kinds": {kind: figures.to_dict() for kind, figures in found.kinds.items()},
    }
    assert list(found.kinds) == ["prose", "code", "maths"]
    for kind, figures in found.kinds.items():
        mask = torch.tensor([each == kind for each in KINDS])
        alone = evaluate_decoder(model, tokens[mask], parent)
        for key, value in alone.to_dict().items():
            assert figures.to_dict()[key] == pytest.approx(value, rel=1e-5), (kind, key)


def test_one_kind_has_no_rows():
    found = evaluate_decoder(tiny_model("llama"), some_tokens(), kinds=("prose",) * 8)
    assert not found.kinds and "kinds" not in found.to_dict()


def test_encoders_have_rows_too():
    tokens, models = some_tokens(), [tiny_encoder("bert", "BertForMaskedLM", seed=seed) for seed in (0, 1)]
    masking = mask_tokens(tokens, 3, {0, 1, 2, 3, 4})
    found = evaluate_encoder(models[0], tokens, models[1], masking, KINDS)
    for kind, figures in found.kinds.items():
        mask = torch.tensor([each == kind for each in KINDS])
        part = Masking(masking.inputs[mask], masking.masked[mask])
        alone = evaluate_encoder(models[0], tokens[mask], models[1], part).to_dict()
        for key, value in alone.items():
            assert figures.to_dict()[key] == pytest.approx(value, rel=1e-4), (kind, key)


def row(ratio, low, high):
    return {"perplexity_ratio": ratio, "perplexity_ratio_interval": (low, high)}


def test_a_kind_that_fares_much_worse_is_said():
    kinds = {"prose": row(1.1, 1.05, 1.15), "code": row(1.6, 1.5, 1.7), "news": row(1.1, 1.0, 1.2)}
    assert much_worse(kinds) == [
        "code fares worse than the rest: perplexity ratio 1.600 (1.500 to 1.700), 1.100 on the other kinds"
    ]
    assert much_worse(kinds | {"code": row(1.6, 0.9, 2.8)}) == [], "too few sequences to be sure"
    assert much_worse(kinds | {"code": row(1.15, 1.14, 1.16)}) == [], "hardly worse"
    assert much_worse(kinds | {"code": {"perplexity_ratio": 1.6, "perplexity_ratio_interval": None}}) == []
    assert much_worse({}) == much_worse({"prose": row(9.0, 8.0, 10.0)}) == []


def test_a_gate_names_kinds():
    tokens, model, parent = some_tokens(), tiny_model("llama"), tiny_model("llama", seed=1)
    found = evaluate_decoder(model, tokens, parent, kinds=KINDS)
    ratio = found.kinds["code"].perplexity_ratio
    assert missed(Gate(kinds={"code": ratio + 0.01}), found) == []
    assert missed(Gate(kinds={"code": ratio - 0.01}), found) == [
        f"perplexity ratio of code {ratio:.3f}, at most {ratio - 0.01} wanted"
    ]
    assert missed(Gate(kinds={"chat": 2.0}), found) == [
        "perplexity ratio of chat could not be measured, at most 2.0 wanted"
    ]
    every = missed(Gate(kinds={"all": 1e-9, "code": 1e9}), found)
    assert len(every) == 2 and "of prose" in every[0] and "of maths" in every[1]
    with pytest.raises(SurgeryError, match=r"gate.kinds: bert predicts no next token"):
        check_gate(Gate(kinds={"code": 1.3}), FAMILIES["bert"])


RECIPE = """
version: 1
calibration: {{texts: [{{text: {text}, weight: 2}}, {{self: all}}], tokens: 768, sequence_length: 16}}
steps:
  - {{op: prune_ffn, layers: [1]}}
  - {{op: refit}}
gate: {{kinds: {{text.txt: {bound}, all: 1000000}}}}
"""


def test_a_gate_of_a_kind_without_text_is_refused(tmp_path):
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    recipe = loads(RECIPE.format(text="text.txt", bound=2).replace("all: 1000000", "cod: 2"))
    with pytest.raises(SurgeryError, match=r"gate\.kinds\.cod: .* no text of this kind.*text\.txt, prose, .*chat"):
        run_recipe(recipe, str(parent), str(tmp_path / "out"), Options())


def test_a_run_judges_by_kind(tmp_path, monkeypatch):
    """Rows in surgery.json and on the card; the gate's bound of one kind; the sources in the plan and the records."""
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(7919 * number) for number in range(2000)))
    with pytest.raises(GateFailed, match=r"perplexity ratio of text\.txt .*, at most 0\.01 wanted") as caught:
        run_recipe(loads(RECIPE.format(text=text, bound=0.01)), str(parent), str(tmp_path / "out"), Options())
    outcome = caught.value.outcome
    shares = outcome.planned.text_shares
    assert shares == {str(text): pytest.approx(2 / 3), "what the model writes (all)": pytest.approx(1 / 3)}
    surgery = json.loads((tmp_path / "out" / "surgery.json").read_text())
    kinds = surgery["evaluation"]["kinds"]
    assert "text.txt" in kinds and len(kinds) > 1
    assert sum(figures["sequences"] for figures in kinds.values()) == surgery["evaluation"]["sequences"]
    assert "of text.txt and sampled from the model itself: text.txt 67 %" in surgery["calibration"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| perplexity, text.txt | {kinds['text.txt']['parent_perplexity']:.2f} |" in card


def test_eval_judges_several_texts(tmp_path, run, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    for name, seed in (("parent", 0), ("student", 1)):
        save_tiny(tmp_path / name, "llama", tokenizer=True, seed=seed)
    for name, step in (("a.txt", 7919), ("b.txt", 104729)):
        (tmp_path / name).write_text(" ".join(str(step * number) for number in range(500)))
    texts = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    models = ("eval", tmp_path / "student", "--against", tmp_path / "parent", "--tokens", 256, "--seq-len", 16)
    code, out, _ = run(*models, "--texts", *texts, "--json")
    found = json.loads(out)
    assert code == 0 and list(found["kinds"]) == ["a.txt", "b.txt"]
    assert [figures["sequences"] for figures in found["kinds"].values()] == [8, 8]
    assert all(figures["perplexity_ratio_interval"] for figures in found["kinds"].values())
    assert "a.txt 50 %, b.txt 50 %" in found["text"]
    code, out, _ = run(*models, "--texts", *texts)
    assert code == 0 and "by kind of text" in out and "a.txt" in out
    code, _, err = run(*models, texts[0])
    assert code == 2 and "is a second; texts to judge on follow --texts" in err
    code, out, _ = run(*models, "--json")
    assert code == 0 and len(json.loads(out)["kinds"]) > 1, "what the model writes is of several kinds, too"
