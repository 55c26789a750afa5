"""Configs and empty models: what is refused, what is filled in, what is tied."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import save_tiny, tiny_config, tiny_model
from operations.helpers import logits, operate, some_tokens, subject_of

from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.loading import load_model
from llmsurgeon.formats.models import check_shapes, empty_model, expected_shapes, fill
from llmsurgeon.formats.surgeon import is_surgeon, surgeon_classes
from llmsurgeon.formats.tensor_names import canonical, legacy
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.families import FAMILIES
from llmsurgeon.operations.prune_attention import PruneAttention


def test_empty_models_hold_no_weights_and_run_once_filled(family_name):
    model = tiny_model(family_name)
    empty = empty_model(tiny_config(family_name))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
    assert expected_shapes(empty) == {
        name: tuple(t.shape) for name, t in model.state_dict().items() if name in expected_shapes(empty)
    }
    fill(empty, canonical(model.state_dict(), FAMILIES[family_name], model.all_tied_weights_keys), None, "cpu")
    assert torch.equal(logits(empty, some_tokens()), logits(model, some_tokens()))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_frequencies_survive(tmp_path, rope):
    """Kept by the loader, and by a converted model."""
    folder = save_tiny(tmp_path / "parent", "llama", rope_parameters=rope)
    model = tiny_model("llama", rope_parameters=rope)
    tokens = some_tokens(length=40)
    assert torch.equal(logits(load_model(str(folder)), tokens), logits(model, tokens))
    assert not torch.allclose(logits(tiny_model("llama"), tokens), logits(model, tokens), atol=1e-3)
    student, written, _ = operate(model, PruneAttention(layers=(5,)))
    assert written.config["rope_parameters"]["rope_type"] == rope["rope_type"]
    assert torch.equal(student.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_a_dtype_is_cast_on_load(tmp_path):
    folder = save_tiny(tmp_path / "parent", "llama")
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_check_shapes_names_what_is_wrong():
    expected = {"a": (2, 3), "b": (4,), "c": (1,)}
    check_shapes(dict(expected), expected, "here")
    message = (
        r"here: tensors and config.json disagree: c is missing \(expected shape \[1\]\); d is not part of the model; "
        r"a has shape \[3, 2\], the config asks for \[2, 3\]"
    )
    with pytest.raises(CheckpointError, match=message):
        check_shapes({"a": (3, 2), "b": (4,), "d": (1,)}, expected, "here")
    with pytest.raises(CheckpointError, match=r"\(and 6 more\)"):
        check_shapes({}, {str(i): (1,) for i in range(10)}, "here")


def test_configs_that_cannot_be():
    with pytest.raises(SurgeryError, match="does not describe a llama model"):
        normalised({**tiny_config("llama"), "num_hidden_layers": "six"})
    with pytest.raises(SurgeryError):
        empty_model({**tiny_config("gpt2"), "n_head": 5})


def test_code_in_a_checkpoint_does_not_run_here(tmp_path):
    """auto_map is ignored by this package's loader."""
    folder = save_tiny(tmp_path / "parent", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    assert type(load_model(str(folder))).__name__ == "LlamaForCausalLM"
    written = write_config(*spec_of("llama"), {**normalised(config), "auto_map": config["auto_map"]})
    assert "auto_map" not in written.config


def spec_of(family):
    subject, _, _ = subject_of(tiny_model(family))
    return subject.spec, subject.family


def test_published_names_and_back():
    family = FAMILIES["gpt_neox"]
    weights = {name: torch.zeros(1) for name in ("embed_out.weight", "gpt_neox.layers.0.attention.bias")}
    today = canonical(weights, family)
    assert set(today) == {"lm_head.weight"}
    assert set(legacy(today, family)) == {"embed_out.weight"}
    assert set(canonical({"wte.weight": torch.zeros(1)}, FAMILIES["gpt2"])) == {"transformer.wte.weight"}


def test_surgeon_classes(family_name):
    config_class, model_class = surgeon_classes(FAMILIES[family_name])
    assert config_class.model_type == f"surgeon_{family_name}" and model_class.config_class is config_class
    assert is_surgeon({"model_type": config_class.model_type}) and not is_surgeon({"model_type": family_name})


def test_a_uniform_model_can_be_written_as_surgeon(family_name):
    """The swapped blocks compute exactly what the family's own do."""
    model = tiny_model(family_name)
    student, written, _ = operate(model, format="surgeon")
    assert written.format == "surgeon" and written.why == "asked for"
    torch.testing.assert_close(logits(student, some_tokens()), logits(model, some_tokens()), atol=1e-5, rtol=1e-5)


def test_unknown_lists_of_one_entry_a_layer_are_refused():
    spec, family = spec_of("llama")
    config = {**normalised(tiny_config("llama")), "layer_scales": [1.0] * 6, "eos_token_id": [1, 2, 3, 4, 5, 6]}
    with pytest.raises(SurgeryError, match="layer_scales looks like a list with one entry per layer"):
        write_config(spec, family, config)


def test_windows_that_max_window_layers_cannot_say():
    """Only readers of the plain form go by max_window_layers: our own form holds the model all the same."""
    spec, family = spec_of("qwen2")
    config = normalised(tiny_config("qwen2"))
    mixed = {**config, "layer_types": ["sliding_attention", "full_attention"] * 3}
    with pytest.raises(
        SurgeryError, match=r"block 1 has full attention .* max_window_layers .* that can: surgeon, gguf$"
    ):
        write_config(spec, family, mixed, "native")
    written = write_config(spec, family, mixed)
    assert written.format == "surgeon" and "max_window_layers cannot express" in written.why
    assert normalised(written.config)["layer_types"] == mixed["layer_types"]
