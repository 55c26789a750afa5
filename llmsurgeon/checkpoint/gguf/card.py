"""What a GGUF file's metadata say of the model as its card did: licence, languages, what it was made from.

Keys: "Authorship metadata" of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsurgeon.checkpoint.card_file import Heritage
from llmsurgeon.checkpoint.gguf.file import ARRAY, STRING, UINT32, Field

HUB = "https://huggingface.co/"
MOST_PARENTS = 16


def card_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as those of a card."""
    count = metadata.get("general.base_model.count", 0)
    parents = range(min(count, MOST_PARENTS) if isinstance(count, int) else 0)
    addresses = [metadata.get(f"general.base_model.{number}.repo_url") for number in parents]
    return {
        "license": metadata.get("general.license"),
        "license_name": metadata.get("general.license.name"),
        "license_link": metadata.get("general.license.link"),
        "language": metadata.get("general.languages"),
        "base_model": [str(address).removeprefix(HUB) for address in addresses if str(address).startswith(HUB)],
        "model_name": str(metadata.get("general.repo_url", "")).removeprefix(HUB),
    }


def card_fields(heritage: Heritage) -> list[Field]:
    """The inverse, for a file that is written."""
    said = {
        "license": heritage.license,
        "license.name": heritage.license_name,
        "license.link": heritage.license_link,
    }
    fields = [Field(f"general.{key}", value, STRING) for key, value in said.items() if value]
    if heritage.language:
        fields.append(Field("general.languages", list(heritage.language), ARRAY, STRING))
    parents = heritage.base_models[:MOST_PARENTS]
    if parents:
        fields.append(Field("general.base_model.count", len(parents), UINT32))
    for number, parent in enumerate(parents):
        owner, _, name = parent.partition("/")
        values = {"name": name, "organization": owner, "repo_url": HUB + parent}
        fields += [Field(f"general.base_model.{number}.{key}", value, STRING) for key, value in values.items()]
    return fields
