"""Templates: they come with the package, show what they are given as text, and say so where a value is missing."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from markupsafe import Markup

from llmsurgeon.checkpoint.card_file import HUB_ID, Heritage
from llmsurgeon.formats.form import Written
from llmsurgeon.formats.forms import CHECKPOINTS
from llmsurgeon.model.costs import Costs
from llmsurgeon.report.card import Made, model_card
from llmsurgeon.report.origin import Origin
from llmsurgeon.report.pages import _environment, html_page, markdown_page

NAMES = {path.name for path in (files("llmsurgeon.report") / "templates").iterdir()}
HOSTILE = "<script>alert('x')</script> [a](javascript:b) `c` | &"


def card_of(model="lab/model"):
    costs = Costs(blocks=6, attentions=6, ffns=6, parameters=1, flops_per_token=1, kv_bytes_per_token=1, disk_bytes=1)
    written = Written(
        CHECKPOINTS["native"], {"architectures": ["LlamaForCausalLM"]}, (), HOSTILE, "It loads.", None, {}
    )
    evaluation = {"tokens": 9, "perplexity": 2.0, "parent_perplexity": 1.0, "kl": 0.5, "top1_agreement": 0.5}
    origin, heritage = Origin(model, hub_id=model if HUB_ID.fullmatch(model) else None), Heritage()
    made = Made(None, origin, heritage, costs, costs, "a: 1", evaluation, HOSTILE, notes=[HOSTILE], gate=[HOSTILE])
    return model_card(written, made)


def test_templates_come_along():
    assert {"page.html.j2", "style.css.j2", "analysis.html.j2", "curves.html.j2", "card.md.j2"} <= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_template_compiles(name):
    _environment(not name.endswith(".md.j2")).get_template(name)


def test_a_missing_value_is_an_error_and_no_empty_place():
    with pytest.raises(UndefinedError):
        html_page("curves.html.j2", name="x")
    with pytest.raises(UndefinedError):
        markdown_page("card.md.j2", name="x")


def test_text_is_escaped_and_drawings_are_not():
    page = html_page("parts.html.j2")
    figure = _environment(True).get_template("parts.html.j2").module.figure
    shown = figure(HOSTILE, HOSTILE, Markup("<svg/>"))
    assert "<script" not in shown and "<svg/>" in shown and not page.strip()


def test_all_that_a_card_says_is_text():
    body = card_of().partition("\n---\n")[2].partition("## Recipe")[0]
    assert "<script" not in body and not re.search(r"(?<!\\)\]\(", body)
    assert body.count("&lt;script&gt;") == 4  # why, text, note, gate


@pytest.mark.parametrize("model", ["lab/model", "lab/mödel", "yes/no"])
def test_the_hub_reads_the_metadata(model):
    found = ModelCard(card_of(model)).data
    assert found.base_model == [model] and found.library_name == "transformers"
    assert found.tags == ["llmsurgeon", "model-surgery"] and found.pipeline_tag == "text-generation"


def test_what_the_hub_has_not_is_not_its_base():
    assert ModelCard(card_of("model.gguf")).data.base_model is None
