"""report.html of a training: the loss step by step, and what was measured on held-out text. Inline SVG, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from llmsurgeon import __version__
from llmsurgeon.report.charts import CSS, Scale

if TYPE_CHECKING:
    from llmsurgeon.healing.distill.distill import Distilled

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1160, 320, 60, 28, 14
POINTS = 1000  # of one curve
STYLE = """
.curve{fill:none;stroke:var(--bar);stroke-width:1;opacity:.55}
.smooth{fill:none;stroke:var(--fused);stroke-width:1.8}
.judged{fill:var(--cut)}
"""
# What is drawn as a curve of its own, and how it is called.
LOSSES = {
    "loss": "Loss",
    "hidden": "1 - cos of hidden states",
    "pooled": "1 - cos of pooled states",
    "kl": "KL to the parent, training text",
    "hardening": "Entropy of the trees' decisions",
}
MEASURES = {
    "kl": "KL to the parent, held-out text",
    "perplexity_ratio": "Perplexity ratio, held-out text",
    "pooled_cosine": "Cosine of pooled states to the parent's, held-out text",
    "hidden_cosine": "Cosine of hidden states to the parent's, held-out text",
    "value": "Loss, held-out text",
}


def html_curves(name: str, trainings: Sequence[Distilled]) -> str:
    """The page for what was trained on the way to the model `name`."""
    sections = [section for made in trainings for section in _sections(made)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)}: distillation</title>\n<style>{CSS}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="eyebrow">Healed by distillation</p>\n<h1>{escape(name)}</h1>\n'
        f"<p>Made by llmsurgeon {__version__}.</p></header>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _sections(made: Distilled) -> list[str]:
    """One section for each curve, one set of them for each block that trained on its own."""
    found = []
    for block, training in made.trainings:
        lines = [line for line in made.log if line.get("block") == block]
        steps = [line for line in lines if "evaluation" not in line]
        judged = training.judged
        # The value is one of those that have a name.
        named = {"kl", "hidden_cosine"}
        title = "" if block is None else f"Block {block}: "
        facts = {
            "Steps": f"{training.steps:,}",
            "Tokens": f"{training.tokens:,}",
            "Tokens a second": f"{training.tokens_per_second:,.0f}",
            "Kept": "the student as it came" if not training.best_step else f"step {training.best_step:,}",
            "Ended": training.stopped,
        }
        items = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
        figures = [_figure(title + label, steps, key) for key, label in LOSSES.items() if steps and key in steps[0]]
        figures += [
            _figure(title + label, judged, key, judged=True)
            for key, label in MEASURES.items()
            if judged and key in judged[0] and not (key == "value" and named & judged[0].keys())
        ]
        found.append(f"<section><dl>{items}</dl></section>\n" + "\n".join(figures))
        if training.phases:
            found.append(_phases(training.phases, training.seconds))
    return found


def _figure(title: str, lines: list[dict[str, Any]], key: str, judged: bool = False) -> str:
    values = [(float(line["tokens"]), float(line[key])) for line in lines if line.get(key) is not None]
    finite = [(x, y) for x, y in values if y == y and abs(y) != float("inf")]
    if not finite:
        return ""
    across = Scale.over([0.0, finite[-1][0]], LEFT, WIDTH - 10)
    up = Scale.over([y for _, y in finite], HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in up.ticks:
        at = up.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - 10}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{at + 4:.1f}">{tick:g}</text>')
    for tick in across.ticks:
        parts.append(f'<text class="mid" x="{across.at(tick):.1f}" y="{HEIGHT - 8}">{tick:,.0f}</text>')
    if judged:
        parts.append(_line("smooth", finite, across, up))
        parts += [
            f'<circle class="judged" r="4" cx="{across.at(x):.1f}" cy="{up.at(y):.1f}">'
            f"<title>{x:,.0f} tokens: {y:.4g}</title></circle>"
            for x, y in finite
        ]
    else:
        parts.append(_line("curve", finite[:: max(1, len(finite) // POINTS)], across, up))
        parts.append(_line("smooth", _smoothed(finite), across, up))
    note = f" ({up.kind})" if up.kind else ""
    svg = (
        f'<svg role="img" aria-label="{escape(title)}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
    )
    about = f"by tokens trained on{note}; last {finite[-1][1]:.4g}"
    return (
        f'<section><figure><figcaption><b>{escape(title)}</b> {about}</figcaption><div class="scroll">{svg}</div>'
        "</figure></section>"
    )


def _line(kind: str, points: list[tuple[float, float]], across: Scale, up: Scale) -> str:
    path = "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{path}"/>'


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a fiftieth of the run each."""
    size = max(1, len(points) // 50)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _phases(phases: dict[str, float], seconds: float) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{spent:,.0f}</td><td class="n">{spent / seconds:.0%}</td></tr>'
        for name, spent in sorted(phases.items(), key=lambda item: -item[1])
    )
    return (
        '<section><h2>Where the time went</h2><table><thead><tr><th></th><th class="n">seconds</th>'
        f'<th class="n">of the run</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )
