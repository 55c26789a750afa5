#!/usr/bin/env python3
"""Write docs/families.md from the declarations; with --check, only say if it is up to date (exit code 1 if not)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from generated_page import write_or_check

from llmsurgeon.formats.form import Form
from llmsurgeon.formats.forms import FORMATS
from llmsurgeon.model.families import DECODERS, ENCODERS, Family
from llmsurgeon.model.families.vision_language import VISION_LANGUAGE
from llmsurgeon.operations import OPERATIONS

DOCS = Path(__file__).resolve().parent.parent / "docs" / "families.md"

HEAD = """\
# Families: what can be done with which

Generated from the declarations by `scripts/gen_family_docs.py`; edit `llmsurgeon/model/families/`, not this page.

A family is a transformers `model_type`, and its own classes are what tests hold results against. A number means that
the step is refused, for the reason with that number below; `(n)` that some layouts of the family refuse it. [Adding a
family](adding-a-family.md) is one declaration.
"""

ENCODERS_TEXT = """\
Checkpoints of every class below are read, with their tensors' prefixes and old spellings mended, and every head that
the file holds goes along. `eval`, `run` and the gate judge by the cosine of the last hidden states to the parent's
(`hidden_cosine`), that of their means (`pooled_cosine`), and with a masked-LM head on both by how they predict masked
tokens (`masked_kl`, `masked_top1_agreement`); `analyze` ranks by 1 - cosine. An encoder cannot sample text from
itself: give `--text` or `--dataset`. `bench` times a forward pass.

Where norms follow the residual sums (all but modernbert), a part is LN(x + f(x)). When it goes its norm stays, LN(x):
what comes next was trained to read that norm's output. A whole block goes with its norms.
"""

MIXTURES_TEXT = """\
Experts keep the names and the bytes that they have in published files; today's classes stack them in memory. A refit
moves attention alone, and routers and experts stay as they are. Costs count the experts that a token is sent to.
"""

VISION_TEXT = """\
The text tower is operated on as the model of its family that it is: analysis, refit, evaluation and costs a token are
those of the tower. The rest of the file keeps its name and its bytes. A tower of any decoder above can be written in
the native form (blocks of one shape, or filled with zeros); one of blocks that differ, in the surgeon form, where the
column says so. nemotron-nas and GGUF hold text models alone, and `distill` would save the tower without the rest: all
three are refused.
"""


class Notes:
    """Reasons, numbered in the order in which they come up."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, reason: str) -> int:
        """The number of a reason."""
        return self.numbers.setdefault(reason, len(self.numbers) + 1)

    def lines(self) -> list[str]:
        """The list of reasons."""
        return [f"{number}. {reason}" for reason, number in self.numbers.items()]


def refused(family: Family, operation: str) -> tuple[str, bool] | None:
    """(reason, whether all layouts refuse), None where none does."""
    step = OPERATIONS[operation]
    plain = step.declined(family)
    layouts = [(settings, step.declined(replace(family, **fields))) for settings, fields in family.layouts]
    if plain and all(reason for _, reason in layouts):
        return plain, True
    if plain:
        taken = " or ".join(_settings(settings) for settings, reason in layouts if not reason)
        return f"{plain} (other than with {taken})", False
    for settings, reason in layouts:
        if reason:
            return f"{reason} ({_settings(settings)})", False
    return None


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {str(value).lower()}`" for key, value in settings.items())


def cell(found: tuple[str, bool] | None, notes: Notes) -> str:
    """`yes`, the number of the reason, or the number in brackets."""
    if found is None:
        return "yes"
    number = notes.number(found[0])
    return str(number) if found[1] else f"({number})"


def limit(form: Form, family: Family) -> tuple[str, bool] | None:
    """As `refused`, of a form."""
    found = form.limit(family)
    return found and (f"{form.name}: {found[0]}", found[1])


def table(families: tuple[Family, ...], notes: Notes) -> str:
    """Family x operation x form; one that packs another holds what that does."""
    forms = [form for form in FORMATS.values() if form.plain is None]
    heads = ["family", *(f"`{name}`" for name in OPERATIONS), *(form.name for form in forms)]
    rows = [heads, ["---"] * len(heads)]
    for family in families:
        cells = [cell(refused(family, operation), notes) for operation in OPERATIONS]
        rows.append([f"`{family.model_type}`", *cells, *(cell(limit(form, family), notes) for form in forms)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def limits(families: tuple[Family, ...]) -> list[str]:
    """Settings under which a family is refused as a whole, and blocks that must stay."""
    lines = []
    for family in families:
        lines += [
            f"- `{family.model_type}` with `{key}: {str(value).lower()}`: {why}" for key, value, why in family.refused
        ]
        for key, value, why in family.required:
            lines.append(f"- `{family.model_type}` with another `{key}` than `{value}`: {why}")
        if family.first_stays:
            lines.append(f"- `{family.model_type}`, block 0 cannot go: {family.first_stays}")
    return lines


def page() -> str:
    """The whole page."""
    notes = Notes()
    parts = [HEAD]
    for title, text, families in (
        ("Decoders", "", tuple(family for family in DECODERS if not family.experts)),
        ("Mixtures of experts", MIXTURES_TEXT, tuple(family for family in DECODERS if family.experts)),
        ("Encoders", ENCODERS_TEXT, ENCODERS),
    ):
        parts.append(f"## {title}\n\n" + (f"{text}\n" if text else "") + table(families, notes) + "\n")
        if families is ENCODERS:
            rows = [f"| `{f.model_type}` | {', '.join(head for head, _ in f.heads)} |" for f in families]
            parts.append("\n".join(["| family | classes |", "| --- | --- |", *rows, ""]))
    rows = [
        f"| `{each.model_type}` | {', '.join(each.uneven)} | {', '.join(each.examples)} |"
        for each in VISION_LANGUAGE.values()
    ]
    vision = ["| model | towers with blocks that differ | examples |", "| --- | --- | --- |", *rows, ""]
    parts.append(f"## Vision-language\n\n{VISION_TEXT}\n" + "\n".join(vision))
    parts.append("## Reasons\n\n" + "\n".join(notes.lines()) + "\n")
    everything = (*DECODERS, *ENCODERS)
    parts.append("## Settings that are refused\n\n" + "\n".join(limits(everything)) + "\n")
    rows = [f"| `{f.model_type}` | {', '.join(f.examples)} |" for f in everything]
    parts.append("## Examples\n\n" + "\n".join(["| family | checkpoints |", "| --- | --- |", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(write_or_check(DOCS, page(), "declarations"))
