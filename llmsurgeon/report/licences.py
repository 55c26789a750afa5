"""What licences of model families ask of whoever passes on a model made from one: a line, a notice, a name.

Sources, read as their owners publish them: Llama 2 Community License (1.b.iii), Meta Llama 3 Community License (1.b),
Llama 3.1, 3.2, 3.3 and 4 Community License Agreements (1.b), Gemma Terms of Use (3.1). The licence counts, not this.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsurgeon.checkpoint.card_file import Heritage

NOTICE = "NOTICE"


@dataclass(frozen=True)
class Terms:
    """notice: the text of the file NOTICE; line: what is to be shown on the card; prefix: how a model's name begins."""

    notice: str
    line: str | None = None
    prefix: str | None = None


def _llama(version: str) -> Terms:
    notice = (
        f"Llama {version} is licensed under the Llama {version} Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved."
    )
    return Terms(notice, "Built with Llama", "Llama")


_META = "is licensed under the {} Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
TERMS: dict[str, Terms] = {
    "llama2": Terms(f"Llama 2 {_META.format('LLAMA 2')}"),
    "llama3": Terms(f"Meta Llama 3 {_META.format('Meta Llama 3')}", "Built with Meta Llama 3", "Llama 3"),
    **{f"llama{version}": _llama(version) for version in ("3.1", "3.2", "3.3", "4")},
    "gemma": Terms("Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"),
}


def terms_of(heritage: Heritage) -> Terms | None:
    """What the licence asks for, None where it is not one of the table."""
    for name in (heritage.license, heritage.license_name):
        if name and (found := TERMS.get(name.lower().replace("-community", "").replace("-", ""))):
            return found
    return None


def asked_name(heritage: Heritage, repository: str | None) -> str | None:
    """A sentence where the licence asks how a name begins, and `repository` is not known, or begins otherwise."""
    terms = terms_of(heritage)
    if terms is None or terms.prefix is None:
        return None
    asked = f"The parent's licence asks that the name of a model made from it and passed on begin with {terms.prefix!r}"
    if repository is None:
        return f"{asked}."
    name = repository.rpartition("/")[2]
    plain = name.lower().replace("-", " ").replace("_", " ")
    return None if plain.startswith(terms.prefix.lower()) else f"{asked}; {name} does not."
