"""What lies beside the weights: an allow-list, links, code, and everything that transformers would look for."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from llmsurgeon.checkpoint.companions import OTHERS, PROCESSORS, TEMPLATES, TOKENIZER, companions_of, without_code
from llmsurgeon.checkpoint.inside import Unsafe, open_inside
from llmsurgeon.errors import CheckpointError

AUTO_MAP = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}


def names(folder: Path, trusted: bool = False) -> list[str]:
    return [companion.name for companion in companions_of(folder, trusted).files]


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_everything_that_transformers_looks_for_is_on_the_list():
    """Fails where a newer transformers gains a file."""
    from transformers import utils
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
    from transformers.tokenization_utils_base import ADDED_TOKENS_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE
    from transformers.utils import hub

    processors = {utils.IMAGE_PROCESSOR_NAME, utils.FEATURE_EXTRACTOR_NAME, utils.PROCESSOR_NAME}
    assert processors | {"video_preprocessor_config.json", "audio_tokenizer_config.json"} == set(PROCESSORS)
    others = {hub.CHAT_TEMPLATE_FILE, hub.LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, utils.GENERATION_CONFIG_NAME}
    assert others == set(OTHERS) and hub.CHAT_TEMPLATE_DIR == TEMPLATES
    wanted = {TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE}
    for class_name in {name for name in TOKENIZER_MAPPING_NAMES.values() if name}:
        found = tokenizer_class_from_name(class_name)
        with contextlib.suppress(ImportError):  # sentencepiece is not installed
            wanted |= set((getattr(found, "vocab_files_names", None) or {}).values())
    assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"} <= wanted
    assert [name for name in sorted(wanted) if isinstance(name, str) and not TOKENIZER.fullmatch(name)] == []


def test_only_what_is_on_the_list_goes_along(tmp_path):
    taken = {
        **dict.fromkeys(
            ("tokenizer.json", "tokenizer_config.json", "tokenizer.4.0.json", "generation_config.json"), "{}"
        ),
        **dict.fromkeys(("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model.v3", "qwen.tiktoken"), "x"),
        **dict.fromkeys(("additional_chat_templates__tool_use.jinja", "chat_template.jinja"), "{{ 1 }}"),
        "preprocessor_config.json": "{}",
    }
    left = ("tokenizer.py", "tokenizer_backup.json", "vocab.pkl", "README.md", "pytorch_model.bin", "evil.py", ".env")
    fill(tmp_path, **taken, **dict.fromkeys(left, "x"), additional_chat_templates__evil="x")
    assert names(tmp_path) == sorted(name.replace("__", "/") for name in taken)
    assert companions_of(tmp_path).notes == ()


def test_a_file_that_the_tokenizer_names_goes_along(tmp_path):
    fill(tmp_path, **{"tokenizer_config.json": json.dumps({"vocab_file": "words.vocab", "x": ["config.json", "a.py"]})})
    fill(tmp_path, **{"words.vocab": "a", "other.vocab": "b", "config.json": "{}", "a.py": ""})
    assert names(tmp_path) == ["tokenizer_config.json", "words.vocab"]


@pytest.fixture
def own(tmp_path) -> Path:
    """A tokenizer with code, which imports a second module."""
    fill(tmp_path, **{"tokenizer_config.json": json.dumps(AUTO_MAP), "tokenizer.json": "{}"})
    fill(
        tmp_path, **{"tokenization_own.py": "from .helper_own import x\nfrom . import more_own", "helper_own.py": "x=1"}
    )
    return fill(tmp_path, **{"more_own.py": "", "unrelated.py": ""})


def test_a_tokenizer_with_code_stays_behind_whole_and_says_how_to_keep_it(own):
    found = companions_of(own)
    assert found.files == () and found.needs_code == ("tokenization_own.Own",)
    assert "not copied: the tokenizer" in found.notes[0] and "--trust-remote-code" in found.notes[0]
    with pytest.raises(CheckpointError, match=r"needs code of its own \(tokenization_own\.Own\).*--trust-remote-code"):
        found.check_tokenizer("model", own)


def test_trusted_code_goes_along_with_what_it_imports(own):
    found = companions_of(own, trust_remote_code=True)
    assert found.code == ("tokenization_own.py", "more_own.py", "helper_own.py")
    assert {"tokenizer.json", "tokenizer_config.json", *found.code} == {companion.name for companion in found.files}
    assert "auto_map" in json.loads(next(c for c in found.files if c.name == "tokenizer_config.json").read())
    assert "code of the parent's authors" in found.notes[0]
    found.check_tokenizer("model", own)


@pytest.mark.parametrize("reference", ["../evil.Evil", "/tmp/evil.Evil", "..evil.Evil", "a.b.c.Evil"])
def test_code_outside_the_folder_is_never_taken(tmp_path, reference):
    folder = tmp_path / "model"
    fill(folder, **{"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": [reference, None]}})})
    fill(tmp_path, **{"evil.py": "secret"})
    found = companions_of(folder, trust_remote_code=True)
    assert found.code == () and any("not copied" in note for note in found.notes)


def test_code_in_another_repository_is_named(tmp_path):
    fill(tmp_path, **{"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["a/b--c.D", None]}})})
    assert companions_of(tmp_path).needs_code == ("a/b--c.D",)
    assert "another repository" in companions_of(tmp_path, True).notes[0]


def test_a_processor_keeps_its_settings_without_its_code(tmp_path):
    config = {"size": 3, "image_processor": {"auto_map": {"AutoImageProcessor": "own.Own"}, "mean": [1]}}
    fill(tmp_path, **{"processor_config.json": json.dumps(config), "own.py": ""})
    (file,) = companions_of(tmp_path).files
    assert json.loads(file.read()) == {"size": 3, "image_processor": {"mean": [1]}}
    assert "own.Own" in companions_of(tmp_path).notes[0]
    assert names(tmp_path, True) == ["own.py", "processor_config.json"]


def test_nothing_that_names_code_stays_in_a_config():
    config = {"a": 1, "auto_map": {}, "text_config": {"_attn_implementation": "evil/kernel", "b": [{"auto_map": 1}]}}
    assert without_code(config) == {"a": 1, "text_config": {"b": [{}]}}


def test_modules_of_sentence_transformers(tmp_path):
    kinds = "sentence_transformers.models."
    modules = [{"path": "", "type": kinds + "Transformer"}, {"path": "1_Pooling", "type": kinds + "Pooling"}]
    files = {"1_Pooling__config.json": "{}", "1_Pooling__code.py": "", "sentence_bert_config.json": "{}"}
    fill(tmp_path, **{"modules.json": json.dumps(modules), **files, "2_Other__config.json": "{}"})
    assert names(tmp_path) == ["1_Pooling/config.json", "modules.json", "sentence_bert_config.json"]
    assert companions_of(tmp_path).notes == ("not copied: 1_Pooling/code.py",)
    fill(tmp_path, **{"modules.json": json.dumps([*modules, {"path": "../x", "type": kinds + "Dense"}])})
    assert "../x" in companions_of(tmp_path).notes[1]
    fill(tmp_path, **{"modules.json": json.dumps([{"path": "", "type": "own_st.Evil"}]), "own_st.py": ""})
    assert names(tmp_path) == [] and "own_st.Evil" in companions_of(tmp_path).notes[0]
    assert "own_st.py" in names(tmp_path, True)


HARD = ["link", "link to a link", "absolute link", "link in a folder", "folder link", "pipe", "folder", "device"]


@pytest.mark.parametrize("case", HARD)
def test_only_regular_files_of_the_checkpoint(tmp_path, case):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.mkdir()
    (secret / "id_rsa").write_text("private")
    (secret / "tool.jinja").write_text("private")
    at = folder / "tokenizer.json"
    if case == "link":
        at.symlink_to("../secret/id_rsa")
    elif case == "link to a link":
        (folder / "step").symlink_to("../secret/id_rsa")
        at.symlink_to("step")
    elif case == "absolute link":
        at.symlink_to(secret / "id_rsa")
    elif case == "link in a folder":
        (folder / TEMPLATES).mkdir()
        at = folder / TEMPLATES / "tool.jinja"
        at.symlink_to(secret / "tool.jinja")
    elif case == "folder link":
        (folder / TEMPLATES).symlink_to(secret)
        at = folder / TEMPLATES
    elif case == "pipe":
        os.mkfifo(at)
    elif case == "folder":
        at.mkdir()
    else:
        at.symlink_to("/dev/zero")
    found = companions_of(folder)
    assert found.files == () and at.relative_to(folder).as_posix() in found.notes[0]
    with pytest.raises(Unsafe):
        open_inside(folder, "additional_chat_templates/tool.jinja" if TEMPLATES in str(at) else "tokenizer.json")
    if at.name == "tokenizer.json":
        with pytest.raises(CheckpointError, match="put the file itself there"):
            found.check_tokenizer("model", folder)


def test_a_file_that_becomes_a_link_is_not_read(tmp_path):
    fill(tmp_path, **{"tokenizer.json": "{}"})
    (file,) = companions_of(tmp_path).files
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(Unsafe):
        file.read()


def test_links_inside_the_folder_and_into_the_hub_cache_are_its_own_files(tmp_path):
    fill(tmp_path / "plain", **{"real.json": "{}"})
    (tmp_path / "plain/tokenizer.json").symlink_to("real.json")
    (tmp_path / "alias").symlink_to("plain")
    assert names(tmp_path / "plain") == names(tmp_path / "alias") == ["tokenizer.json"]
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    fill(tmp_path / "models--a--b/blobs", **{"123": "{}", "456": "x"})
    fill(tmp_path / "models--a--b/refs", main="abc")
    (snapshot / TEMPLATES).mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    (snapshot / TEMPLATES / "tool.jinja").symlink_to("../../../blobs/456")
    (snapshot / "vocab.json").symlink_to("../../refs/main")
    found = companions_of(snapshot)
    assert [(c.name, c.read()) for c in found.files] == [(f"{TEMPLATES}/tool.jinja", b"x"), ("tokenizer.json", b"{}")]
    assert "vocab.json" in found.notes[0]


@pytest.mark.parametrize("text", ["{", "\xff", "[" * 100_000])
def test_a_damaged_config_is_one_message(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not (JSON|UTF-8)"):
        companions_of(tmp_path)
