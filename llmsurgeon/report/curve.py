"""report.html of a training: the loss step by step, and what was measured on held-out text. Inline SVG, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from markupsafe import Markup

from llmsurgeon.report.charts import Scale, svg
from llmsurgeon.report.pages import html_page


class Trained(Protocol):
    """What is drawn of a training."""

    @property
    def trainings(self) -> tuple[tuple[int | None, Any], ...]:
        """(block, what its training came to); None is the whole student."""

    @property
    def log(self) -> list[dict[str, Any]]:
        """The losses step by step, and what was measured on held-out text."""

    @property
    def labels(self) -> Mapping[str, str]:
        """The losses that have a curve, and how they are called."""


WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1160, 320, 60, 28, 14
POINTS = 1000  # of one curve
MEASURES = {
    "kl": "KL to the parent, held-out text",
    "perplexity_ratio": "Perplexity ratio, held-out text",
    "pooled_cosine": "Cosine of pooled states to the parent's, held-out text",
    "hidden_cosine": "Cosine of hidden states to the parent's, held-out text",
    "value": "Loss, held-out text",
}


@dataclass(frozen=True)
class Curve:
    """One figure: its title, what it shows, the drawing."""

    title: str
    about: str
    drawing: Markup


def html_curves(name: str, trainings: Sequence[Trained]) -> str:
    """The page for what was trained on the way to the model `name`."""
    sections = [section for made in trainings for section in _sections(made)]
    return html_page("curves.html.j2", name=name, trainings=sections)


def _sections(made: Trained) -> list[dict[str, Any]]:
    """What the page shows of each block that trained on its own."""
    found = []
    for block, training in made.trainings:
        lines = [line for line in made.log if line.get("block") == block]
        title = "" if block is None else f"Block {block}: "
        found.append(
            {
                "facts": {
                    "Steps": f"{training.steps:,}",
                    "Tokens": f"{training.tokens:,}",
                    "Tokens a second": f"{training.tokens_per_second:,.0f}",
                    "Kept": "the student as it came" if not training.best_step else f"step {training.best_step:,}",
                    "Ended": training.stopped,
                },
                "curves": [*_losses(title, lines, made.labels), *_measures(title, training.judged)],
                "phases": [
                    (phase, f"{spent:,.0f}", f"{spent / training.seconds:.0%}")
                    for phase, spent in sorted(training.phases.items(), key=lambda item: -item[1])
                ],
            }
        )
    return found


def _losses(title: str, lines: list[dict[str, Any]], labels: Mapping[str, str]) -> list[Curve]:
    steps = [line for line in lines if "evaluation" not in line]
    found = [_curve(title + label, steps, key) for key, label in labels.items() if steps and key in steps[0]]
    return [curve for curve in found if curve]


def _measures(title: str, judged: list[dict[str, Any]]) -> list[Curve]:
    # The value is one of those that have a name.
    named = {"kl", "hidden_cosine"}
    found = [
        _curve(title + label, judged, key, judged=True)
        for key, label in MEASURES.items()
        if judged and key in judged[0] and not (key == "value" and named & judged[0].keys())
    ]
    return [curve for curve in found if curve]


def _curve(title: str, lines: list[dict[str, Any]], key: str, judged: bool = False) -> Curve | None:
    """One figure by tokens trained on; None where nothing of it is a number."""
    values = [(float(line["tokens"]), float(line[key])) for line in lines if line.get(key) is not None]
    finite = [(x, y) for x, y in values if y == y and abs(y) != float("inf")]
    if not finite:
        return None
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
    about = f"by tokens trained on{note}; last {finite[-1][1]:.4g}"
    return Curve(title, about, svg(WIDTH, HEIGHT, title, parts))


def _line(kind: str, points: list[tuple[float, float]], across: Scale, up: Scale) -> str:
    path = "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{path}"/>'


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a fiftieth of the run each."""
    size = max(1, len(points) // 50)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
