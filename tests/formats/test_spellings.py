"""config.json under old keys and new ones, as transformers 4 and 5 spell them; files that name what they need."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import tiny_config
from formats.forms import LLAMA3, LONGROPE, PARTIAL_LINEAR, TWO_BASES, TWO_PLAIN_BASES, YARN, forms
from transformers import AutoConfig

import llmsurgeon.modeling
from llmsurgeon.formats.configs import load_config, normalised
from llmsurgeon.formats.spellings import full_every, old_spellings, scaling_of
from llmsurgeon.model.families import FAMILIES

YARN_AS_IT_WAS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MODELING = Path(llmsurgeon.modeling.__file__).parent


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", YARN, {"rope_theta": 321.0, "rope_scaling": YARN_AS_IT_WAS}),
        ("llama", {}, {"rope_theta": 10000.0, "rope_scaling": None}),
        (
            "gpt_neox",
            PARTIAL_LINEAR,
            {"rotary_emb_base": 321.0, "rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        ),
        (
            "gemma3_text",
            TWO_BASES,
            {
                "rope_theta": 321.0,
                "rope_local_base_freq": 77.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        ),
        (
            "phi3",
            LONGROPE,
            {
                "rope_theta": 321.0,
                "partial_rotary_factor": 1.0,
                "rope_scaling": {
                    "type": "longrope",
                    **{key: LONGROPE["rope_parameters"][key] for key in ("short_factor", "long_factor")},
                },
            },
        ),
        ("gpt2", {}, {}),
        ("bloom", {}, {}),
    ],
)
def test_rope_as_transformers_4_spells_it(family, changes, expected):
    config = normalised(tiny_config(family, **changes))
    assert old_spellings(config, FAMILIES[family]) == expected
    assert old_spellings({**config, "dtype": "bfloat16"}, FAMILIES[family]) == {"torch_dtype": "bfloat16", **expected}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_are_read_as_one(family):
    """transformers 5 finds what it found without the old keys, and what it is given stays as it was."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    longrope = {"rope_parameters": {**LONGROPE["rope_parameters"], **factors}}
    changes = {"gemma3_text": TWO_BASES, "modernbert": TWO_PLAIN_BASES, "gpt_neox": PARTIAL_LINEAR, "phi3": longrope}
    config = {**AutoConfig.for_model(family, **changes.get(family, {})).to_dict(), "model_type": family}
    if config.get("rope_parameters") and family not in changes:
        config = {**config, **LLAMA3}
    both = {**config, **old_spellings(config, FAMILIES[family])}
    before = json.dumps(both, default=str)
    found, expected = (load_config(each).to_dict().get("rope_parameters") for each in (both, config))
    if family == "phi3":
        assert found.pop("type") == "longrope"
    assert found == expected
    assert json.dumps(both, default=str) == before, "a nested dict was filled in"
    if config.get("rope_parameters"):
        assert set(key for key, _ in FAMILIES[family].old_rope) & set(both), "no base under an old key"


def test_where_layers_attend_fully():
    full, window = "full_attention", "sliding_attention"
    assert full_every([full, window, window, full, window]) == 3
    assert full_every([full, full]) == 1 and full_every([full, window]) == 2
    assert (
        full_every([window, full]) == full_every([full, full, window]) == "see layer_types, which transformers 5 reads"
    )


def test_an_object_among_rotary_parameters_is_no_kind_of_layer():
    rope = {"rope_theta": 321.0, "rope_type": "linear", "factor": 2.0, "odd": {"rope_theta": 5.0}}
    found = old_spellings({"rope_parameters": rope}, FAMILIES["llama"])
    assert found["rope_theta"] == 321.0 and found["rope_scaling"]["rope_type"] == "linear"
    each = {
        "sliding_attention": {"rope_theta": 5.0},
        "other": {"rope_theta": 7.0, "rope_type": "linear", "factor": 4.0},
    }
    assert old_spellings({"rope_parameters": each}, FAMILIES["llama"])["rope_scaling"] is None


def test_sections_are_kept_without_a_scaling():
    assert scaling_of({"rope_type": "default", "rope_theta": 1.0, "mrope_section": [1, 1, 2]}) == {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
    }


@pytest.mark.parametrize(
    "name", ["native-llama-yarn", "surgeon-llama-yarn", "nas-llama", "block-llama", "mlgru-hybrid"]
)
def test_every_form_is_written_with_both(name, tmp_path):
    written = json.loads((forms()[name].write(tmp_path / name) / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 321.0
    assert written["rope_scaling"] == (None if name in ("block-llama", "mlgru-hybrid") else YARN_AS_IT_WAS)
    assert written["torch_dtype"] == written["dtype"] == "float32"


def needed(path: Path) -> set[str]:
    return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", sorted(MODELING.glob("modeling_*.py")), ids=lambda path: path.stem)
def test_a_modeling_file_names_all_files_that_it_needs(path):
    """Of a local checkpoint transformers 4 copies what auto_map's file names, and not what those files name."""
    named, found = needed(path), set()
    while named - found:
        found |= (new := named - found)
        named = named | {name for file in new for name in needed(MODELING / f"{file}.py")}
    assert named == needed(path), f"add to {path.name}: {sorted(named - needed(path))}"
