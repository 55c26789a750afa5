"""How a model generates by default comes along, wherever its source says so."""

from __future__ import annotations

import json

import pytest
from conftest import save_tiny
from transformers import AutoModelForCausalLM

from llmsurgeon.export import export
from llmsurgeon.formats.beside import generation_settings

SETTINGS = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 7,
    "repetition_penalty": 1.25,
    "no_repeat_ngram_size": 3,
    "max_length": 40,
    "suppress_tokens": [5],
}
# Kept where they are: they are no settings, or belong to a task.
OTHERS = {
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "an_engines_key": {"a": 1},
}


def source(tmp_path, **says):
    folder = save_tiny(tmp_path / "parent", "llama")
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **says}))
    return folder


@pytest.mark.parametrize("form", ["native", "nemotron-nas", "surgeon"])
def test_settings_in_config_json(tmp_path, form):
    folder = source(tmp_path, **SETTINGS, **OTHERS)
    out = export(str(folder), str(tmp_path / "out"), form).out
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in OTHERS} == OTHERS
    parent, made = (
        AutoModelForCausalLM.from_pretrained(each, trust_remote_code=True).generation_config for each in (folder, out)
    )
    for key, value in SETTINGS.items():
        assert getattr(parent, key) == getattr(made, key) == value, key
    assert (made.bos_token_id, made.eos_token_id) == (parent.bos_token_id, parent.eos_token_id) == (1, 2)


def test_a_file_of_its_own_decides(tmp_path):
    folder = source(tmp_path, **SETTINGS)
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    out = export(str(folder), str(tmp_path / "out"), "native").out
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.3, "do_sample": True}


def test_nothing_to_say(tmp_path):
    out = export(str(source(tmp_path)), str(tmp_path / "out"), "native").out
    assert not (out / "generation_config.json").exists()


def test_of_a_text_tower_and_of_encoders():
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "top_k": 3, "eos_token_id": 9}}
    assert generation_settings(config, {}) == {"eos_token_id": 9, "top_k": 3}
    assert generation_settings({"model_type": "bert", "max_length": 20}, {}) == {}
