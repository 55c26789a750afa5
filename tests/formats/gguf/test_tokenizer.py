"""Tokenizers of GGUF files: cut as llama.cpp cuts, there and back again."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from gguf_models import SIZES, SPECIAL, byte_level_tokenizer, export
from odd_text import odd_lines

from llmsurgeon.checkpoint.gguf.file import GGUFFile
from llmsurgeon.checkpoint.gguf.pretokenizers import BY_NAME, PRE_TOKENIZERS, recognise, to_tokenizer_json
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.gguf.tokenizer import tokenizer_fields
from llmsurgeon.formats.loading import load_tokenizer

TRAINING = odd_lines(1500, seed=7)
NAMES = [pre.name for pre in PRE_TOKENIZERS]
# Where llama.cpp's own code differs: see `caveat` in the table.
BEYOND_ASCII_SPACE = re.compile(r"[^\x00-\x7f]")


def described(folder: Path) -> Path:
    """Beside a config.json, which transformers asks for the kind of model."""
    folder.mkdir(exist_ok=True)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def fields_of(folder: Path, rows: int = 2000, **options) -> dict:
    described(folder)
    return {field.key: field.value for field in tokenizer_fields(folder, rows, **options).fields}


def save(folder: Path, name: str, size: int = 2000, cross: bool = True) -> Path:
    """A tokenizer with the pre-tokenizer `name`; `cross`: its merges cross where that would cut."""
    pre = BY_NAME[name]
    tokenizer = byte_level_tokenizer(TRAINING, size, to_tokenizer_json(pre), pre.whole_words)
    if not cross:
        tokenizer = tokenizer.train_new_from_iterator(TRAINING, size, new_special_tokens=SPECIAL)
    tokenizer.save_pretrained(folder)
    return folder


def save_model(folder: Path, vocab: int) -> None:
    from conftest import tiny_model

    sizes = {**SIZES, "hidden_size": 32, "vocab_size": vocab, "num_hidden_layers": 1}
    tiny_model("llama", **sizes).save_pretrained(folder)


def differing(folder: Path, lines: list[str]) -> list[str]:
    """The lines that llama.cpp reads as other tokens than the `tokenizers` package does."""
    from tokenizers import Tokenizer

    from llmsurgeon.evaluation.llama_server import LlamaCpp

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    save_model(folder, tokenizer.get_vocab_size(with_added_tokens=True))
    made = export(folder, folder / "model.gguf", type="F16")
    with LlamaCpp(made.path, context=256, threads=1) as engine:
        return [line for line in lines if engine.tokenize(line) != tokenizer.encode(line, add_special_tokens=False).ids]


@pytest.mark.parametrize("name", NAMES)
def test_llamacpp_cuts_where_tokenizers_does(name, tmp_path):
    pytest.importorskip("xllamacpp")
    # Falcon's last steps act on the bytes' stand-ins; only merges that crossed them could tell.
    folder = save(tmp_path, name, cross=name != "falcon")
    lines = odd_lines(500)
    if "combining marks" in BY_NAME[name].caveat:
        kinds = {line: {unicodedata.category(c) for c in line if not c.isascii()} for line in lines}
        lines = [line for line in lines if not kinds[line] & {"Mn", "Mc", "Me", "Lu", "Lt"}]
    elif BY_NAME[name].caveat:
        lines = [line for line in lines if not BEYOND_ASCII_SPACE.search(line)]
        if name == "deepseek-llm":  # runs of digits are one word there; the model has no merges of digits
            lines = [line for line in lines if not re.search(r"\d\d", line)]
    assert len(lines) >= 10
    assert differing(folder, lines) == []


@pytest.mark.parametrize("name", NAMES)
def test_pre_tokenizers_are_recognised_and_come_back(name, tmp_path):
    folder = save(tmp_path / "model", name, size=400)
    description = json.loads((folder / "tokenizer.json").read_text())
    assert recognise(description["pre_tokenizer"], BY_NAME[name].whole_words) is BY_NAME[name]
    assert fields_of(folder)["tokenizer.ggml.pre"] == name
    save_model(folder, 400)
    made = export(folder, tmp_path / "model.gguf")
    before, after = load_tokenizer(str(folder)), load_tokenizer(str(made.path))
    lines = odd_lines(200, composed=True)
    assert [after(line)["input_ids"] for line in lines] == [before(line)["input_ids"] for line in lines]
    assert (after.bos_token, after.eos_token) == ("<s>", "</s>")


def test_other_spellings_of_one_regex():
    qwen2 = BY_NAME["qwen2"]
    (split, byte_level) = to_tokenizer_json(qwen2)["pretokenizers"]
    regex = split["pattern"]["Regex"].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
    regex = regex.replace(r"\p{N}|", r"\p{N}{1}|").replace(r"\r\n", "\r\n")
    other = {**split, "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
    assert recognise({"type": "Sequence", "pretokenizers": [other, byte_level]}, False) is qwen2


@pytest.mark.parametrize(
    "pre",
    [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Whitespace"},
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "UnicodeScripts"},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
    ],
)
def test_unknown_pre_tokenizers_are_refused_and_can_be_named(pre, tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pre_tokenizer": pre}))
    with pytest.raises(SurgeryError, match=r"none of the names known here cuts text as this .* pass --pre NAME"):
        fields_of(tmp_path)
    assert fields_of(tmp_path, pre="gpt-2")["tokenizer.ggml.pre"] == "gpt-2"


def test_bytes_alone_are_refused(tmp_path):
    """A file without merges has no key for them, and llama.cpp does not load it."""
    byte_level_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text())
    description["model"]["merges"] = []
    path.write_text(json.dumps(description))
    with pytest.raises(
        SurgeryError, match=r"its tokens are bytes that nothing merges, and llama\.cpp's BPE wants a merge"
    ):
        fields_of(tmp_path)


def test_kinds_that_llamacpp_does_not_know(tmp_path):
    from conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match="no counterpart of a WordLevel tokenizer"):
        fields_of(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SurgeryError, match=r"its tokenizer cannot be loaded .*the folder has no tokenizer\.json; copy"):
        fields_of(tmp_path / "nothing")


def test_special_tokens_types_and_padding(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    fields = fields_of(tmp_path, rows=300)
    count = len(tokenizer)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[: len(SPECIAL)] == SPECIAL and types[: len(SPECIAL)] == [3] * len(SPECIAL)
    assert tokens[count - 1] == "<tool>" and types[count - 1] == 4
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, 300)] and types[count:] == [5] * (300 - count)
    assert set(types[len(SPECIAL) : count - 1]) == {1}
    ids = {k.split(".")[-1]: v for k, v in fields.items() if k.endswith("_token_id")}
    assert ids == {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 4, "eot_token_id": 3}
    assert fields["tokenizer.ggml.add_bos_token"] is fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    notes = tokenizer_fields(described(tmp_path), 270).notes
    assert len(notes) == 1 and re.match(r"the model has no embedding for \d+ of its tokens", notes[0])


@pytest.mark.parametrize("end", [False, True])
def test_tokens_around_a_text(end, tmp_path):
    from tokenizers import processors

    tokenizer = byte_level_tokenizer()
    single = "<s> $A </s>" if end else "<s> $A"
    template = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path / "model")
    fields = fields_of(tmp_path / "model")
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is end
    save_model(tmp_path / "model", 280)
    again = load_tokenizer(str(export(tmp_path / "model", tmp_path / "model.gguf").path))
    assert again("the cat")["input_ids"] == load_tokenizer(str(tmp_path / "model"))("the cat")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 7)]
    )
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(SurgeryError, match="token 7 is put at the start of a text, the start token is 0"):
        fields_of(tmp_path / "other")


def test_notes_say_where_llamacpp_differs(tmp_path):
    tokenizer = byte_level_tokenizer(["a</s>b </s> </s>"] * 9)
    path = tmp_path / "tokenizer.json"
    tokenizer.save_pretrained(tmp_path)
    description = json.loads(path.read_text())
    description["normalizer"] = {"type": "NFC"}
    description["added_tokens"][2]["lstrip"] = True
    path.write_text(json.dumps(description))
    notes = " ".join(tokenizer_fields(described(tmp_path), 300).notes)
    assert "does not compose characters" in notes and "does not drop the spaces beside special tokens" in notes
    description["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(description))
    with pytest.raises(SurgeryError, match="no counterpart of the normalizer Lowercase"):
        fields_of(tmp_path)


PIECES = ["▁t", "he", "▁the", "▁c", "at", "▁cat", "▁▁", "▁▁▁▁", "hee", "in", "ing", "▁in", "th", "ét", "123"]


def sentence_piece(folder: Path, prefix: bool = True, merges=None, pieces=PIECES) -> Path:
    """A tokenizer as made from a SentencePiece model: pieces with every way to halve them, bytes for the rest."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("▁the catinég123"))[1:]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *pieces]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [
        (piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece)) if {piece[:i], piece[i:]} <= set(vocab)
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    description = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **special} for i in range(3)],
        "normalizer": prepend if prefix else replace,
        "pre_tokenizer": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges or pairs,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    tokenizer = Tokenizer.from_str(json.dumps(description))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece(prefix, tmp_path):
    folder = sentence_piece(tmp_path / "model", prefix)
    fields = fields_of(folder, rows=300)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is prefix
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[258] == 6 and types[259] == 1 and types[-1] == 5
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert 0 == scores["▁t"] > scores["he"] > scores["▁the"] > scores["a"] == scores["123"]
    save_model(folder, 300)
    again = load_tokenizer(str(export(folder, tmp_path / "model.gguf").path))
    before = load_tokenizer(str(folder))
    lines = [*odd_lines(300), "the cat  in  the thing", "théee    123", "  <s>the", ""]
    encoded = [before(line, add_special_tokens=False)["input_ids"] for line in lines]
    assert [again(line, add_special_tokens=False)["input_ids"] for line in lines] == encoded


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_in_llamacpp(prefix, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = sentence_piece(tmp_path, prefix)
    assert differing(folder, [*odd_lines(300), "the cat  in  the thing", "théee    123", "  <s>the"]) == []


def unigram(folder: Path, scheme: str) -> Path:
    """A Unigram tokenizer of frequent stretches of text. Made by hand: training breaks ties by chance."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = "".join(line for line in TRAINING[:300] if not set("<▁") & set(line)).replace(" ", "▁")
    counts = Counter(text[i : i + n] for n in range(1, 6) for i in range(len(text) - n))
    pieces = [*sorted(set(text)), *(piece for piece, _ in counts.most_common(900) if len(piece) > 1)]
    # No two ways to cut a word have one score.
    vocab = {piece: math.log(counts[piece] / len(text)) - i * math.pi / 1000 for i, piece in enumerate(pieces)}
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *vocab.items()], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_unigram(scheme, tmp_path):
    loaded = tokenizer_fields(described(unigram(tmp_path, scheme)), 1500)
    assert {field.key: field.value for field in loaded.fields}["tokenizer.ggml.model"] == "t5"
    assert any("puts a space behind special tokens" in note for note in loaded.notes) is (scheme == "first")


def test_merges_that_sentence_piece_would_not_make(tmp_path):
    half = sentence_piece(tmp_path / "a", merges=[("t", "h"), ("▁", "t"), ("h", "e"), ("▁t", "he")])
    with pytest.raises(SurgeryError, match="has halves that no merge joins: llama"):
        fields_of(half)
    order = [("t", "h"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("▁th", "e")]
    with pytest.raises(SurgeryError, match="the merges of piece '▁the' are not next to one another"):
        fields_of(sentence_piece(tmp_path / "b", merges=[*order[:4], order[4], order[5]], pieces=[*PIECES, "▁th"]))


def test_phi3_strips_by_its_name(tmp_path):
    folder = tmp_path / "model"
    byte_level_tokenizer().save_pretrained(folder)
    plain = tokenizer_fields(described(folder), 300)
    assert plain.model_name("my-phi3-pruned") == "my-Phi 3-pruned" and plain.model_name("llama") == "llama"
    description = json.loads((folder / "tokenizer.json").read_text())
    description["added_tokens"].append({**description["added_tokens"][0], "id": 280, "content": "<unk>"})
    for token in description["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    (folder / "tokenizer.json").write_text(json.dumps(description))
    strips = tokenizer_fields(folder, 300)
    assert strips.strips and strips.notes == [] and strips.model_name("mini") == "mini (Phi-3 tokenizer)"


def test_fields_of_a_gguf_source_are_taken_over_with_their_types(tmp_path):
    from gguf import GGUFValueType

    folder = save(tmp_path / "model", "smollm", size=400)
    save_model(folder, 400)
    first = export(folder, tmp_path / "first.gguf")
    second = export(first.path, tmp_path / "second.gguf", type="F16")
    before, after = GGUFFile(first.path), GGUFFile(second.path)
    keys = [key for key in before.metadata if key.startswith("tokenizer.")]
    assert keys and [key for key in after.metadata if key.startswith("tokenizer.")] == keys
    assert all(after.metadata[key] == before.metadata[key] and after.kinds[key] == before.kinds[key] for key in keys)
    assert after.kinds["tokenizer.ggml.token_type"] == (GGUFValueType.ARRAY, GGUFValueType.INT32)
    with pytest.raises(SurgeryError, match="its tokenizer has 400 tokens, the model 401 embeddings"):
        tokenizer_fields(first.path, 401)


def test_unknown_names_in_gguf_files(tmp_path):
    folder = save(tmp_path / "model", "qwen2", size=400)
    save_model(folder, 400)
    made = export(folder, tmp_path / "model.gguf", pre="kimi-k2")
    with pytest.raises(
        CheckpointError, match=r"its pre-tokenizer 'kimi-k2' is not known here.*known are a\.x-4\.0, bloom, "
    ):
        load_tokenizer(str(made.path))
