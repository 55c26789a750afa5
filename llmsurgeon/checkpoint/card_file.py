"""The metadata of a model's card: the YAML block at the head of README.md, of which what is not plain is left out.

Keys: https://huggingface.co/docs/hub/model-cards. A card is a stranger's text: it may say anything, and stops nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsurgeon.checkpoint.inside import text_inside
from llmsurgeon.errors import CheckpointError

CARD = "README.md"
BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
LONGEST = 1 << 16
WORD = re.compile(r"[\w.+-]{1,96}")
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
LINK = re.compile(r"https?://[^\s<>\"'`]{1,300}|[\w.-]{1,96}")
LANGUAGE = re.compile(r"[A-Za-z]{2,20}(-[A-Za-z0-9]{1,10})*")


@dataclass(frozen=True)
class Heritage:
    """What a model made from this one takes over of its card, and what the card says the model is.

    license is one of the hub's names, or "other" with a license_name; license_link an address, or a file beside the
    card. base_models: hub ids that it was made from. hub_id: its own, where the card says one.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    hub_id: str | None = None


def heritage_of(card: Mapping[str, Any]) -> Heritage:
    """What is taken over of a card's metadata; values that are not of the form they should have are left out."""
    index = card.get("model-index")
    first = index[0] if isinstance(index, list) and index else None
    own = first.get("name") if isinstance(first, dict) else None
    return Heritage(
        license=_first(card.get("license"), WORD),
        license_name=_first(card.get("license_name"), WORD),
        license_link=_first(card.get("license_link"), LINK),
        language=_fitting(card.get("language"), LANGUAGE),
        base_models=_fitting(card.get("base_model"), HUB_ID),
        hub_id=_first(own, HUB_ID) or _first(card.get("model_name"), HUB_ID),
    )


def read_card(folder: Path) -> dict[str, Any]:
    """The metadata of the card in a folder; empty where there is none that can be read."""
    import yaml

    try:
        found = BLOCK.match(text_inside(folder, CARD))
        values = yaml.safe_load(found[1]) if found and len(found[1]) <= LONGEST else None
    except (OSError, CheckpointError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _fitting(value: Any, form: re.Pattern[str]) -> tuple[str, ...]:
    """The texts of a value, one or a list, that have this form."""
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values[:100] if isinstance(text, str) and form.fullmatch(text))


def _first(value: Any, form: re.Pattern[str]) -> str | None:
    return next(iter(_fitting(value, form)), None)
