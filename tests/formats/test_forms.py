"""The table of forms, and what is looked up in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from conftest import tiny_config

from llmsurgeon.formats import names
from llmsurgeon.formats.forms import CHECKPOINTS, FORMATS, form_of, forms_of_towers

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_has_the_forms_that_can_be_asked_for_and_each_is_called_as_it_is_listed():
    assert set(FORMATS) == set(get_args(names.FormName)) == {form.name for form in FORMATS.values()}
    assert set(CHECKPOINTS) == set(get_args(names.CheckpointName)) and set(CHECKPOINTS) < set(FORMATS)
    assert {"auto", *CHECKPOINTS} == set(get_args(names.WantedForm))


def test_auto_ends_at_a_form_that_holds_everything():
    wanted = [form for form in CHECKPOINTS.values() if form.unwanted]
    assert [form.name for form in wanted] == ["native", "nemotron-nas", "surgeon"]
    assert wanted[-1].unwanted(*[None] * 3) is None and wanted[-1].misfit(*[None] * 3) is None


@pytest.mark.parametrize("name", FORMATS)
def test_each_form_has_a_section_of_the_docs(name):
    pages = (DOCS / "formats.md").read_text() + (DOCS / "gguf.md").read_text()
    assert re.search(rf"^#+ {name}\b", pages, re.MULTILINE | re.IGNORECASE)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (tiny_config("llama"), "native"),
        ({"model_type": "bitnet"}, "native"),
        ({**tiny_config("llama"), "quantization_config": {"quant_method": "bitnet"}}, "bitnet"),
        ({**tiny_config("llama"), "quantization_config": {"quant_method": "fp8"}}, "native"),
        ({"model_type": "nemotron-nas"}, "nemotron-nas"),
        ({"model_type": "surgeon_llama"}, "surgeon"),
        ({"model_type": "surgeon_llava"}, "surgeon"),
    ],
)
def test_a_config_tells_its_form(config, name):
    assert form_of(config).name == name


def test_forms_of_vision_language_models():
    assert forms_of_towers() == ["native", "surgeon"]
