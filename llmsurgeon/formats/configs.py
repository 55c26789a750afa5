"""Configs: what transformers makes of a config.json, with every default filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmsurgeon.boundary.foreign import foreign
from llmsurgeon.checkpoint.companions import without_code
from llmsurgeon.formats.forms import form_of, readable
from llmsurgeon.formats.surgeon import classes_for, is_surgeon
from llmsurgeon.formats.unheeded import refuse_unheeded, unheeded
from llmsurgeon.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CORRECT = "correct the config, or take the one that the model was published with"


def load_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config object of a config.json's contents. No remote code runs.

    Raises:
        SurgeryError: the family is not supported, transformers finds the values impossible, or a key that it does not
            know asks for another model.
    """
    from transformers import AutoConfig

    raw = readable(raw)
    family = family_of(raw)
    # Copies, which this makes: config classes fill in what is missing in place.
    values = {k: v for k, v in without_code(dict(raw)).items() if k not in ("model_type", "transformers_version")}
    with foreign("config.json", f"does not describe a {raw['model_type']} model", CORRECT):
        if is_surgeon(raw):
            return classes_for(raw, family)[0].from_dict(values)  # type: ignore[attr-defined]
        made = AutoConfig.for_model(raw["model_type"], **values)
        refuse_unheeded(raw, made, raw.get(family.layers_key))
        return made


def config_notes(raw: Mapping[str, Any], text: Mapping[str, Any] | None = None) -> list[str]:
    """What a config.json asks for that is not done: code of its own, keys that nobody reads. `text`: of its tower."""
    own = raw if text is None else {**text, "auto_map": raw.get("auto_map")}
    return [] if form_of(raw).ships_code or form_of(own).ships_code else unheeded(own, load_config(own))


def normalised(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every default filled in and per-layer lists expanded."""
    raw = readable(raw)
    config = load_config(raw)
    with foreign("config.json", f"does not describe a {raw['model_type']} model", CORRECT):
        values = config.to_dict()
    values["model_type"] = raw["model_type"]
    return values
