"""Templates made into pages. In HTML and in Markdown alike, what a template is given is text until it says otherwise.

HTML is escaped by Jinja's autoescape: `Markup` is what our own drawings are. Markdown is escaped by `prose`: `Markdown`
is what is Markdown already.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmsurgeon import __version__
from llmsurgeon.boundary.foreign import printable
from llmsurgeon.boundary.places import without_folders


class Markdown(str):
    """A text that a page shows as the Markdown that it is."""


def html_page(template: str, **values: Any) -> str:
    """The HTML page that a template makes of these values."""
    return _environment(True).get_template(template).render(values, version=__version__)


def markdown_page(template: str, **values: Any) -> str:
    """The Markdown page that a template makes of these values."""
    return _environment(False).get_template(template).render(values, version=__version__)


@cache
def _environment(html: bool) -> Environment:
    made = Environment(
        loader=PackageLoader("llmsurgeon.report"),
        autoescape=html,
        finalize=None if html else _shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["grouped"] = "{:,}".format
    return made


def _shown(value: object) -> object:
    return prose(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


def prose(text: str) -> Markdown:
    """A text of one line as Markdown that shows it: no HTML, no link, no fence; code spans stay.

    Names of models and tensors, gates and texts are a stranger's; absolute paths are cut to their last part.
    """
    line = re.sub("`{2,}", "'", " ".join(printable(without_folders(text)).split()))
    spans = re.split("(`[^`]*`)", line)
    return Markdown(
        "".join(span if odd % 2 else re.sub(r"[`\\[\]<>&|]", _escaped, span) for odd, span in enumerate(spans))
    )


def _escaped(found: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(found[0], "\\" + found[0])


def fenced(text: str, language: str) -> Markdown:
    """A code block that nothing in `text` ends."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return Markdown(f"{fence}{language}\n{text}\n{fence}")
