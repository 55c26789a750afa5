"""Kinds of self-sampled text: their shares, conversations by a chat template, and mixtures with text of the user's."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from conftest import byte_tokenizer, tiny_model

from llmsurgeon.text import cache
from llmsurgeon.text.calibration import calibration_sequences
from llmsurgeon.text.conversation import Turns, template_of
from llmsurgeon.text.kinds import KINDS, Kind, kinds_of, one_kind
from llmsurgeon.text.self_text import SelfText, document_start, sample_self_text
from llmsurgeon.text.sequences import spread
from llmsurgeon.text.shares import shares
from llmsurgeon.text.wanted import Calibration, Source

# Turns begin with "u:" or "a:" and end with the special token </s>.
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first }}{{ m['role'][0] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def spoken(tokenizer):
    tokenizer.add_tokens([":"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def few_kinds(monkeypatch):
    kinds = {"prose": Kind({"": ("abc", "de f")}), "code": Kind({"x": ("gh",), "y": ("i, j", "kl"), "z": ("\u00e9",)})}
    for name, kind in kinds.items():
        monkeypatch.setitem(KINDS, name, kind)


def test_shares_follow_what_the_model_finds_likely(tokenizer, few_kinds):
    """Against every opener asked about alone, a token at a time."""
    model = tiny_model("llama")
    found = shares(model, tokenizer, ("prose", "code"), 16, document_start(tokenizer), False)
    assert {(part.kind, part.variant) for part in found} == {("prose", ""), ("code", "x"), ("code", "y")}

    def weight(openers):
        nats = 0.0
        for opener in openers:
            ids = [tokenizer.bos_token_id, *tokenizer(opener, add_special_tokens=False)["input_ids"]]
            for place in range(1, len(ids)):
                with torch.no_grad():
                    logits = model(torch.tensor([ids[:place]])).logits[0, -1]
                nats -= logits.double().log_softmax(-1)[ids[place]].item()
        return math.sqrt(math.exp(-4 * nats / sum(len(opener.encode()) for opener in openers)))

    prose, x, y = (weight(KINDS[k].variants[v]) for k, v in (("prose", ""), ("code", "x"), ("code", "y")))
    code = (x * x + y * y) / (x + y)
    expected = [prose / (prose + code), *(code / (prose + code) * w / (x + y) for w in (x, y))]
    torch.testing.assert_close(list(found.values()), expected, rtol=1e-4, atol=0)


def test_what_other_languages_say_is_measured_in_english_bytes(tokenizer, monkeypatch):
    """Two spellings of one meaning: the shorter one is not likelier for being short."""
    kind = Kind({"long": ("abcdefgh",), "short": ("ab",)}, meaning=("abcdefgh",))
    monkeypatch.setitem(KINDS, "languages", kind)
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    found = shares(model, tokenizer, ("languages",), 16, 1, False)
    long, short = found.values()
    assert math.log(short / long) == pytest.approx(2 * (8 - 2) * math.log(model.config.vocab_size) / 8, rel=1e-3)


def test_items_are_spread_by_their_weights():
    order = spread({"a": 5.0, "b": 3.0, "c": 2.0}, 40)
    assert Counter(order) == {"a": 20, "b": 12, "c": 8}
    for place in range(1, 41):
        counts = Counter(order[:place])
        assert all(abs(counts[k] - share * place) < 1 for k, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)))


def test_all_kinds_are_sampled_and_told_apart(tokenizer, few_kinds):
    text = sample_self_text(tiny_model("llama"), tokenizer, SelfText(16 * 24, 16, kinds=kinds_of(["prose", "code"])))
    assert text.tokens.shape == (24, 16) and set(text.kinds) == {"prose", "code"}
    openers = {name: [o for v in KINDS[name].variants.values() for o in v] for name in ("prose", "code")}
    for row, kind in zip(text.tokens, text.kinds, strict=True):
        said = "".join(tokenizer.convert_ids_to_tokens(row[1:].tolist()))
        assert any(said.startswith(opener) for opener in openers[kind])


def test_a_template_is_taken_apart(spoken):
    ids = lambda text: tuple(spoken(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    found = template_of(spoken)
    assert (found.start, found.answer, found.user) == (ids("<s>u: "), ids("</s>a: "), ids("</s>u: "))


@pytest.mark.parametrize("template", [
    None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}",
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} {% endfor %}",
])  # fmt: skip
def test_templates_that_no_conversation_can_be_sampled_from(tokenizer, template):
    tokenizer.chat_template = template
    assert template_of(tokenizer) is None
    assert set(sample_self_text(tiny_model("llama"), tokenizer, SelfText(320, 16)).kinds).isdisjoint({"chat"})


def test_conversations_take_turns(spoken):
    """Every sequence is the template with turns of at least one token; nothing else special is drawn."""
    model = tiny_model("llama", vocab_size=len(spoken))
    with torch.no_grad():
        model.lm_head.weight[2] = model.lm_head.weight.mean(0)  # the end of a turn is likely enough
    text = sample_self_text(model, spoken, SelfText(40 * 30, 40, kinds=("chat",)))
    template, ended = template_of(spoken), 0
    assert set(text.kinds) == {"chat"}
    for row in text.tokens.tolist():
        assert tuple(row[: len(template.start)]) == template.start
        place, answering = len(template.start), False
        while place < len(row):
            glue = template.user if answering else template.answer
            end = next((i for i in range(place, len(row)) if row[i] == 2), len(row))
            said = row[place:end]
            assert not set(said) & {0, 1, 2} and (said or end == len(row))
            assert answering or len(said) <= 10, "a user's turn ends after a quarter of the sequence"
            assert tuple(row[end : end + len(glue)]) == glue[: len(row) - end]
            ended += end < len(row)
            place, answering = end + len(glue), not answering
    assert ended > 30, "turns ended in most sequences"


def test_rows_without_turns_are_left_alone(spoken):
    turns = Turns(template_of(spoken), [False, True], 8)
    text = torch.full((2, 8), 2)
    before = text.clone()
    turns.heard(text, 5)
    assert text[0].tolist() == before[0].tolist() and text[1, 5:].tolist() == list(template_of(spoken).answer[:3])
    assert turns.ends(7).tolist() == [-1, -1]


def test_another_template_or_opener_is_another_text(spoken, monkeypatch):
    model, seen = tiny_model("llama", vocab_size=65), []
    monkeypatch.setattr(cache, "sample_self_text", lambda *a: seen.append(1) or sample_self_text(*a))
    get = lambda *kinds: cache.cached_self_text(lambda: model, spoken, "a", SelfText(64, 16, kinds=kinds))  # noqa: E731
    first = get("chat", "prose")
    again = get("chat", "prose")
    assert len(seen) == 1 and torch.equal(first.tokens, again.tokens) and first.kinds == again.kinds
    spoken.chat_template = TEMPLATE.replace("['role'][0]", "['role'][1]")
    get("chat", "prose")
    assert len(seen) == 2
    get("prose")
    monkeypatch.setitem(KINDS, "prose", Kind({"": ("abc",)}))
    get("prose")
    assert len(seen) == 4


def test_named_text_is_mixed_with_the_models_own(tokenizer, tmp_path):
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(letter * 2000)
    model = tiny_model("llama")
    half = Calibration(str(tmp_path / "a.txt"), tokens=16 * 20, sequence_length=16, self_share=0.5)
    text = calibration_sequences("m", tokenizer, half, model)
    assert text.kinds[::2] == ("a.txt",) * 10 and set(text.kinds[1::2]) <= set(KINDS)
    assert {row.unique().numel() == 1 or row[0] == 1 for row in text[text.named()["a.txt"]].tokens} == {True}
    sources = (Source(str(tmp_path / "a.txt"), weight=3), Source(str(tmp_path / "b.txt")), Source(kinds=("maths",)))
    text = calibration_sequences("m", tokenizer, Calibration(tokens=16 * 20, sequence_length=16, texts=sources), model)
    assert Counter(text.kinds) == {"a.txt": 12, "b.txt": 4, "maths": 4}
    line = Calibration(tokens=16 * 20, sequence_length=16, texts=sources).describe(text)
    assert "of" in line and "sampled from the model itself: a.txt 60 %" in line


def test_a_source_that_runs_out_leaves_the_others(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("a" * 40)
    wanted = Calibration(str(tmp_path / "short.txt"), tokens=16 * 20, sequence_length=16, self_share=0.5)
    text = calibration_sequences("m", tokenizer, wanted, tiny_model("llama"))
    assert text.kinds.count("short.txt") == 2 and len(text) == 12
    assert wanted.describe(text).endswith("; 320 were asked for")


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"'cod' is no kind of text.*expected all, prose, .*chat"):
        one_kind("cod")


def test_a_model_larger_than_memory_writes_no_text(tmp_path, monkeypatch, capsys):
    from conftest import save_tiny

    from llmsurgeon.errors import SurgeryError
    from llmsurgeon.planning import sources
    from llmsurgeon.planning.opened import open_model
    from llmsurgeon.planning.options import Options
    from llmsurgeon.planning.texts import Texts
    from llmsurgeon.recipe.recipe import Calibration as Asked
    from llmsurgeon.walk.memory import Room

    parent = open_model(str(save_tiny(tmp_path / "parent", "llama", tokenizer=True)))
    (tmp_path / "text.txt").write_text("abc def " * 200)
    asked = Asked(text=str(tmp_path / "text.txt"), tokens=64, sequence_length=16)
    monkeypatch.setattr(sources, "room", lambda: Room(256, "what the machine has free"))
    wanted = asked.model_copy(update={"self_share": 0.5})
    with pytest.raises(SurgeryError, match=r"whole model, .* the machine has free is 256B.*--self-share 0"):
        _ = Texts(parent, wanted, 64, Options(device="cpu")).windows
    # What nobody asked for is left out, and said.
    alone = Texts(parent, asked, 64, Options(device="cpu"))
    assert set(alone.sequences.kinds) == {"text.txt"}
    assert alone.wanted.self_share == 0
    assert "none is sampled beside the text" in capsys.readouterr().err
    # What counts is the dtype that it computes in.
    between = Room(parent.checkpoint.nbytes(torch.float32) * 3 // 4, "what the machine has free")
    monkeypatch.setattr(sources, "room", lambda: between)
    with pytest.raises(SurgeryError, match="whole model"):
        _ = Texts(parent, wanted, 64, Options(device="cpu", dtype=torch.float32)).windows
    assert len(Texts(parent, wanted, 64, Options(device="cpu", dtype=torch.bfloat16)).windows)
