"""Loss curves of block transformers beside their parent's loss, from the loss.jsonl of their checkpoints.

    python benchmarks/block_curve.py "L = 1=OUT-1" "L = 4=OUT-4" --svg curve.svg      # LABEL=folder or loss.jsonl

Prints a Markdown table of the evaluations on held-out text (nats a token, minutes of training) and, where asked for,
draws them: on the left the loss above the parent's, which training on such text lowers whatever the model; on the right
the KL divergence from the parent, which it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmsurgeon.report.charts import Scale  # noqa: E402

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 300, 44, 34, 40
# Told apart by people who see colours differently, on white and on black (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
STYLE = (
    "text{font:12px sans-serif;fill:#767676}.title{font-weight:bold}.end{text-anchor:end}.mid{text-anchor:middle}"
    "path{fill:none;stroke-width:2}.grid{stroke:#8884;stroke-width:1}.parent{stroke:#767676;stroke-dasharray:5 4}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="LABEL=folder or loss.jsonl")
    parser.add_argument("--svg", type=Path, help="where to draw")
    arguments = parser.parse_args()
    curves = {label: evaluations(Path(path)) for label, _, path in (run.rpartition("=") for run in arguments.runs)}
    print(table(curves))
    if arguments.svg:
        arguments.svg.write_text(drawing(curves))


def evaluations(path: Path) -> list[dict[str, Any]]:
    """What was measured on held-out text, in order; minutes added."""
    lines = (path / "loss.jsonl" if path.is_dir() else path).read_text().splitlines()
    found = [entry["evaluation"] for entry in map(json.loads, lines) if "evaluation" in entry]
    if not found or "parent_loss" not in found[0]:
        raise SystemExit(f"{path}: no evaluations with the parent's loss; set distill.evaluations above 0")
    # The first evaluation is of the student as it comes: the time before it went into text and parent.
    return [
        {
            **entry,
            "minutes": entry["seconds"] / 60 if entry["step"] else 0.0,
            "above": entry["loss"] - entry["parent_loss"],
        }
        for entry in found
    ]


def table(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Rows of loss and KL by minutes."""
    lines = [
        "| | minutes | tokens | loss | above the parent's | KL | same top token |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, curve in curves.items():
        lines += [
            f"| {label} | {at['minutes']:.1f} | {at['tokens']:,} | {at['loss']:.2f} | "
            f"{at['above']:+.2f} | {at['kl']:.2f} | {at['top1']:.1%} |"
            for at in curve
        ]
    return "\n".join(lines)


def drawing(curves: dict[str, list[dict[str, Any]]]) -> str:
    """SVG of two panels."""
    panels = [
        panel(curves, "above", "loss above the parent's (nats a token)", {"the parent": 0.0}),
        panel(curves, "kl", "KL from the parent (nats a token)", {}),
    ]
    whole = "".join(f'<g transform="translate({place * WIDTH} 0)">{each}</g>' for place, each in enumerate(panels))
    size = f'width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{whole}</svg>\n'


def panel(curves: dict[str, list[dict[str, Any]]], key: str, title: str, levels: dict[str, float]) -> str:
    """One measure by minutes, each curve named at its end."""
    right = WIDTH - 78
    across = Scale.over([0.0, max(at["minutes"] for curve in curves.values() for at in curve)], LEFT, right)
    values = [at[key] for curve in curves.values() for at in curve] + list(levels.values())
    up = Scale.over(values, HEIGHT - BOTTOM, TOP)
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    for tick in up.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up.at(tick):.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{up.at(tick) + 4:.1f}">{tick:g}</text>')
    for tick in across.ticks:
        parts.append(f'<text class="mid" x="{across.at(tick):.1f}" y="{HEIGHT - 22}">{tick:g}</text>')
    parts.append(f'<text class="mid" x="{(LEFT + right) / 2}" y="{HEIGHT - 5}">minutes of training</text>')
    ends: list[tuple[float, str, str]] = []
    for name, level in levels.items():
        parts.append(f'<path class="parent" d="M{LEFT} {up.at(level):.1f}H{right}"/>')
        ends.append((up.at(level), name, "#767676"))
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        points = [(across.at(at["minutes"]), up.at(at[key])) for at in curve]
        parts.append(f'<path stroke="{colour}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
        parts += [f'<circle r="2.5" fill="{colour}" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in points]
        ends.append((points[-1][1], name, colour))
    lowest = 0.0
    for y, name, colour in sorted(ends):
        lowest = max(y, lowest + 14)  # names that would lie on each other move down
        parts.append(f'<text x="{right + 6}" y="{lowest + 4:.1f}" style="fill:{colour}">{escape(name)}</text>')
    return "".join(parts)


if __name__ == "__main__":
    main()
