"""What lies beside the weights of a written checkpoint: config.json, code, tokenizer, generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.writer import Stage
from llmsurgeon.formats.form import Written
from llmsurgeon.formats.surgeon import registering
from llmsurgeon.model.families import FAMILIES, SURGEON_PREFIX

PARTS_FILE = "surgeon_blocks.py"
GENERATION = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_beside(stage: Stage, written: Written, checkpoint: Checkpoint) -> None:
    """config.json, the code, and what the source has of tokenizer, chat template and generation config."""
    config = {**written.file_config, "transformers_version": version("transformers")}
    stage.write_file("config.json", json.dumps(_plain(config), indent=2) + "\n")
    companions = checkpoint.companions.files
    for companion in companions:
        stage.write_file(companion.name, companion.read())
    settings = generation_settings(checkpoint.config, config)
    if settings and GENERATION not in {companion.name for companion in companions}:
        stage.write_file(GENERATION, json.dumps(settings, indent=2) + "\n")
    for path in written.code:
        if path.name == PARTS_FILE and written.parts:
            stage.write_file(path.name, path.read_text(encoding="utf-8") + registering(written.parts))
        else:
            stage.copy_file(path)


def generation_settings(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a source's config.json says of how to generate and what `config`, made by transformers 5, no longer says.

    transformers reads them from config.json where there is no generation_config.json, and its config classes drop them.
    """
    from transformers import GenerationConfig

    kind = str(raw.get("model_type", "")).removeprefix(SURGEON_PREFIX)
    if kind in FAMILIES and FAMILIES[kind].encoder:
        return {}
    known = GenerationConfig().to_dict().keys() - {"transformers_version", "_from_model_config"}
    text = raw.get("text_config")
    said = {**(text if isinstance(text, dict) else {}), **raw}
    lost = {key: said[key] for key in sorted(known) if said.get(key) is not None and key not in config}
    ids = {key: said[key] for key in SPECIAL_IDS if said.get(key) is not None}
    return {**ids, **lost} if lost else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
