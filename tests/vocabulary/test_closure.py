"""A trimmed tokenizer cuts kept text as its parent does, and can still write everything else."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmsurgeon.checkpoint.tokenizer_json import tokens_of
from llmsurgeon.errors import SurgeryError
from llmsurgeon.vocabulary.closure import MergeTrees, closed
from llmsurgeon.vocabulary.keep import Wish, chosen
from llmsurgeon.vocabulary.tokenizer_files import trimmed_description
from tests.odd_text import odd_lines
from tests.vocabulary.conftest import KINDS, corpus, description_of, tokenizer_of


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def trimmed_to(kind: str, texts: list[str], **how) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer without what `texts` do not need, and where ids went."""
    parent = tokenizer_of(kind)
    counts = Counter(i for text in texts for i in ids_of(parent, text))
    vocabulary = chosen(description_of(parent), Wish(set(counts), counts), parent.get_vocab_size(), **how)
    made = Tokenizer.from_str(json.dumps(trimmed_description(description_of(parent), vocabulary)))
    return made, vocabulary.moved


def same(kind: str, texts: list[str]) -> None:
    parent = tokenizer_of(kind)
    made, moved = trimmed_to(kind, texts, multiple_of=1)
    assert made.get_vocab_size() == len(moved) < parent.get_vocab_size()
    for text in texts:
        assert ids_of(made, text) == [moved[i] for i in ids_of(parent, text)], text
        with_special = parent.encode(text).ids
        assert made.encode(text).ids == [moved[i] for i in with_special]


def test_kept_text_is_cut_as_before(kind: str) -> None:
    same(kind, corpus()[:60])
    same(kind, odd_lines(40, seed=11))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.text(max_size=40), min_size=1, max_size=5), st.integers(0, 99))
def test_any_kept_text_is_cut_as_before(kind: str, texts: list[str], seed: int) -> None:
    same(kind, [*texts, *odd_lines(5, seed=seed)])


def test_other_text_reads_back(kind: str) -> None:
    parent = tokenizer_of(kind)
    made, _ = trimmed_to(kind, corpus()[:10], multiple_of=1)
    for text in [*odd_lines(120, seed=3), *corpus()[100:160]]:
        assert made.decode(ids_of(made, text)) == parent.decode(ids_of(parent, text)), text


def test_bytes_stay_whole() -> None:
    for kind in ("byte-level", "byte-level, whole words", "sentence-piece"):
        made, _ = trimmed_to(kind, ["a"], multiple_of=1)
        for text in ("漢字 🤷🏽‍♀️", "\x00\x7f", "Ωmega"):
            assert made.decode(ids_of(made, text)) == text


def test_merge_trees_are_those_of_the_tokenizer() -> None:
    """Every token that merges make has a tree that ends in it; the slow way is to encode it."""
    for kind in ("byte-level", "sentence-piece"):
        model = description_of(tokenizer_of(kind))["model"]
        trees = MergeTrees(model)
        alone = Tokenizer.from_str(
            json.dumps({"version": "1.0", "added_tokens": [], "model": {**model, "byte_fallback": False}})
        )
        for token, i in tokens_of(model).items():
            tree = trees.tree(token)
            assert (tree is not None) == (ids_of(alone, token) == [i]), token
            assert tree is None or i in tree


def test_without_the_tree_a_token_is_lost() -> None:
    """What closure is for: keep a long token and the bytes alone, and its text falls apart."""
    description = description_of(tokenizer_of("byte-level"))
    model = description["model"]
    token, i = max(tokens_of(model).items(), key=lambda entry: len(entry[0]))
    tree = MergeTrees(model).tree(token)
    assert tree is not None and len(tree) > len(set(token)) + 1
    assert tree <= closed(model, {i})


def test_rows_fill_up_by_use_then_by_number() -> None:
    parent = tokenizer_of("byte-level")
    texts = corpus()[:200]
    counts = Counter(i for text in texts for i in ids_of(parent, text))
    often = {i for i, count in counts.items() if count >= 5}
    few = chosen(description_of(parent), Wish(often, counts), parent.get_vocab_size(), multiple_of=1)
    more = chosen(description_of(parent), Wish(often, counts), parent.get_vocab_size(), rows=len(few.kept) + 40)
    assert set(few.kept) < set(more.kept) and len(more.kept) == len(few.kept) + 40
    added = set(more.kept) - set(few.kept)
    left = [count for i, count in counts.items() if i not in more.kept]
    # Every token that filled up was used as often as any that did not, or is part of one that was.
    assert max(left, default=0) <= max(counts[i] for i in added)
    assert len(chosen(description_of(parent), Wish(often, counts), parent.get_vocab_size()).kept) % 64 == 0


def test_too_few_rows_say_how_many() -> None:
    parent = tokenizer_of("byte-level")
    counts = Counter(ids_of(parent, " ".join(corpus()[:50])))
    needed = len(chosen(description_of(parent), Wish(set(counts)), parent.get_vocab_size(), multiple_of=1).kept)
    with pytest.raises(SurgeryError, match=f"{needed:,}"):
        chosen(description_of(parent), Wish(set(counts)), parent.get_vocab_size(), rows=needed - 1)
    with pytest.raises(SurgeryError, match="would stay"):
        chosen(description_of(parent), Wish(set()), parent.get_vocab_size(), rows=parent.get_vocab_size())


def test_other_kinds_are_refused() -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}}
    with pytest.raises(SurgeryError, match="WordLevel"):
        closed(model, {0})
    with pytest.raises(SurgeryError, match="end_of_word_suffix"):
        closed({"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}, {0})
