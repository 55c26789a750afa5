"""Training text: packing, the cache, the order, and what is left out of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer

from llmsurgeon.errors import SurgeryError
from llmsurgeon.healing.distill.data import (
    Corpus,
    Rows,
    Text,
    packed,
    read_rows,
    rows_of,
    training_rows,
    without_overlap,
)
from llmsurgeon.operations.distill import Distill, Source
from llmsurgeon.text.sequences import Sequences
from llmsurgeon.text.wanted import Calibration


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ids(text):
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def rows(count, length=4, start=0, **more):
    tokens = np.arange(start, start + count * length, dtype=np.uint32).reshape(count, length)
    return Rows(f"rows of {start}", str(start), tokens, **more)


def test_documents_are_packed_one_after_the_other_and_parted():
    """The byte tokenizer's start token parts documents; what does not fill a row is left out."""
    found = list(packed([["abc", "def"], ["ghi"]], byte_tokenizer(), 4, 100))
    stream = [1, *ids("abcdef"), 1, *ids("ghi")]
    assert found == [stream[0:4], stream[4:8]]


def test_packing_stops_at_the_limit():
    assert len(list(packed([["abcdefgh" * 10]], byte_tokenizer(), 4, 11))) == 2


def test_every_kind_of_file_holds_documents(tmp_path):
    import pandas

    (tmp_path / "a.txt").write_text("abc def\n" * 20)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "abc def\n"}) + "\n" for _ in range(20)))
    pandas.DataFrame({"text": ["abc def\n"] * 20}).to_parquet(tmp_path / "a.parquet")
    found = {
        kind: read_rows(byte_tokenizer(), 5, Text(text=str(tmp_path / f"a.{kind}")))
        for kind in ("txt", "jsonl", "parquet")
    }
    assert found["txt"].tokens[0].tolist() == [1, *ids("abc ")]
    assert found["jsonl"].tokens.tolist() == found["parquet"].tokens.tolist()
    assert (found["jsonl"].tokens == 1).sum() > (found["txt"].tokens == 1).sum() == 1


def test_text_is_tokenised_once_and_anew_when_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("abc def\n" * 20)
    first = read_rows(byte_tokenizer(), 5, Text(text=str(path)))
    with monkeypatch.context() as patch:
        patch.setattr("llmsurgeon.healing.distill.data.packed", lambda *a: pytest.fail("tokenised again"))
        again = read_rows(byte_tokenizer(), 5, Text(text=str(path)))
    assert again.key == first.key and np.array_equal(again.tokens, first.tokens)
    path.write_text("abc deg\n" * 20)
    assert read_rows(byte_tokenizer(), 5, Text(text=str(path))).key != first.key
    assert read_rows(byte_tokenizer(), 6, Text(text=str(path))).key != first.key


def test_a_hub_dataset_is_streamed(monkeypatch):
    seen = []

    class Stream:
        def shuffle(self, seed, buffer_size):
            return [{"text": "abcd" * 10}] * 50

    def load(name, config, split, streaming):
        seen.append((name, config, split, streaming))
        return Stream()

    monkeypatch.setattr("datasets.load_dataset", load)
    found = read_rows(byte_tokenizer(), 8, Text(dataset="owner/name:small:test", limit=100))
    assert seen == [("owner/name", "small", "test", True)] and len(found.tokens) == 12


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.txt", None, "no such text file"),
    ("short.txt", b"ab", "does not fill one row of 8"),
    ("latin.txt", b"\xe9" * 50, "not UTF-8 text"),
    ("bad.jsonl", b'{"txt": 1}\n', "line 1: no .text. in it; it has txt"),
])  # fmt: skip
def test_bad_text_is_refused_and_nothing_is_kept(tmp_path, cache, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SurgeryError, match=message):
        read_rows(byte_tokenizer(), 8, Text(text=str(tmp_path / name)))
    assert not list((cache / "tokens").glob("*")) if (cache / "tokens").exists() else True


def test_windows_are_cut_or_joined():
    windows = torch.arange(24).reshape(2, 12)
    starts = (0, 5, 12, 17)
    assert rows_of(windows, 5, "x").tokens.tolist() == [list(range(start, start + 5)) for start in starts]
    assert rows_of(windows, 24, "x").tokens.tolist() == [list(range(24))]
    with pytest.raises(SurgeryError, match="24 tokens do not fill one row of 25"):
        rows_of(windows, 25, "x")


def test_the_recipe_says_what_is_trained_on(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("abc def\n" * 50)
    windows = Sequences(torch.zeros(3, 8, dtype=torch.long), ("prose",) * 3)
    sample = lambda tokens, length, seed: torch.full((tokens // length, length), seed)  # noqa: E731

    def make(data, calibration):
        return training_rows(Distill(data=data, sequence_length=4), calibration, windows, byte_tokenizer(), sample)

    assert [r.name for r in make((Source(calibration=True),), Calibration())] == ["the parent's own text"]
    assert [r.name for r in make(None, Calibration(text=str(text)))] == [str(text)]
    assert [len(r.tokens) for r in make((Source(calibration=True, tokens=16, weight=2.0),), Calibration())] == [4]
    both = make((Source(text=str(text), weight=3.0, tokens=40), Source(sampled=16)), Calibration())
    assert [(r.name, len(r.tokens), r.weight) for r in both] == [
        (str(text), 10, 3.0),
        ("the parent's own text", 4, 1.0),
    ]
    assert both[1].tokens.tolist() == [[2] * 4] * 4


def test_every_row_comes_once_before_any_comes_again():
    corpus = Corpus([rows(7)], [np.arange(7)], seed=3)
    passes = [corpus.draw(7).tolist() for _ in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes) and passes[0] != passes[1]


def test_the_order_is_a_function_of_the_seed_and_goes_on_from_its_counts():
    def make(seed, drawn=()):
        return Corpus([rows(5), rows(9, start=100, weight=2.0)], [np.arange(5), np.arange(9)], seed, list(drawn))

    whole, other = make(1).draw(30), make(2).draw(30)
    assert whole.tolist() == make(1).draw(30).tolist() != other.tolist()
    corpus = make(1)
    ahead = corpus.upcoming(30)
    corpus.draw(13)
    assert ahead.tolist() == whole.tolist()
    assert make(1, corpus.drawn).draw(17).tolist() == whole[13:].tolist()


def test_sources_are_drawn_by_their_weights():
    corpus = Corpus([rows(5), rows(9, start=100, weight=3.0)], [np.arange(5), np.arange(9)], 0)
    drawn = corpus.draw(40)
    assert (drawn < 5).sum() == 10
    source, row = corpus.place(6)
    assert (source, row) == (1, 1) and corpus.tokens(np.array([6]))[0].tolist() == [104, 105, 106, 107]


def test_rows_that_share_text_with_the_held_out_sequences_are_left_out():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 60, (50, 64)).astype(np.uint32)
    held = torch.from_numpy(np.concatenate([tokens[7, 30:], tokens[8, :30], tokens[20]]).astype(np.int64))[None]
    clean = without_overlap(Rows("x", "x", tokens), held)
    assert sorted(set(range(50)) - set(clean.tolist())) == [7, 8, 20]


def test_a_source_of_which_nothing_is_left_is_refused():
    with pytest.raises(SurgeryError, match="nothing is left to train on"):
        Corpus([rows(3)], [np.arange(0)], 0)
