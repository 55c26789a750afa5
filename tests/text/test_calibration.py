"""Calibration windows: where they come from, how they are spread, what is refused."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from conftest import byte_tokenizer, encoder_tokenizer, tiny_model

from llmsurgeon.checkpoint.kept import cache_folder
from llmsurgeon.errors import SurgeryError
from llmsurgeon.text import self_text
from llmsurgeon.text.cache import model_fingerprint
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.kinds import KINDS, Kind
from llmsurgeon.text.self_text import Sampling, SelfText, sample_self_text
from llmsurgeon.text.sequences import Sequences, held_out
from llmsurgeon.text.wanted import Calibration

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))


def tokens_of(path, tokenizer, tokens=32, sequence_length=8, **options):
    return calibration_sequences(
        "tiny", tokenizer, Calibration(text=str(path), tokens=tokens, sequence_length=sequence_length, **options)
    ).tokens


def write(tmp_path, text, name="text.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("length", [64, 300, 5000])  # read in full, in full, in passages
def test_windows_are_parts_of_the_text_spread_over_all_of_it(tmp_path, tokenizer, length):
    # Words count up, so a window's place in the text shows in its words.
    words = " ".join(LETTERS[i // 26 % 26] + LETTERS[i % 26] for i in range(length))
    windows = tokens_of(write(tmp_path, words), tokenizer)
    assert windows.shape == (4, 8) and windows.dtype == torch.int64
    places = []
    for window in windows:
        text = "".join(tokenizer.convert_ids_to_tokens(window.tolist()))
        assert text in words
        places.append(words.index(text) / len(words) if length <= 676 else None)
    if length <= 676:
        assert places == sorted(places)
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert all(gap >= 8 / len(words) for gap in gaps), "windows overlap"
        assert places[-1] > 0.7 and max(gaps) < 0.4


def test_passages_come_from_every_quarter(tmp_path, tokenizer):
    text = "".join(f"{letter * 3} " * 400 for letter in "abcd")  # 1600 characters a quarter
    windows = tokens_of(write(tmp_path, text), tokenizer)
    assert [tokenizer.convert_ids_to_tokens(w.tolist())[0] for w in windows] == list("abcd")


def test_same_arguments_same_windows_and_the_seed_moves_them(tmp_path, tokenizer):
    generator = torch.Generator().manual_seed(0)
    text = "".join(LETTERS[i] for i in torch.randint(26, (5000,), generator=generator))
    path = write(tmp_path, text)
    first, again, other = (tokens_of(path, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_short_text_gives_fewer_windows_and_says_so(tmp_path, tokenizer):
    windows = tokens_of(write(tmp_path, LETTERS), tokenizer, tokens=800)
    assert windows.shape == (3, 8)
    text = "".join(tokenizer.convert_ids_to_tokens(windows.flatten().tolist()))
    assert text == LETTERS[:24]
    line = Calibration(text="t.txt", tokens=800, sequence_length=8).describe(Sequences(windows, ("t.txt",) * 3))
    assert line == "calibration: 24 tokens of t.txt; 800 were asked for"


def test_bos_begins_each_window_where_the_tokenizer_puts_one(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    path = write(tmp_path, LETTERS)
    assert tokens_of(path, tokenizer)[0, 0] != tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    windows = tokens_of(path, tokenizer, tokens=16)
    assert windows[:, 0].tolist() == [1, 1]
    assert (windows[:, 1:] > 2).all()


def test_jsonl_and_parquet_hold_documents(tmp_path, tokenizer):
    import pyarrow
    from pyarrow import parquet

    documents = [LETTERS, "", "ABCDEFGHIJ"]
    lines = write(tmp_path, "\n".join(json.dumps({"text": d}) for d in documents if d), "documents.jsonl")
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "documents.parquet")
    plain = write(tmp_path, LETTERS + "\n\nABCDEFGHIJ")
    expected = tokens_of(plain, tokenizer)
    assert torch.equal(tokens_of(lines, tokenizer), expected)
    assert torch.equal(tokens_of(tmp_path / "documents.parquet", tokenizer), expected)


def test_dataset_is_streamed(tmp_path, tokenizer):
    (tmp_path / "set").mkdir()
    write(tmp_path, "\n".join(json.dumps({"text": LETTERS}) for _ in range(50)), "set/validation.jsonl")
    arguments = dict(dataset=f"{tmp_path / 'set'}::validation", tokens=32, sequence_length=8)
    windows = calibration_sequences("tiny", tokenizer, Calibration(**arguments)).tokens
    assert windows.shape == (4, 8)
    assert torch.equal(windows, calibration_sequences("tiny", tokenizer, Calibration(**arguments)).tokens)


def test_dataset_out_of_reach_names_the_switch(tokenizer, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SurgeryError, match=r"dataset some/set:en:test cannot be read: offline.*HF_HUB_OFFLINE.*--text"):
        calibration_sequences("tiny", tokenizer, Calibration(dataset="some/set:en:test", tokens=32, sequence_length=8))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n ", "the text is empty"),
        ("short.txt", b"abcde", "5 tokens are fewer than one window of 8.*--seq-len"),
        ("latin.txt", b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
        ("wrong.jsonl", b'{"text": "a"}\n{"words": 1}', 'wrong.jsonl, line 2: no "text" in it; it has words'),
        ("broken.jsonl", b'{"text": ', "broken.jsonl, line 1"),
        ("broken.parquet", b"PAR1 no", "broken.parquet: cannot be read as parquet"),
    ],
)
def test_bad_text(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SurgeryError, match=message):
        tokens_of(tmp_path / name, tokenizer)


def test_bad_arguments(tmp_path, tokenizer):
    with pytest.raises(SurgeryError, match=r"none.txt: no such text file"):
        tokens_of(tmp_path / "none.txt", tokenizer)
    with pytest.raises(SurgeryError, match="text or dataset, not both"):
        Calibration(text="a", dataset="b")
    with pytest.raises(SurgeryError, match="7 tokens are less than one sequence of 8"):
        Calibration(tokens=7, sequence_length=8)
    with pytest.raises(SurgeryError, match=r"tiny: no calibration text; give --text FILE"):
        calibration_sequences("tiny", tokenizer, Calibration(tokens=32, sequence_length=8))


@pytest.mark.parametrize(("count", "fraction", "held"), [(10, 0.2, [2, 7]), (2, 0.01, [1]), (4, 0.9, [0, 2, 3])])
def test_what_is_held_out_is_spread_over_the_text(count, fraction, held):
    assert held_out(["prose"] * count, fraction).nonzero().flatten().tolist() == held


def test_of_each_kind_its_part_is_held_out():
    kinds = ["prose", "code"] * 16  # every other sequence: even steps over all of them would meet one kind alone
    mask = held_out(kinds, 0.125)
    assert sorted(kind for kind, held in zip(kinds, mask, strict=True) if held) == ["code"] * 2 + ["prose"] * 2


def test_one_window_cannot_be_split():
    with pytest.raises(SurgeryError, match="1 calibration sequence cannot be split"):
        held_out(["prose"], 0.5)


# --- text sampled from the model itself ---


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])  # mistral slides over a window shorter than the text
def test_greedy_sampling_equals_the_slow_way(family, tokenizer, monkeypatch):
    openers = ("ab", "cdefg", "h")
    monkeypatch.setitem(KINDS, "prose", Kind({"": openers}))
    model = tiny_model(family)
    wanted = SelfText(60, 20, sampling=Sampling(top_k=1), kinds=("prose",))
    text = sample_self_text(model, tokenizer, wanted).tokens
    assert text.shape == (3, 20)
    banned = torch.tensor(tokenizer.all_special_ids)
    said = {tuple(tokenizer(opener, add_special_tokens=False)["input_ids"]): opener for opener in openers}
    begun = [next(text for ids, text in said.items() if tuple(row[1 : 1 + len(ids)].tolist()) == ids) for row in text]
    assert sorted(begun) == sorted(openers), "each opener once before any comes again"
    for row, opener in zip(text, begun, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(opener, add_special_tokens=False)["input_ids"]]
        while len(ids) < 20:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(logits.index_fill(0, banned, -torch.inf).argmax().item())
        assert row.tolist() == ids


def test_sampling_is_reproducible_and_leaves_the_global_generator_alone(tokenizer):
    model = tiny_model("llama")
    state = torch.random.get_rng_state()
    first, again, other = (
        sample_self_text(model, tokenizer, SelfText(640, 64, seed=s, batch=4)).tokens for s in (0, 0, 1)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (10, 64)
    assert not torch.isin(first[:, 1:], torch.tensor([1, 2])).any(), "special tokens were drawn"
    assert not first.is_inference()


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01]).log().expand(40000, 5)
    drawn = self_text._draw(logits, Sampling(temperature=1.0, min_p=0.1, top_k=4), generator)
    # 0.04 and 0.01 are less than a tenth of 0.5.
    expected = torch.tensor([0.5, 0.3, 0.15, 0, 0]) / 0.95
    torch.testing.assert_close(drawn.bincount(minlength=5) / 40000, expected, atol=0.01, rtol=0)


def test_tokens_beyond_the_tokenizer_are_never_drawn(tokenizer):
    model = tiny_model("llama", vocab_size=80)
    assert sample_self_text(model, tokenizer, SelfText(320, 16)).tokens.max() < 64


def test_tokenizer_without_bos_or_eos(tokenizer):
    model = tiny_model("llama")
    tokenizer.bos_token = None
    assert sample_self_text(model, tokenizer, SelfText(16, 8)).tokens[:, 0].tolist() == [2, 2]
    tokenizer.eos_token = None
    starts = sample_self_text(model, tokenizer, SelfText(160, 8)).tokens[:, 0]
    assert len(starts.unique()) > 3


def test_self_text_is_kept_on_disk(tokenizer, tmp_path):
    model = tiny_model("llama")
    loads = []

    def load():
        loads.append(1)
        return model

    def get(fingerprint="a", tokens=32):
        return calibration_sequences(
            "tiny", tokenizer, Calibration(tokens=tokens, sequence_length=16), model=load, fingerprint=fingerprint
        ).tokens

    first, again = get(), get()
    assert torch.equal(first, again) and len(loads) == 1
    get(fingerprint="b")
    get(tokens=64)
    assert len(loads) == 3
    files = list((tmp_path / "cache" / "self").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(b"damaged")
    assert torch.equal(get(), first) and len(loads) == 4
    line = Calibration(tokens=32, sequence_length=16).describe(Sequences(first, ("prose", "code")))
    assert line == "calibration: 32 tokens sampled from the model itself (no --text given): prose 50 %, code 50 %"


def test_an_unwritable_cache_is_no_error(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "file"))
    windows = calibration_sequences(
        "tiny", tokenizer, Calibration(tokens=32, sequence_length=16), model=tiny_model("llama")
    ).tokens
    assert windows.shape == (2, 16)


def test_fingerprint_tells_weights_apart():
    model = tiny_model("llama")
    assert model_fingerprint(model) == model_fingerprint(tiny_model("llama"))
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[5, 7] += 1e-3
    assert model_fingerprint(other) != model_fingerprint(model)


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("self") == tmp_path / "cache" / "self"
    monkeypatch.delenv("LLMSURGEON_CACHE")
    assert cache_folder("self") == tmp_path / "xdg" / "llmsurgeon" / "self"


def test_sampling_errors(tokenizer):
    model = tiny_model("gpt2")
    with pytest.raises(SurgeryError, match="sequences of 129 tokens, the model's limit is 128"):
        sample_self_text(model, tokenizer, SelfText(129, 129))
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(SurgeryError, match=r"ln_f.weight holds NaN"):
        sample_self_text(model, tokenizer, SelfText(16, 8))


def test_sentences_are_padded_and_headings_are_left_out(tmp_path):
    tokenizer = encoder_tokenizer()
    tokenizer.pad_token = "\n"
    text = " = A heading that is not a sentence but as long as one = \n" + " ".join(
        f"Sentence {LETTERS[i]} has some more words in it, enough of them{' and more' * (i % 3)}." for i in range(26)
    )
    windows = tokens_of(write(tmp_path, text), tokenizer, tokens=800, sequence_length=80, sentences=True)
    assert windows.shape == (10, 80)
    starts, found = set(), [row[row != tokenizer.pad_token_id].tolist() for row in windows]
    for row, ids in zip(windows.tolist(), found, strict=True):
        assert row == ids + [tokenizer.pad_token_id] * (80 - len(ids))
        said = next(s for s in re.split(r"(?<=[.])\s", text.split("\n")[1]) if tokenizer(s)["input_ids"][:80] == ids)
        starts.add(said)
    assert len(starts) == 10


def test_text_without_sentences_and_tokenizers_without_padding_are_refused(tmp_path):
    words = write(tmp_path, "words without an end " * 20)
    encoders = encoder_tokenizer()
    with pytest.raises(SurgeryError, match="no padding token"):
        tokens_of(words, encoders, sentences=True)
    encoders.pad_token = "\n"
    with pytest.raises(SurgeryError, match="the text has no sentence"):
        tokens_of(words, encoders, sentences=True)
