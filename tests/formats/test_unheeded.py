"""Keys of a config.json that nobody heeds: another model is refused, the rest is said."""

from __future__ import annotations

import json

import pytest
from conftest import ENCODER_NAMES, FAMILY_NAMES, LAYERS, TINY_MIXTURES, save_encoder, save_tiny, tiny_config

from llmsurgeon.errors import SurgeryError
from llmsurgeon.export import export
from llmsurgeon.formats.configs import config_notes, load_config
from llmsurgeon.planning.opened import open_model

ANOTHER_MODEL = {
    "drop_attn_list": [1, 3],
    "drop_mlp_list": [2],
    "pruned_heads": {"1": [0]},
    "skip_layers": "1-3",
    "attention_heads_to_prune": 2,
    "early_exit_layer": 4,
    "ffn_widths_per_layer": [96, 96, 48, 48, 96, 96],
    "attn_kinds": ["full", "linear", "full", "full", "full", "full"],
    "layer_types": ["full_attention", "sliding_attention"] * 3,
    "per_layer_config": {"1": {"intermediate_size": 48}},
}


@pytest.mark.parametrize("key", ANOTHER_MODEL)
def test_a_key_that_makes_another_model_is_refused(key):
    with pytest.raises(SurgeryError, match=rf"config\.json: {key} .*LlamaConfig"):
        load_config({**tiny_config("llama"), key: ANOTHER_MODEL[key]})


# As published configs have them: SmolLM2, BLOOM, BERT, GPT-2, Qwen2, and lists that name nothing.
HARMLESS = {
    "is_llama_config": True,
    "transformers.js_config": {"dtype": {"q4": 1}},
    "skip_bias_add": True,
    "attention_softmax_in_fp32": True,
    "masked_softmax_fusion": True,
    "pooler_num_attention_heads": 12,
    "max_window_layers": 28,
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "drop_attn_list": [],
    "pruned_heads": {},
    "layer_types": ["full_attention"] * LAYERS,
    "attention_probs_dropout_prob": 0.1,
}


@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_that_only_describes_is_none(key):
    load_config({**tiny_config("llama"), key: HARMLESS[key]})


def test_other_unknown_keys_are_named():
    (note,) = config_notes({**tiny_config("llama"), "use_magic": True, "magic_size": 3, "is_llama_config": True})
    assert "nothing in transformers' LlamaConfig" in note and note.endswith("use_magic, magic_size")


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *TINY_MIXTURES])
def test_a_plain_checkpoint_has_nothing_to_say_nor_has_what_is_written_from_it(tmp_path, family):
    parent = save_tiny(tmp_path / "parent", family)
    assert open_model(str(parent)).notes == ()
    out = export(str(parent), str(tmp_path / "out"), "native").out
    assert open_model(str(out)).notes == ()


@pytest.mark.parametrize("family", ENCODER_NAMES)
def test_nor_has_an_encoder(tmp_path, family):
    assert open_model(str(save_encoder(tmp_path / "parent", family))).notes == ()


def test_code_that_is_not_run_is_said_with_the_plan_and_in_the_card(run, folder, monkeypatch):
    monkeypatch.setattr("llmsurgeon.progress._said", set())
    path = folder / "parent/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}))
    for arguments in (("--dry-run",), ("-o", "out")):
        monkeypatch.setattr("llmsurgeon.progress._said", set())
        code, out, err = run("prune", "parent", "--blocks", "2", "--no-refit", *arguments)
        assert code == 0 and "names code of its own for the model (modeling_own.OwnForCausalLM)" in out + err
    assert "modeling_own.OwnForCausalLM" in (folder / "out/README.md").read_text()
    assert "auto_map" not in json.loads((folder / "out/config.json").read_text())
