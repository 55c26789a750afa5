"""report.html: one page that shows what an analysis found, with nothing to fetch and no script to run.

Everything is drawn as inline SVG. Colours are CSS classes, so that the reader's light or dark theme decides them.
"""

from __future__ import annotations

from typing import Any

from llmsurgeon.report.abouts import MATRICES, SCORES, Words, words_of
from llmsurgeon.report.charts import DASH, Number, Scale, fixed, is_number, layer_range, named, ramp_css, ranges
from llmsurgeon.report.drawings import DOTS, angular_map, bars, dependency_map, dots, dots_axis, strip
from llmsurgeon.report.pages import html_page

LONGEST_WINDOW = 12  # of the table of least windows


def html_report(report: dict[str, Any], recipe: str) -> str:
    """The page for `Analysis.report()` (fields: docs/report.md) and the recipe that it suggests.

    Null values are shown as a dash or an empty cell. All text is escaped.
    """
    words, suggestion = words_of(report), report["suggestion"]
    dropped, runs = suggestion["drop_attention"], suggestion["fuse_runs"]
    angular = MATRICES["angular_distance"]
    return html_page(
        "analysis.html.j2",
        name=report["model"],
        colours=ramp_css(),
        words=words,
        fuses=bool(suggestion.get("fuses", True)),
        facts=_facts(report),
        recipe=recipe,
        layer_range=layer_range,
        dash=DASH,
        **_suggestion(report, words),
        strip=strip(report["layers"], dropped, runs),
        **_steps(suggestion["steps"], words),
        dependencies=[
            (MATRICES[name], dependency_map(report[name], runs, MATRICES[name].title))
            for name in ("block_dependency", "ffn_dependency")
        ],
        charts=[
            (about, bars(report["scores"][name], set(dropped), about.title))
            for name, about in words.scores.items()
            if name in report["scores"]
        ],
        angular=angular,
        angular_map=angular_map(report["angular_distance"], angular.title),
        windows=_windows(report["angular_distance"]),
        **_rows(report, words),
        abouts=(*words.scores.values(), *MATRICES.values()),
    )


def _facts(report: dict[str, Any]) -> dict[str, str]:
    calibration = report["calibration"]
    return {
        "Family": report["family"],
        "Layers": f"{report['layers']}",
        "Calibration text": calibration["text"],
        "Tokens": f"{calibration['tokens']:,} in sequences of {calibration['sequence_length']:,}",
        "Made by": f"llmsurgeon {report['llmsurgeon']}",
    }


def _suggestion(report: dict[str, Any], words: Words) -> dict[str, Any]:
    layers, suggestion = report["layers"], report["suggestion"]
    dropped, runs, after = suggestion["drop_attention"], suggestion["fuse_runs"], suggestion["blocks_after"]
    kl = suggestion["steps"][-1]["kl_after"] if suggestion["steps"] else None
    return {
        "layers": layers,
        "dropped": dropped,
        "dropped_layers": named("layer", len(dropped), ranges(dropped)),
        "runs": runs,
        "blocks_after": after,
        "measured": f"is {fixed(kl, 3)} {words.unit}" if is_number(kl) else "is not known",
        "figures": (
            ("Blocks", f"{layers} → {after}", ""),
            ("Attentions", f"{layers} → {layers - len(dropped)}", ""),
            ("Fused runs", f"{len(runs)}" + (f", longest {max(map(len, runs))}" if runs else ""), ""),
            (f"{words.short} before refit", fixed(kl, 3), words.unit),
        ),
    }


def _steps(steps: list[dict[str, Any]], words: Words) -> dict[str, Any]:
    """Per step the layer chosen and what the others would have cost."""
    values = [kl for step in steps for kl in step["candidates"].values() if is_number(kl)]
    scale = Scale.over(values, 18, DOTS - 18)
    made, before = [], 0.0
    for step in steps:
        others = sorted((kl, int(layer)) for layer, kl in step["candidates"].items() if is_number(kl))
        others = [(kl, layer) for kl, layer in others if layer != step["layer"]]
        kl = step["kl_after"]
        made.append(
            {
                "layer": step["layer"],
                "distance": fixed(kl, 3),
                "added": f"{kl - before:+.3f}" if is_number(kl) else DASH,
                "runners_up": [(layer, fixed(other, 3)) for other, layer in others[:3]],
                "dots": dots(scale, step["layer"], kl, others),
            }
        )
        before = kl if is_number(kl) else before
    return {"steps": made, "steps_axis": dots_axis(scale, words.short)}


def _windows(matrix: list[list[Number]]) -> list[tuple[int, str, str]]:
    """Of each size the window that turns the hidden state least: (blocks, layers, distance)."""
    found = []
    for size in range(1, min(len(matrix), LONGEST_WINDOW) + 1):
        known = [(value, start) for start, value in enumerate(matrix[size - 1]) if is_number(value)]
        if known:
            value, start = min(known)
            where = f"{start}" if size == 1 else layer_range(start, start + size - 1)
            found.append((size, where, f"{value:.4f}"))
    return found


def _rows(report: dict[str, Any], words: Words) -> dict[str, Any]:
    """Every score of every layer: (mean, half of the interval's width), and what is suggested for it."""
    suggestion = report["suggestion"]
    names = [name for name in SCORES if name in report["scores"]]
    order = {step["layer"]: place for place, step in enumerate(suggestion["steps"], start=1)}
    run_of = {layer: run for run in suggestion["fuse_runs"] for layer in run}
    rows = []
    for layer in range(report["layers"]):
        scores = []
        for name in names:
            mean, low, high = (report["scores"][name][key][layer] for key in ("mean", "low", "high"))
            half = f"{(high - low) / 2:.4f}" if is_number(low) and is_number(high) else ""
            scores.append((fixed(mean, 4), half))
        run = run_of.get(layer)
        rows.append(
            {
                "scores": scores,
                "out": layer in suggestion["drop_attention"],
                "step": f" (step {order[layer]})" if layer in order else "",
                "run": f"run {layer_range(run[0], run[-1])}" if run else "",
            }
        )
    return {"rows": rows, "score_titles": [words.scores[name].title for name in names]}
