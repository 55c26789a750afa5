"""report.html: one page that shows what an analysis found, with nothing to fetch and no script to run.

Everything is drawn as inline SVG. Colours are CSS classes, so that the reader's light or dark theme decides them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from llmsurgeon.report.charts import (
    CSS,
    DASH,
    Number,
    Scale,
    figure,
    fixed,
    heat_map,
    is_number,
    label,
    label_step,
    layer_range,
    named,
    ramp_css,
    ranges,
    svg,
)

# Of the page, of one of two columns, and of the dots beside a search step; px.
PAGE, COLUMN, DOTS = 1160, 564, 420


@dataclass(frozen=True)
class About:
    """What a score is: its title, what it means, how to read it, and who defined it."""

    title: str
    meaning: str
    reading: str
    source: str


SCORES = {
    "attention_kl": About(
        "Attention KL",
        "KL(parent || parent without this attention) on the logits, in nats a token, on an eighth of the sequences.",
        "Low can go: the model hardly notices.",
        "replace-one-block score of Puzzle, arXiv 2411.19146",
    ),
    "ffn_kl": About(
        "FFN KL",
        "The same for the FFN alone.",
        "Low can go: the model hardly notices.",
        "Puzzle, arXiv 2411.19146",
    ),
    "block_kl": About(
        "Block KL",
        "The same for attention and FFN together, on four times as many sequences.",
        "Low can go: the model hardly notices.",
        "Puzzle, arXiv 2411.19146",
    ),
    "attention_similarity": About(
        "Attention similarity",
        "cos(x, x + attention(norm(x))): how little the attention turns the hidden state.",
        "High can go: it changes little.",
        "LLM-Drop, arXiv 2406.15786",
    ),
    "ffn_similarity": About(
        "FFN similarity",
        "cos(x, x + FFN(norm(x))): how little the FFN turns the hidden state.",
        "High can go: it changes little.",
        "LLM-Drop, arXiv 2406.15786",
    ),
    "block_influence": About(
        "Block influence",
        "1 - cos(what enters the block, what leaves it).",
        "Low can go: it changes little.",
        "ShortGPT, arXiv 2403.03853",
    ),
}
MATRICES = {
    "block_dependency": About(
        "M, blocks",
        "M[i, j] = 1 - cos(contribution of block j, the same with block i removed), averaged over the tokens of half "
        "of the sequences.",
        "Low for all pairs of a run: its blocks can work side by side.",
        "FFN Fusion, arXiv 2503.18908, section 3",
    ),
    "ffn_dependency": About(
        "M, FFNs",
        "The same between FFNs alone, with the suggested attentions already dropped.",
        "Low for all pairs of a run: its FFNs can be fused.",
        "FFN Fusion, arXiv 2503.18908, section 3",
    ),
    "angular_distance": About(
        "Angular distance",
        "arccos(cos(input of layer l, input of layer l + n)) / pi over the last token of each sequence.",
        "Low can go: the n blocks from l on change little.",
        "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, eq. 2",
    ),
}


def html_report(report: dict[str, Any], recipe: str) -> str:
    """The page for `Analysis.report()` (fields: docs/report.md) and the recipe that it suggests.

    Null values are shown as a dash or an empty cell. All text is escaped.
    """
    body = "\n".join(
        (
            _header(report),
            _suggestion(report),
            _steps(report),
            _dependencies(report),
            _score_charts(report),
            _angular(report),
            _table(report),
            _recipe(recipe, _fuses(report)),
            _reading(report),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(report['model'])}: analysis</title>\n<style>{CSS}{ramp_css()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


@dataclass(frozen=True)
class Words:
    """What the distance to the parent is called, its unit, and what it looks at."""

    name: str
    short: str
    unit: str
    looks_at: str
    scores: dict[str, About]


KL = Words("KL", "KL", "nats a token", "what the model says", SCORES)
# Hidden states are what an encoder is for.
COSINE = Words(
    "cosine distance",
    "Distance",
    "1 \N{MINUS SIGN} cos",
    "what leaves the model",
    {
        **SCORES,
        "attention_kl": replace(
            SCORES["attention_kl"],
            title="Attention distance",
            meaning="1 - cos between the last hidden states of the parent and of the parent without this attention, on "
            "an eighth of the sequences.",
        ),
        "ffn_kl": replace(SCORES["ffn_kl"], title="FFN distance"),
        "block_kl": replace(SCORES["block_kl"], title="Block distance"),
    },
)


def _words(report: dict[str, Any]) -> Words:
    return COSINE if report.get("distance") == "cosine" else KL


def _fuses(report: dict[str, Any]) -> bool:
    return bool(report["suggestion"].get("fuses", True))


# Sections, in the order of the page.


def _header(report: dict[str, Any]) -> str:
    calibration = report["calibration"]
    facts = {
        "Family": report["family"],
        "Layers": f"{report['layers']}",
        "Calibration text": calibration["text"],
        "Tokens": f"{calibration['tokens']:,} in sequences of {calibration['sequence_length']:,}",
        "Made by": f"llmsurgeon {report['llmsurgeon']}",
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    title = f'<p class="eyebrow">What can go</p>\n<h1>{escape(report["model"])}</h1>'
    return f"<header>\n{title}\n<dl>{items}</dl>\n</header>"


def _suggestion(report: dict[str, Any]) -> str:
    layers, suggestion, words = report["layers"], report["suggestion"], _words(report)
    dropped, runs, after = suggestion["drop_attention"], suggestion["fuse_runs"], suggestion["blocks_after"]
    kl = suggestion["steps"][-1]["kl_after"] if suggestion["steps"] else None
    figures = (
        ("Blocks", f"{layers} → {after}"),
        ("Attentions", f"{layers} → {layers - len(dropped)}"),
        ("Fused runs", f"{len(runs)}" + (f", longest {max(map(len, runs))}" if runs else "")),
        (f"{words.short} before refit", f"{fixed(kl, 3)} <small>{words.unit}</small>"),
    )
    cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    legend = (
        '<p class="legend"><span><i class="attention"></i>attention</span><span><i class="ffn"></i>FFN</span>'
        '<span><i class="gone"></i>dropped attention</span><span><i class="fused"></i>FFNs fused into one</span></p>'
    )
    kind = "lead" if len(dropped) <= 12 else "lead long"
    lead = (
        f'<p class="{kind}">{_sentence(layers, dropped, runs, after, kl, words)}</p>\n<dl class="figures">{cards}</dl>'
    )
    return f"<section>\n{lead}\n{_strip(layers, dropped, runs)}\n{legend}\n</section>"


def _sentence(layers: int, dropped: list[int], runs: list[list[int]], after: int, kl: Number, words: Words) -> str:
    if not dropped:
        return "No attention can go under the given limits, so nothing is suggested."
    what = f"Drop the attention of {named('layer', len(dropped), ranges(dropped))}"
    if runs:
        names = (f'<span class="whole">{layer_range(run[0], run[-1])}</span>' for run in runs)
        what += f" and fuse the FFNs of {named('run', len(runs), ', '.join(names))}"
    measured = f"is {fixed(kl, 3)} {words.unit}" if is_number(kl) else "is not known"
    blocks = f"{layers} blocks become {after}"
    return f"{what}: {blocks}. After cutting, before the refit, the {words.name} to the parent {measured}."


def _strip(layers: int, dropped: list[int], runs: list[list[int]]) -> str:
    """The layers before and after: attention above FFN, one column a layer."""
    left, height = 130, 20
    slot = min(52.0, (PAGE - left - 10) / layers)
    gap = 1 if slot < 14 else 3
    step = label_step(layers, slot, 26)
    parts = []

    def box(kind: str, layer: int, y: float, title: str, span: int = 1) -> None:
        x, width = left + layer * slot, span * slot - gap
        parts.append(
            f'<rect class="{kind}" x="{x + 0.5:.2f}" y="{y + 0.5:.1f}" width="{width:.2f}" height="{height}" rx="2">'
            f"<title>{title}</title></rect>"
        )

    for title, y in (("Before", 18), ("After", 92)):
        parts.append(f'<text class="strong" x="0" y="{y + 15}">{title}</text>')
        for part, row in (("attention", y), ("FFN", y + height + 4)):
            parts.append(f'<text class="end" x="{left - 10}" y="{row + 15}">{part}</text>')
    for layer in range(layers):
        if layer % step == 0:
            parts.append(label(left + (layer + 0.5) * slot - gap / 2, 11, layer, "mid"))
        box("attention", layer, 18, f"layer {layer}: attention")
        box("ffn", layer, 42, f"layer {layer}: FFN")
        gone = layer in dropped
        box("gone" if gone else "attention", layer, 92, f"layer {layer}: attention {'dropped' if gone else 'kept'}")
    starts = {run[0]: run for run in runs}
    inside = {layer for run in runs for layer in run[1:]}
    for block, layer in enumerate(layer for layer in range(layers) if layer not in inside):
        run = starts.get(layer, [layer])
        span = len(run)
        centre = left + (layer + span / 2) * slot - gap / 2
        if span > 1:
            name = layer_range(run[0], run[-1])
            box("fused", layer, 116, f"block {block}: FFNs of layers {name} as one", span)
            if span * slot > 8 * len(name):
                parts.append(label(centre, 131, name, "mid on"))
        else:
            box("ffn", layer, 116, f"block {block}: FFN of layer {layer}")
        if block % step == 0:
            parts.append(label(centre, 153, block, "mid"))
    parts.append(f'<text class="end" x="{left - 10}" y="153">block</text>')
    parts.append(f'<text class="end" x="{left - 10}" y="11">layer</text>')
    alternative = f"{layers} layers before and {layers - len(inside)} blocks after"
    return f'<div class="scroll">{svg(PAGE, 160, alternative, parts)}</div>'


def _steps(report: dict[str, Any]) -> str:
    """How the choice went: per step the layer chosen and what the others would have cost."""
    steps = report["suggestion"]["steps"]
    if not steps:
        return ""
    values = [kl for step in steps for kl in step["candidates"].values() if is_number(kl)]
    scale = Scale.over(values, 18, DOTS - 18)
    rows, before = [], 0.0
    for place, step in enumerate(steps, start=1):
        others = sorted((kl, int(layer)) for layer, kl in step["candidates"].items() if is_number(kl))
        others = [(kl, layer) for kl, layer in others if layer != step["layer"]]
        runners = ", ".join(f"{layer} <small>({fixed(kl, 3)})</small>" for kl, layer in others[:3]) or DASH
        kl = step["kl_after"]
        added = f"{kl - before:+.3f}" if is_number(kl) else DASH
        before = kl if is_number(kl) else before
        cells = (place, step["layer"], fixed(kl, 3), added, runners, _dots(scale, step["layer"], kl, others))
        kinds = ("n", "n cut", "n", "n", "", "plot")
        rows.append("<tr>" + "".join(f'<td class="{k}">{c}</td>' for k, c in zip(kinds, cells, strict=True)) + "</tr>")
    words = _words(report)
    name = words.short
    heads = (("Step", "n"), ("Layer", "n"), (name, "n"), ("Added", "n"), (f"Runners-up ({name})", ""))
    fused = ", and the runs that this makes are fused at once" if _fuses(report) else ""
    return _section(
        "How the choice went",
        f"One attention goes at each step{fused}. The layer with the least {words.name} "
        "to the parent is taken; each hollow dot is a layer that would have cost more. Only the "
        "most promising layers are tried.",
        _html_table("steps", (*heads, (_dots_axis(scale, name), "plot")), rows),
    )


def _dots(scale: Scale, chosen: int, kl: Number, others: Sequence[tuple[float, int]]) -> str:
    parts = [f'<path class="grid" d="M{scale.at(tick):.1f} 0v22"/>' for tick in scale.ticks]
    marks = [(value, layer, "other", 3, "") for value, layer in reversed(others)]
    if is_number(kl):
        marks.append((kl, chosen, "cut", 4, "chosen: "))
    parts += [
        f'<circle class="{kind}" cx="{scale.at(value):.1f}" cy="11" r="{radius}">'
        f"<title>{word}layer {layer}: {value:.4g}</title></circle>"
        for value, layer, kind, radius, word in marks
    ]
    return svg(DOTS, 22, f"candidates beside layer {chosen}", parts)


def _dots_axis(scale: Scale, name: str) -> str:
    parts = [label(scale.at(tick), 14, f"{tick:g}", "mid") for tick in scale.ticks]
    return svg(DOTS, 18, f"{name} {scale.kind}", parts)


def _dependencies(report: dict[str, Any]) -> str:
    runs = report["suggestion"]["fuse_runs"]
    figures = "".join(
        figure(MATRICES[name].title, MATRICES[name].meaning, _dependency_map(report[name], runs, MATRICES[name].title))
        for name in ("block_dependency", "ffn_dependency")
    )
    return _section(
        "Who depends on whom",
        "Row i is removed, column j feels it. Runs are sought where M is low for every pair; the suggested ones are "
        "outlined.",
        f'<div class="two">{figures}</div>',
    )


def _dependency_map(matrix: list[list[Number]], runs: list[list[int]], title: str) -> str:
    layers = len(matrix)
    cells = [(i, j, matrix[i][j], f"i {i}, j {j}") for i in range(layers) for j in range(i + 1, layers)]
    return heat_map(cells, layers, ("removed i", "layer j"), 0, runs, title)


def _score_charts(report: dict[str, Any]) -> str:
    dropped = set(report["suggestion"]["drop_attention"])
    charts = "".join(
        figure(about.title, f"{about.meaning} {about.reading}", _bars(report["scores"][name], dropped, about.title))
        for name, about in _words(report).scores.items()
        if name in report["scores"]
    )
    return _section(
        "Scores by layer",
        "Each part removed, or looked at, by itself in the unchanged model. Whiskers are 95 % intervals over the "
        'calibration sequences. Layers whose attention is suggested to go are <b class="cut">highlighted</b>.',
        f'<div class="two">{charts}</div>',
    )


def _bars(score: dict[str, list[Number]], dropped: set[int], title: str) -> str:
    """Bars from zero, or dots on stems where the axis does not begin at zero (a bar's length would mislead there)."""
    left, top, width, height = 46, 10, COLUMN - 46, 150
    means = score["mean"]
    bounds = [v for key in ("low", "high") for v in score[key] if is_number(v)]
    scale = Scale.over([v for v in means if is_number(v)], top + height, top, bounds)
    slot = min(64.0, width / len(means))
    thick = min(26.0, slot * 0.68)
    parts = [f'<path class="grid" d="M{left} {scale.at(t):.1f}h{width}"/>' for t in scale.ticks]
    parts += [label(left - 6, scale.at(tick) + 4, f"{tick:g}", "end") for tick in scale.ticks]
    step = label_step(len(means), slot, 26)
    for layer, mean in enumerate(means):
        x = left + (layer + 0.5) * slot
        if layer % step == 0:
            parts.append(label(x, top + height + 19, layer, "mid"))
        if not is_number(mean):
            continue
        low, high = score["low"][layer], score["high"][layer]
        interval = whisker = ""
        if is_number(low) and is_number(high):
            interval = f" ({low:.4g} to {high:.4g})"
            whisker = f'<path class="whisker" d="M{x:.2f} {scale.at(low):.1f}V{scale.at(high):.1f}"/>'
        kind = ("bar" if scale.from_zero else "bar dot") + (" cut" if layer in dropped else "")
        parts.append(f'<g class="{kind}"><title>layer {layer}: {mean:.4g}{interval}</title>')
        y, base = scale.at(mean), scale.at(0.0 if scale.from_zero else scale.low)
        upper, size = min(y, base), abs(base - y)
        if scale.from_zero:
            parts.append(f'<rect x="{x - thick / 2:.2f}" y="{upper:.1f}" width="{thick:.2f}" height="{size:.1f}"/>')
        else:
            parts.append(f'<path class="stem" d="M{x:.2f} {base:.1f}V{y:.1f}"/>')
            parts.append(f'<circle cx="{x:.2f}" cy="{y:.1f}" r="{min(3.0, max(2.0, slot * 0.3)):.1f}"/>')
        parts.append(f"{whisker}</g>")
    parts.append(f'<text class="end" x="{left - 6}" y="{top + height + 19}">layer</text>')
    note = scale.kind if any(map(is_number, means)) else "nothing was measured"
    note = f'<p class="note">{note}</p>' if note else ""
    return svg(COLUMN, top + height + 25, title, parts) + note


def _angular(report: dict[str, Any]) -> str:
    matrix, about = report["angular_distance"], MATRICES["angular_distance"]
    layers = len(matrix)
    cells = [
        (n, start, matrix[n][start], f"layers {start} to {start + n} ({n + 1})")
        for n in range(layers)
        for start in range(layers - n)
    ]
    rows = []
    for size in range(1, min(layers, 12) + 1):
        known = [(value, start) for start, value in enumerate(matrix[size - 1]) if is_number(value)]
        if known:
            value, start = min(known)
            where = f"{start}" if size == 1 else layer_range(start, start + size - 1)
            rows.append(f'<tr><td class="n">{size}</td><td class="n">{where}</td><td class="n">{value:.4f}</td></tr>')
    table = _html_table("", (("Blocks", "n"), ("Layers", "n"), ("Distance", "n")), rows)
    figures = (
        figure(
            about.title,
            about.meaning,
            heat_map(cells, layers, ("n blocks", "first layer l"), 1, [], about.title, 360),
        ),
        figure("Least window of each size", "The n neighbours that turn the hidden state least.", table),
    )
    intro = "How far n neighbouring blocks turn the hidden state: what removing them at once would take away."
    return _section("Whole windows", intro, f'<div class="two">{"".join(figures)}</div>')


def _table(report: dict[str, Any]) -> str:
    suggestion = report["suggestion"]
    names = [name for name in SCORES if name in report["scores"]]
    order = {step["layer"]: place for place, step in enumerate(suggestion["steps"], start=1)}
    run_of = {layer: run for run in suggestion["fuse_runs"] for layer in run}
    rows = []
    for layer in range(report["layers"]):
        cells = [f'<td class="n">{layer}</td>']
        for name in names:
            score = report["scores"][name]
            mean, low, high = (score[key][layer] for key in ("mean", "low", "high"))
            half = f" <small>±{(high - low) / 2:.4f}</small>" if is_number(low) and is_number(high) else ""
            cells.append(f'<td class="n">{fixed(mean, 4)}{half}</td>')
        notes = []
        if layer in suggestion["drop_attention"]:
            notes.append('<b class="cut">attention out</b>' + (f" (step {order[layer]})" if layer in order else ""))
        if layer in run_of:
            notes.append(f"run {layer_range(run_of[layer][0], run_of[layer][-1])}")
        rows.append(f"<tr>{''.join(cells)}<td>{', '.join(notes)}</td></tr>")
    heads = [("Layer", "n"), *((_words(report).scores[name].title, "n") for name in names), ("Suggestion", "")]
    return _section(
        "Every score", "Means, with half the width of the 95 % interval.", _html_table("every", heads, rows)
    )


def _recipe(recipe: str, fuses: bool) -> str:
    command = '<pre class="command">llmsurgeon run suggested.yaml -o OUT</pre>'
    intro = f"suggested.yaml, beside this page, cuts{', fuses' if fuses else ''} and refits. It runs as it is:"
    return _section("The recipe", intro, f"{command}\n<pre>{escape(recipe)}</pre>")


def _reading(report: dict[str, Any]) -> str:
    words = _words(report)
    fused = ", measured after fusing each time" if _fuses(report) else ""
    items = "".join(
        f"<div><dt>{about.title}</dt><dd>{escape(about.meaning)} {about.reading} <cite>{about.source}</cite></dd></div>"
        for about in (*words.scores.values(), *MATRICES.values())
    )
    return _section(
        "How to read this",
        "Layers are counted from 0. The cheap scores (similarity, influence, angular distance) look at hidden states; "
        f"{words.name[0].upper()}{words.name[1:]} looks at {words.looks_at} and is the one to trust. Scores of single "
        f"removals do not add up: that is why the suggestion is searched step by step{fused}. The refit in the recipe "
        f"then takes back part of the {words.name}.",
        f'<dl class="reading">{items}</dl>',
    )


def _section(title: str, intro: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n<p>{intro}</p>\n{content}\n</section>"


def _html_table(kind: str, heads: Iterable[tuple[str, str]], rows: Iterable[str]) -> str:
    head = "".join(f'<th class="{align}">{title}</th>' for title, align in heads)
    body = "\n".join(rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
    return f'<div class="scroll">{table}</div>'
