"""The card of a repository that holds a GGUF file, where it has none yet."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from llmsurgeon.checkpoint.card_file import Heritage
from llmsurgeon.report.card import KEYS
from llmsurgeon.report.licences import asked_name, terms_of
from llmsurgeon.report.origin import Origin
from llmsurgeon.report.pages import Markdown, markdown_page


def gguf_card(repository: str, file: str, type: str, origin: Origin, heritage: Heritage) -> str:
    """README.md beside `file`, whose matrices are stored as `type`."""
    base = [origin.hub_id] if origin.hub_id else list(heritage.base_models)
    metadata = ModelCardData(
        language=list(heritage.language) or None,
        license=heritage.license,
        license_name=heritage.license_name,
        license_link=heritage.license_link,
        library_name="gguf",
        pipeline_tag="text-generation",
        base_model=base or None,
        base_model_relation="quantized" if base else None,
        tags=["llmsurgeon", "gguf"],
    )
    return markdown_page(
        "gguf_card.md.j2",
        metadata=Markdown(metadata.to_yaml(original_order=list(KEYS))),
        repository=repository,
        file=file,
        type=type,
        origin=str(origin),
        terms=terms_of(heritage),
        asked_name=asked_name(heritage, repository),
    )
