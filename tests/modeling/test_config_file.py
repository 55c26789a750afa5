"""How the surgeon form spells its config.json: stock classes refuse it, its own read it, older files are read too."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES
from modeling.forms import built
from transformers import AutoConfig, PreTrainedConfig

from llmsurgeon.formats.surgeon import surgeon_classes
from llmsurgeon.model.families import FAMILIES, SURGEON_PREFIX

NAMES = (*FAMILY_NAMES, *MIXTURE_NAMES, *ENCODER_NAMES)
TEXT = "see block_configs; load with trust_remote_code=True through an Auto class"


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def written(name, folder):
    built(name).config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_the_file_and_back(name, tmp_path):
    config, family = built(name).config, FAMILIES[name]
    values = written(name, tmp_path)
    assert values[family.hidden_key] == f"32 ({TEXT})"
    assert values[family.layers_key] == len(values["block_configs"])
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.hidden_size == 32


def test_files_of_earlier_releases(name, tmp_path):
    """They have a text where the number of layers stands."""
    config, family = built(name).config, FAMILIES[name]
    values = {**written(name, tmp_path), family.hidden_key: 32, family.layers_key: TEXT}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_width_that_is_the_family_s_default_is_in_the_file(tmp_path):
    config_class, _ = surgeon_classes(FAMILIES["llama"])
    entry = {"attention": {"no_op": True}, "ffn": {"no_op": True}}
    made = config_class(block_configs=[entry] * 2, num_hidden_layers=2)
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == f"4096 ({TEXT})"


def test_what_has_no_class_of_its_own_reads_it(name, tmp_path):
    """As the Trainer does when it goes on, and tokenizers where they are not trusted with code."""
    values = written(name, tmp_path)
    file = tmp_path / "config.json"
    for plain in (PreTrainedConfig.from_json_file(file), PreTrainedConfig.from_pretrained(tmp_path)):
        assert len(plain.block_configs) == len(values["block_configs"])


def test_stock_config_classes_refuse_it(name, tmp_path):
    written(name, tmp_path)
    stock = type(AutoConfig.for_model(name))
    with pytest.raises(Exception, match="load with trust_remote_code=True") as refused:
        stock.from_pretrained(tmp_path)
    assert type(refused.value).__name__ == "StrictDataclassFieldValidationError"


def test_stock_models_fail_on_it_where_config_classes_check_nothing(name, tmp_path):
    """As before transformers 5: the model class is what meets the text."""
    values = written(name, tmp_path)
    config = AutoConfig.for_model(**{**values, FAMILIES[name].hidden_key: 32, "model_type": name})
    config.__dict__[FAMILIES[name].hidden_key] = values[FAMILIES[name].hidden_key]
    stock = getattr(transformers, FAMILIES[name].model_class)
    with pytest.raises(TypeError), torch.device("meta"):
        stock(config)


def test_a_width_that_is_no_number(tmp_path):
    values = {**written("llama", tmp_path), "hidden_size": f"wide ({TEXT})", "model_type": SURGEON_PREFIX + "llama"}
    with pytest.raises(ValueError, match="invalid literal"):
        type(built("llama").config).from_dict(values)
