"""A trimmed model says of the tokens that stayed what its parent says, and is a plain model of its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llmsurgeon.operations.trim_vocab import TrimVocab
from llmsurgeon.planning import trimming
from llmsurgeon.planning.opened import open_model
from llmsurgeon.planning.options import Options
from llmsurgeon.planning.texts import Texts
from llmsurgeon.planning.trimming import expected_tokens
from llmsurgeon.recipe.recipe import Calibration
from tests.conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, masked_head, tiny_encoder, tiny_model
from tests.vocabulary.conftest import tokenizer_of

SENTENCE = "The quick brown fox jumps over the lazy dog."
TEXT = f"{SENTENCE}\n" * 40
OTHER = "Weights stream from file to file: what no edit touches is copied by byte range.\n" * 40


def parent_in(folder: Path, family: str, rows_more: int = 20, kind: str = "byte-level", **changes: Any) -> Any:
    """A tiny parent with a tokenizer of 1,500 tokens and some rows without one."""
    inner = tokenizer_of(kind)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ids = {"bos_token_id": inner.token_to_id("<s>"), "eos_token_id": [inner.token_to_id("</s>"), 5]}
    # The last token: beyond the table of the trimmed model.
    ids["pad_token_id"] = inner.token_to_id("<tool>")
    if family in ("gpt_neox", "bloom", "opt", "falcon", "gpt2"):
        ids["eos_token_id"] = inner.token_to_id("</s>")
    model = tiny_model(family, vocab_size=inner.get_vocab_size() + rows_more, **ids, **changes)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return model


def write(path: Path, *steps: dict[str, Any], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"version": 1, "steps": list(steps), **more}))
    return path


def mapped(folder: Path, parent: Path) -> torch.Tensor:
    """The parent's id of each of the trimmed model's tokens, by name."""
    mine, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(parent)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    # Some classes of tokenizers add a token of their own behind the last.
    names = mine.convert_ids_to_tokens(list(range(min(len(mine), rows))))
    return torch.tensor(theirs.convert_tokens_to_ids(names))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(OTHER)
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MIXTURE_NAMES])
def test_kept_tokens_score_as_before(family: str, tied: bool, place: Path, run) -> None:
    if tied and family in ("qwen3_moe", "mixtral"):
        pytest.skip("tied mixtures are not published")
    model = parent_in(place / "parent", family, tie_word_embeddings=tied)
    write(place / "r.yaml", {"op": "trim_vocab", "keep": {"text": "text.txt"}})
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 0, err
    assert run("verify", "out")[0] == 0
    student = AutoModelForCausalLM.from_pretrained(place / "out")
    assert type(student) is type(model)
    assert student.config.vocab_size % 64 == 0 and student.config.vocab_size < model.config.vocab_size
    assert student.num_parameters() < model.num_parameters()
    assert bool(student.config.tie_word_embeddings) == tied
    kept = mapped(place / "out", place / "parent")
    ids = AutoTokenizer.from_pretrained(place / "out")(SENTENCE, return_tensors="pt").input_ids
    theirs = AutoTokenizer.from_pretrained(place / "parent")(SENTENCE, return_tensors="pt").input_ids
    assert torch.equal(kept[ids], theirs)
    with torch.no_grad():
        torch.testing.assert_close(
            student(ids).logits[..., : len(kept)], model(theirs).logits[..., kept], rtol=0, atol=0
        )


def test_ids_move_wherever_they_stand(place: Path, run) -> None:
    parent_in(place / "parent", "llama")
    inner = tokenizer_of("byte-level")
    config = json.loads((place / "parent" / "config.json").read_text())
    generation = {"eos_token_id": [inner.token_to_id("</s>"), 700], "suppress_tokens": [1, 801], "temperature": 0.5}
    (place / "parent" / "generation_config.json").write_text(json.dumps(generation))
    tokenizer_config = json.loads((place / "parent" / "tokenizer_config.json").read_text())
    image = inner.token_to_id("<|image|>")
    tokenizer_config["added_tokens_decoder"] = {str(image): {"content": "<|image|>", "special": True}}
    (place / "parent" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write(place / "r.yaml", {"op": "trim_vocab", "keep": {"text": "text.txt"}})
    assert run("run", "r.yaml", "parent", "-o", "out")[0] == 0
    back = mapped(place / "out", place / "parent").tolist()
    made = json.loads((place / "out" / "config.json").read_text())
    assert [back[i] for i in made["eos_token_id"]] == config["eos_token_id"]
    assert back[made["bos_token_id"]] == config["bos_token_id"]
    settings = json.loads((place / "out" / "generation_config.json").read_text())
    assert [back[i] for i in settings["eos_token_id"]] == generation["eos_token_id"]
    assert [back[i] for i in settings["suppress_tokens"]] == generation["suppress_tokens"]
    assert settings["temperature"] == 0.5
    added = json.loads((place / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [back[int(i)] for i in added] == [image]


@pytest.mark.parametrize("family", ENCODER_NAMES)
def test_encoders_with_a_tied_head(family: str, place: Path, run) -> None:
    import transformers

    inner, head = tokenizer_of("word-piece"), masked_head(family)
    pad = inner.token_to_id("[PAD]")
    model = tiny_encoder(family, head, vocab_size=inner.get_vocab_size(), pad_token_id=pad)
    model.save_pretrained(place / "parent")
    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    special = {f"{kind}_token": token for kind, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(place / "parent")
    write(place / "r.yaml", {"op": "trim_vocab", "keep": {"text": "text.txt"}})
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 0, err
    student = getattr(transformers, head).from_pretrained(place / "out")
    kept = mapped(place / "out", place / "parent")
    assert len(kept) < inner.get_vocab_size()
    ids = AutoTokenizer.from_pretrained(place / "out")(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, model(kept[ids]).logits[..., kept], rtol=0, atol=1e-6)
    code, out, err = run("eval", "out", "--against", "parent", "--text", "other.txt", "--seq-len", "16", "--json")
    assert code == 0, err
    assert json.loads(out)["hidden_cosine"] == pytest.approx(1)


def test_later_steps_work_on_the_trimmed_model(place: Path, run) -> None:
    parent_in(place / "parent", "llama")
    steps = [
        {"op": "trim_vocab", "keep": [{"text": "text.txt"}, {"tokens": 300}]},
        {"op": "prune_attention", "layers": [3]},
        {"op": "refit"},
        {"op": "distill", "steps": 2, "sequence_length": 32, "batch": 2},
    ]
    calibration = {"text": "other.txt", "tokens": 512, "sequence_length": 32}
    write(place / "r.yaml", *steps, calibration=calibration, gate={"max_bits_per_byte_ratio": 9.0})
    code, out, err = run("run", "r.yaml", "parent", "-o", "out", "--json")
    assert code == 0, err
    found = json.loads(out)["evaluation"]
    assert found["bits"]["ratio"] == pytest.approx(
        found["bits"]["bits_per_byte"] / found["bits"]["parent_bits_per_byte"]
    )
    assert "bits per byte" in (place / "out" / "README.md").read_text()
    # heal knows a student with fewer tokens by their names.
    write(place / "h.yaml", steps[-1], calibration=calibration)
    code, _, err = run("heal", "out", "--parent", "parent", "--recipe", "h.yaml", "-o", "healed")
    assert code == 0, err
    assert (
        AutoModelForCausalLM.from_pretrained(place / "out", trust_remote_code=True).config.vocab_size
        == (json.loads((place / "healed" / "config.json").read_text())["vocab_size"])
    )
    write(place / "g.yaml", *steps[:2], calibration=calibration, gate={"max_bits_per_byte_ratio": 0.5})
    code, _, err = run("run", "g.yaml", "parent", "-o", "missed")
    assert code == 3 and "bits per byte" in err


def test_eval_compares_by_bytes(place: Path, run) -> None:
    """Beside the slow way: each model's own log loss over the same bytes, token by token."""
    model = parent_in(place / "parent", "llama")
    one_window = OTHER[:160]
    (place / "other.txt").write_text(one_window)
    # In the vocabulary's order: the window is not cut into more tokens than the tiny model has positions.
    write(place / "r.yaml", {"op": "trim_vocab", "keep": {"text": "text.txt", "tokens": 0}, "rows": 640})
    assert run("run", "r.yaml", "parent", "-o", "out")[0] == 0
    code, out, err = run(
        "eval", "out", "--against", "parent", "--text", "other.txt", "--tokens", "40", "--seq-len", "40", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["perplexity_ratio"] == pytest.approx(1)
    assert 0 < found["outside_mass"] < 1
    assert found["bits"]["more_tokens"] > 0
    student = AutoModelForCausalLM.from_pretrained(place / "out")

    def nats(which: Any, folder: str) -> tuple[float, int]:
        tokenizer = AutoTokenizer.from_pretrained(place / folder)
        window = AutoTokenizer.from_pretrained(place / "parent")(one_window, add_special_tokens=False).input_ids
        start = AutoTokenizer.from_pretrained(place / "parent").bos_token_id
        text = AutoTokenizer.from_pretrained(place / "parent").decode(window[:39])
        assert start is not None
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        with torch.no_grad():
            scores = which(torch.tensor([ids])).logits[0].log_softmax(-1)
        return -sum(scores[t - 1, i].item() for t, i in enumerate(ids) if t), len(text.encode())

    (mine, size), (theirs, _) = nats(student, "out"), nats(model, "parent")
    ln2 = 0.6931471805599453
    assert found["bits"]["bytes"] == size
    assert found["bits"]["bits_per_byte"] == pytest.approx(mine / ln2 / size, rel=1e-4)
    assert found["bits"]["parent_bits_per_byte"] == pytest.approx(theirs / ln2 / size, rel=1e-4)


def test_what_cannot_be_done_is_said(place: Path, run) -> None:
    parent_in(place / "parent", "llama")

    def message(*steps: dict[str, Any], model: str = "parent") -> str:
        write(place / "r.yaml", *steps)
        code, _, err = run("run", "r.yaml", model, "-o", "out")
        assert code == 2 and not (place / "out").exists() and not (place / "out.partial").exists()
        return err

    trim = {"op": "trim_vocab", "keep": {"text": "text.txt"}}
    assert "comes first" in message({"op": "prune_ffn", "layers": [2]}, trim)
    assert "comes first, and once" in message(trim, trim)
    assert "at least" in message({**trim, "rows": 64})
    (place / "list.txt").write_text("Ġthe\nnosuchtoken\n")
    assert "nosuchtoken" in message({"op": "trim_vocab", "keep": {"file": "list.txt"}})
    assert "no such text file" in message({"op": "trim_vocab", "keep": {"text": "none.txt"}})
    assert "keep, rows, or both" in message({"op": "trim_vocab"})
    assert "min_count goes with text or self" in message({"op": "trim_vocab", "keep": {"tokens": 5, "min_count": 2}})
    (place / "parent" / "tokenizer.json").rename(place / "kept.json")
    (place / "parent" / "tokenizer.model").write_bytes(b"x")
    assert "no tokenizer.json" in message(trim)


def test_lists_of_tokens(place: Path, run) -> None:
    parent_in(place / "parent", "llama")
    inner = tokenizer_of("byte-level")
    (place / "list.json").write_text(json.dumps(["Ġthe", 1200]))
    write(place / "r.yaml", {"op": "trim_vocab", "keep": {"file": "list.json"}, "multiple_of": 1})
    assert run("run", "r.yaml", "parent", "-o", "out")[0] == 0
    kept = set(mapped(place / "out", place / "parent").tolist())
    assert {inner.token_to_id("Ġthe"), 1200} <= kept and len(kept) < 330


def test_lists_of_tokens_go_along_with_the_model(place: Path, run) -> None:
    """Whoever gets the model alone can run its recipe, in whatever form it comes."""
    parent_in(place / "parent", "llama")
    (place / "mine").mkdir()
    (place / "mine" / "list.json").write_text(json.dumps(["Ġthe", 1200]))
    (place / "mine" / "more.txt").write_text("Ġof\n")
    keep = [{"file": "mine/list.json"}, {"tokens": 20}, {"file": "mine/more.txt"}, {"file": "mine/list.json"}]
    write(place / "r.yaml", {"op": "trim_vocab", "keep": keep})
    assert run("run", "r.yaml", "parent", "-o", "out")[0] == 0
    assert run("export", "out", "--to", "surgeon", "-o", "exported")[0] == 0
    (place / "mine" / "list.json").unlink()
    (place / "mine" / "more.txt").unlink()
    table = load_file(place / "out" / "model.safetensors")["model.embed_tokens.weight"]
    for name in ("out", "exported"):
        assert (place / name / "kept_tokens.json").read_text() == json.dumps(["Ġthe", 1200])
        assert (place / name / "kept_tokens_2.txt").read_text() == "Ġof\n" and run("verify", name)[0] == 0
        for text in ("recipe.yaml", "README.md"):
            assert "file: ./kept_tokens.json" in (place / name / text).read_text()
        assert not list((place / name).glob("kept_tokens_3*"))
        assert run("run", f"{name}/recipe.yaml", "parent", "-o", "again", "--overwrite")[0] == 0
        again = load_file(place / "again" / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(again, table)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_rows_fill_up_with_what_the_model_expects(family: str, place: Path, run) -> None:
    """Against the stock model's probabilities on the same windows, summed by hand."""
    model = parent_in(place / "parent", family, max_position_embeddings=64)
    keep = {"text": "text.txt", "tokens": 0}
    write(place / "r.yaml", {"op": "trim_vocab", "keep": keep, "rows": 640, "fill": "predicted"})
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 0, err
    parent = open_model(str(place / "parent"))
    length = min(256, parent.spec.max_positions or 256)
    wanted = Calibration(text="text.txt", self_share=0, tokens=8192, sequence_length=length)
    texts = Texts(parent, wanted, 8192, Options(device="cpu"))
    windows = texts.windows
    with torch.no_grad():
        expected = sum(model(window[None]).logits[0].softmax(-1).sum(0) for window in windows)
    found = expected_tokens(texts)
    torch.testing.assert_close(torch.tensor([found[i] for i in range(len(expected))]), expected, atol=1e-3, rtol=1e-3)
    seen = set(AutoTokenizer.from_pretrained(place / "parent")(TEXT).input_ids)
    kept = set(mapped(place / "out", place / "parent").tolist())
    write(place / "o.yaml", {"op": "trim_vocab", "keep": keep, "rows": 640})
    assert run("run", "o.yaml", "parent", "-o", "by-order")[0] == 0
    ordered = set(mapped(place / "by-order", place / "parent").tolist())
    assert seen <= kept and kept != ordered
    assert expected[sorted(kept - ordered)].mean() > expected[sorted(ordered - kept)].mean()


def test_what_the_model_expects_needs_a_text_and_rows(place: Path, run) -> None:
    parent_in(place / "parent", "llama")
    write(place / "r.yaml", {"op": "trim_vocab", "keep": {"text": "text.txt"}, "fill": "predicted"})
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 2 and "fill: predicted goes with rows and with text or self in keep" in err
    cut = ("prune", "parent", "--vocab", "640", "--vocab-text", "text.txt")
    assert run(*cut, "--dry-run")[0] == 0
    code, _, err = run(*cut, "-o", "out")
    assert code == 0 and "fill: predicted" in (place / "out" / "recipe.yaml").read_text(), err


def test_tokens_that_the_model_writes_stay(place: Path, run) -> None:
    parent_in(place / "parent", "llama", max_position_embeddings=64)
    keep = [{"text": "text.txt", "tokens": 0}, {"self": "prose", "tokens": 60}]
    write(place / "r.yaml", {"op": "trim_vocab", "keep": keep, "rows": 640, "fill": "predicted"})
    assert run("run", "r.yaml", "parent", "--dry-run")[0] == 0
    code, out, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 0 and "sampled from the model itself" in out + err, err
    wanted = Calibration(texts=({"self": "prose"},), tokens=8192, sequence_length=64)
    windows = Texts(open_model("parent"), wanted, 8192, Options(device="cpu")).windows
    counts = torch.bincount(windows.flatten(), minlength=1520)
    often = sorted(range(1520), key=lambda i: (-int(counts[i]), i))[:60]
    kept = set(mapped(place / "out", place / "parent").tolist())
    assert set(often) <= kept and set(AutoTokenizer.from_pretrained("parent")(TEXT).input_ids) <= kept
    # By the text alone they would not.
    write(place / "t.yaml", {"op": "trim_vocab", "keep": keep[0], "rows": 640, "fill": "predicted"})
    assert run("run", "t.yaml", "parent", "-o", "by-text")[0] == 0
    assert not set(often) <= set(mapped(place / "by-text", place / "parent").tolist())


def test_what_is_expected_in_text_of_its_own_is_told_apart(place: Path, monkeypatch) -> None:
    """A text that stands in two entries counts once."""
    parent_in(place / "parent", "llama", max_position_embeddings=64)
    monkeypatch.chdir(place)
    keep = [
        {"text": "text.txt", "tokens": 0},
        {"text": "text.txt", "min_count": 3},
        {"self": "prose", "tokens": 0},
    ]
    step, given = TrimVocab(keep=keep, rows=640, fill="predicted"), []
    monkeypatch.setattr(trimming, "trim", lambda *_, expected, **__: given.append(expected))
    monkeypatch.setattr(trimming, "trimmed", lambda *_: None)
    parent = open_model("parent")
    trimming.trimmed_by(parent, step, Options(device="cpu"))
    [found] = given
    alone = {}
    for entry in (step.entries[0], step.entries[2]):
        alone[entry.self] = expected_tokens(trimming._texts(parent, entry, Options(device="cpu")))
    assert found.written == pytest.approx(alone["prose"])
    assert found.read == pytest.approx({i: alone[None][i] + alone["prose"][i] for i in alone[None]})


def test_a_text_is_not_all_that_a_vocabulary_is_kept_by(place: Path, run) -> None:
    parent_in(place / "parent", "llama", max_position_embeddings=64)
    cut = ("prune", "parent", "--vocab", "640", "--vocab-text", "text.txt")
    assert run(*cut, "-o", "out")[0] == 0 and run(*cut, "--no-vocab-self", "-o", "alone")[0] == 0
    mixed, alone = ((place / name / "recipe.yaml").read_text() for name in ("out", "alone"))
    assert "self: all" in mixed and "self:" not in alone
    # Several texts, and none of them alone.
    (place / "more.txt").write_text("Zebras quietly waltz by.\n" * 30)
    both = ("--vocab-text", "text.txt", "--vocab-text", "more.txt")
    for name, rows in (("rows", ("--vocab", "640", "--no-vocab-self")), ("fewest", ())):
        assert run("prune", "parent", *rows, *both, "-o", name)[0] == 0
        kept = set(mapped(place / name, place / "parent").tolist())
        for text in (TEXT, "Zebras quietly waltz by."):
            assert set(AutoTokenizer.from_pretrained("parent")(text).input_ids) <= kept


def test_a_model_that_writes_nothing_keeps_no_tokens_by_it(place: Path, run, monkeypatch) -> None:
    parent_in(place / "parent", "llama", max_position_embeddings=64)
    step = {"op": "trim_vocab", "keep": {"self": "all"}}
    write(place / "r.yaml", step)
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 2 and "self goes with rows" in err
    monkeypatch.setattr("llmsurgeon.planning.trimming.too_large", lambda size: "it is larger than the room")
    write(place / "r.yaml", {**step, "rows": 640})
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 2 and "larger than the room; give keep a text (--vocab-text FILE)" in err
    assert not (place / "out").exists()
    code, _, err = run("prune", "parent", "--vocab", "640", "--vocab-text", "text.txt", "-o", "out")
    assert code == 0 and "larger than the room, so tokens are not kept by it" in err


def test_an_encoder_expects_nothing(place: Path, run) -> None:
    parent = tiny_encoder("bert", vocab_size=1600)
    parent.save_pretrained(place / "parent")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("word-piece")).save_pretrained(place / "parent")
    keep = {"text": "text.txt", "tokens": 0}
    write(place / "r.yaml", {"op": "trim_vocab", "keep": keep, "rows": 640, "fill": "predicted"})
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 0 and "an encoder predicts no next token, so rows fill up in the vocabulary's order" in err


def test_merges_that_are_no_text_are_told(place: Path, run) -> None:
    parent_in(place / "parent", "llama")
    (place / "parent" / "merges.txt").write_bytes(b"\xff\xfe")
    write(place / "r.yaml", {"op": "trim_vocab", "keep": {"text": "text.txt"}})
    code, _, err = run("run", "r.yaml", "parent", "-o", "out")
    assert code == 2 and "merges.txt: cannot be read as UTF-8 text" in err and not (place / "out").exists()
