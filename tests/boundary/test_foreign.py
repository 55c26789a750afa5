"""Foreign input becomes plain values or one message that says what, where and what to do."""

from __future__ import annotations

import json
import re

import pytest
from conftest import SMALL, byte_tokenizer, save_tiny

from llmsurgeon.boundary.foreign import (
    check_token_ids,
    foreign,
    local_path,
    parsed_json,
    printable,
    read_json,
    token_ids,
)
from llmsurgeon.errors import CheckpointError, RecipeError, SurgeryError
from llmsurgeon.formats.devices import chosen_device
from llmsurgeon.formats.loading import load_tokenizer

SHORT = ("--tokens", "64", "--seq-len", "16")


@pytest.mark.parametrize(("text", "said"), [
    ("{", "not JSON"),
    ("", "not JSON"),
    ('{"a": ' + "1" * 5000 + "}", "a number of 5,000 digits, expected at most 40"),
    ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested deeper than 200 levels"),
    ('{"a": "\\ud800"}', "no Unicode text"),
])  # fmt: skip
def test_json_that_is_none(text, said):
    with pytest.raises(CheckpointError, match=f"^config.json: .*{said}"):
        parsed_json(text, "config.json")


def test_json_is_read_as_it_stands():
    text = '{"a": 1000000000000000019884624838656, "b": "\\ud83d\\ude00", "c": NaN, "d": [[[1.5]]]}'
    assert repr(parsed_json(text, "x")) == repr(json.loads(text))


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00}\x00", b"\xff{}"])
def test_a_file_that_is_no_utf8(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as UTF-8 text"):
        read_json(tmp_path / "config.json")


def test_a_file_that_is_a_folder_or_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing; a checkpoint folder has a config.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="expected a file, this is a folder"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 300, "\ud800", "a\udcff", "~nobody-of-this-name/x"])
def test_what_is_no_path(name):
    with pytest.raises(SurgeryError, match=r"cannot be used as a path .*; name another one"):
        local_path(name)


class PanicException(BaseException):
    """Of the name and kind that Rust code panics with."""


@pytest.mark.parametrize("error", [
    KeyError("x"), AttributeError("no"), Exception("x"), RecursionError(), MemoryError(),
    PanicException("index out of bounds"),
])  # fmt: skip
def test_what_a_library_raises_is_one_message(error):
    with pytest.raises(CheckpointError, match=r"^a/config.json: cannot be built \(.+\); correct it$") as caught:  # noqa: SIM117
        with foreign("a/config.json", "cannot be built", "correct it"):
            raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(1), RecipeError(["x"]), SurgeryError("already said")]
)
def test_what_is_none_of_a_librarys_errors_passes(error):
    with pytest.raises(type(error)) as caught, foreign("a", "b", "c"):
        raise error
    assert caught.value is error


def test_messages_hold_no_control_characters(folder, run):
    code, _, err = run("eval", "parent", "--text", "a\x1b[31m\u202etxt")
    assert code == 2 and err == "error: a\\x1b[31m\\u202etxt: no such text file\n"


def test_token_ids_beyond_the_embedding():
    check_token_ids(0, 63, 64, "model")
    with pytest.raises(SurgeryError, match="model: token ids from 3 to 64, its vocabulary has 64"):
        check_token_ids(3, 64, 64, "model")


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "", "meta"])
def test_devices_that_are_not_there(name):
    with pytest.raises(SurgeryError, match=r"cannot be used here .*expected auto, cpu"):
        chosen_device(name)
    chosen_device("cpu")


def with_field(folder, key, value):
    """The folder with one field of its config.json changed."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    return folder


@pytest.mark.parametrize(("key", "value", "said"), [
    ("model_type", 7, "model_type must be a text, found the number 7"),
    ("architectures", "LlamaForCausalLM", "architectures must be a list of texts"),
    ("architectures", [None], "architectures must be a list of texts"),
    ("quantization_config", 5, "quantization_config must be an object, found the number 5"),
    ("torch_dtype", "bfloat", "torch_dtype must be the name of a dtype"),
    ("text_config", [], "text_config must be an object"),
    ("layer_types", "full_attention", "layer_types must be a list of texts"),
    ("sliding_window", "8", "sliding_window must be a whole number, found the text '8'"),
    ("block_configs", [5], "block_configs must be a list of objects"),
    ("block_configs", [{"attention": 5, "ffn": {"no_op": False}}], r"block_configs\[0\].attention must be an object"),
    ("block_configs", [{"attention": {}, "ffn": {"no_op": False}}], r"block_configs\[0\].attention.no_op must be true"),
    ("block_configs", [{"attention": {"no_op": True}, "ffn": {"no_op": False, "ffn_mult": float("inf")}}],
     r"block_configs\[0\].ffn.ffn_mult must be a finite number"),
    ("block_configs", [{"attention": {"no_op": True}, "ffn": {"no_op": True}, "parents": 3}],
     r"\[0\].parents must be a list"),
    ("hidden_act", "nonsense", "transformers cannot build this llama model .*nonsense"),
    ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 1e4}, "nonsense"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0.0}, "rotary frequencies are not finite"),
    ("rms_norm_eps", "small", "does not describe a llama model"),
    ("num_attention_heads", 0, "num_attention_heads|does not describe|cannot build"),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_config_fields_of_another_kind(folder, run, key, value, said, verb):
    with_field(folder / "parent", key, value)
    code, _, err = run(verb, "parent")
    assert code == 2 and re.search(said, err) and "config.json" in err, err


VERBS = {
    "analyze": ("analyze", "parent", "-o", "OUT", *SHORT, "--text", "text.txt"),
    "eval": ("eval", "parent", *SHORT, "--text", "text.txt"),
    "fuse": ("fuse", "parent", "--drop-count", "1", "-o", "OUT", "--text", "text.txt", *SMALL),
    "ternary": ("ternary", "parent", "--share", "0.5", "-o", "OUT", "--text", "text.txt", *SMALL),
    "heal": ("heal", "parent", "--parent", "parent", "-o", "OUT", "--minutes", "0.01", "--text", "text.txt",
             "--set", "distill.sequence_length=16", *SMALL),
    "sampled": ("analyze", "parent", "-o", "OUT", *SHORT),
}  # fmt: skip


def change_tokenizer(folder, change):
    """Rewrite tokenizer.json of a folder."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("verb", VERBS)
def test_added_tokens_without_rows_in_the_embedding(folder, run, verb):
    change_tokenizer(folder / "parent", lambda data: data["model"]["vocab"].update(e=70, n=71, T=72))
    code, _, err = run(*VERBS[verb])
    if verb == "sampled" and code == 0:
        return  # no opener of the sampled text uses them
    assert code == 2 and "its vocabulary has 64" in err and "resize_token_embeddings" in err, err
    assert not (folder / "OUT").exists()


@pytest.mark.parametrize("verb", ["analyze", "eval", "fuse", "heal"])
def test_no_tokenizer_files(folder, run, verb):
    for file in (folder / "parent").glob("tokenizer*"):
        file.unlink()
    code, _, err = run(*VERBS[verb])
    assert code == 2 and "parent: its tokenizer cannot be loaded" in err and "has no tokenizer.json; copy" in err, err


@pytest.mark.parametrize(("change", "said"), [
    ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "not a tokenizer"),
    ({"added_tokens": [{"content": "x"}]}, "not a tokenizer"),
    ({"post_processor": {"type": "nonsense"}}, "not a tokenizer"),
])  # fmt: skip
def test_trimming_the_vocabulary_of_a_damaged_tokenizer(folder, run, change, said):
    (folder / "trim.yaml").write_text("version: 1\nsteps: [{op: trim_vocab, keep: {tokens: 1}, multiple_of: 1}]\n")
    change_tokenizer(folder / "parent", lambda data: data.update(change))
    code, _, err = run("run", "trim.yaml", "parent", "-o", "OUT")
    assert code == 2 and f"tokenizer.json: {said}" in err and not (folder / "OUT").exists(), err


def test_a_sentencepiece_model_alone(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    (folder / "tokenizer.model").write_bytes(b"x")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_tokenizer(str(folder))


def test_a_damaged_tokenizer(folder, run):
    change_tokenizer(folder / "parent", lambda data: data.update(model={"type": "nonsense"}))
    code, _, err = run(*VERBS["eval"])
    assert code == 2 and "parent: its tokenizer cannot be loaded" in err and "download its files again" in err


def test_a_tokenizer_that_cannot_read_a_text():
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer._tokenizer.to_str())
    state["model"] = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "", "max_input_chars_per_word": 9, "vocab": {"a": 0}}  # noqa: E501  # fmt: skip
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert token_ids(odd, "a") == [0]
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot read the text .*UNK"):
        token_ids(odd, "z")


@pytest.mark.parametrize("arguments", [
    ("analyze", "parent", "--batch", "0"), ("analyze", "parent", "--tokens", "0"),
    ("analyze", "parent", "--seq-len", "1"),
    ("analyze", "parent", "--seed", "-1"), ("analyze", "parent", "--max-run", "0"),
    ("analyze", "parent", "--drop", "-1"),
    ("bench", "parent", "--batch", "0"), ("bench", "parent", "--rounds", "0"), ("bench", "parent", "--prompt", "0"),
    ("bench", "parent", "--new-tokens", "-1"), ("bench", "parent", "--threads", "100000"),
    ("bench", "parent", "--threads", "0"),
    ("bench", "parent", "--batch", "9223372036854775808"), ("eval", "parent", "--tokens", "0"),
    ("eval", "parent", "--seq-len", "0"),
    ("fuse", "parent", "--tokens", "0"), ("heal", "parent", "--parent", "parent", "--minutes", "nan"),
    ("heal", "parent", "--parent", "parent", "--set", "distill.learning_rate=.inf"),
    ("heal", "parent", "--parent", "parent", "--set", "distill.batch=1000000000"),
    ("eval", "parent", "--device", "cuda:99"), ("analyze", "parent", "--device", "nonsense"),
    ("bench", "parent", "--device", ""),
    ("fuse", "parent", "--device", "nonsense"), ("heal", "parent", "--parent", "parent", "--device", "nonsense"),
])  # fmt: skip
def test_numbers_and_devices_are_refused_before_any_work(folder, run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and len(re.findall("^(?:error|Error): ", err, re.MULTILINE)) == 1 and not out, err
    assert sorted(path.name for path in folder.iterdir()) == ["parent", "text.txt"]


@pytest.mark.parametrize("verb", ["inspect", "verify", "eval", "analyze", "bench", "export"])
def test_names_that_are_no_paths(folder, run, verb):
    rest = ("--to", "native") if verb == "export" else ()
    for name in ("n" * 300, "", "\ud800"):
        code, _, err = run(verb, name, *rest)
        assert code == 2 and "cannot be used as a path" in err, err


@pytest.mark.parametrize("verb", ["show", "cp", "check"])
def test_a_recipe_that_is_no_text(folder, run, verb):
    code, out, err = run("recipes", verb, "parent/model.safetensors", *(["copy.yaml"] if verb == "cp" else []))
    assert code == 2 and "not UTF-8 text; is this a recipe?" in err and not out
    assert not (folder / "copy.yaml").exists()


def test_a_folder_below_the_home(folder, run, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for arguments in (("verify", "~/parent"), ("inspect", "~/parent"), ("eval", "~/parent", *VERBS["eval"][2:])):
        assert run(*arguments)[0] == 0, arguments


def test_caches_of_a_user_without_a_home(folder, run, monkeypatch):
    for name in ("HOME", "LLMSURGEON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    code, _, err = run(*VERBS["sampled"])
    assert code == 2 and "no folder for caches" in err and "set LLMSURGEON_CACHE" in err, err
    assert run(*VERBS["eval"])[0] == 0  # needs none


def test_a_header_that_names_a_tensor_twice_among_many(tmp_path):
    from llmsurgeon.checkpoint.safetensors_file import SafetensorsFile

    fields = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"t{i}":{fields}' for i in [*range(20_000), 19_999]) + "}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError, match="names 't19999' twice"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_the_healthy_pass(folder, run):
    for verb in ("eval", "analyze"):
        assert run(*VERBS[verb])[0] == 0


def test_names_with_half_characters_can_be_printed():
    """A folder whose name is no UTF-8 reaches Python as surrogates, which no stream takes."""
    assert printable("m\udcff\udcfe/x").encode() == rb"m\udcff\udcfe/x"


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_a_token_of_a_number_that_no_vocabulary_has(place, tmp_path, run):
    """The tokenizers library would ask for a table of that length, and abort."""
    parent = save_tiny(tmp_path / "parent", "llama", tokenizer=True)
    described = json.loads((parent / "tokenizer.json").read_text())
    if place == "vocab":
        described["model"]["vocab"]["e"] = 2**31
    else:
        described["added_tokens"].append({**described["added_tokens"][0], "content": "<far>", "id": 2**31})
    (parent / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "text.txt").write_text("a b c. " * 400)
    code, _, err = run("eval", parent, "--text", tmp_path / "text.txt", "--tokens", 128, "--seq-len", 16)
    assert code == 2 and "has the number 2147483648" in err and err.count("\n") == 1
    code, _, err = run("prune", parent, "--vocab", 32, "-o", tmp_path / "out")
    assert code == 2 and "error: " in err and not (tmp_path / "out").exists()
