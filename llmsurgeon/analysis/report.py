"""report.html: one page that shows what an analysis found, with nothing to fetch and no script to run.

Everything is drawn as inline SVG. Colours are CSS classes, so that the reader's light or dark theme decides them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, TypeGuard

# Of the page, of one of two columns, and of the dots beside a search step; px.
PAGE, COLUMN, DOTS = 1160, 564, 420
LEVELS = 48
# A range wider than this factor is drawn on a log scale.
WIDE = 20

Number = float | None
DASH = "\N{EN DASH}"


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
        f"<title>{escape(report['model'])}: analysis</title>\n<style>{CSS}{_ramp_css()}</style>\n</head>\n"
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
        (f"{words.short} before refit", f"{_fixed(kl, 3)} <small>{words.unit}</small>"),
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
    what = f"Drop the attention of {_named('layer', len(dropped), _ranges(dropped))}"
    if runs:
        names = (f'<span class="whole">{_span(run[0], run[-1])}</span>' for run in runs)
        what += f" and fuse the FFNs of {_named('run', len(runs), ', '.join(names))}"
    measured = f"is {_fixed(kl, 3)} {words.unit}" if _known(kl) else "is not known"
    blocks = f"{layers} blocks become {after}"
    return f"{what}: {blocks}. After cutting, before the refit, the {words.name} to the parent {measured}."


def _strip(layers: int, dropped: list[int], runs: list[list[int]]) -> str:
    """The layers before and after: attention above FFN, one column a layer."""
    left, height = 130, 20
    slot = min(52.0, (PAGE - left - 10) / layers)
    gap = 1 if slot < 14 else 3
    step = _every(layers, slot, 26)
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
            parts.append(_text(left + (layer + 0.5) * slot - gap / 2, 11, layer, "mid"))
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
            name = _span(run[0], run[-1])
            box("fused", layer, 116, f"block {block}: FFNs of layers {name} as one", span)
            if span * slot > 8 * len(name):
                parts.append(_text(centre, 131, name, "mid on"))
        else:
            box("ffn", layer, 116, f"block {block}: FFN of layer {layer}")
        if block % step == 0:
            parts.append(_text(centre, 153, block, "mid"))
    parts.append(f'<text class="end" x="{left - 10}" y="153">block</text>')
    parts.append(f'<text class="end" x="{left - 10}" y="11">layer</text>')
    label = f"{layers} layers before and {layers - len(inside)} blocks after"
    return f'<div class="scroll">{_svg(PAGE, 160, label, parts)}</div>'


def _steps(report: dict[str, Any]) -> str:
    """How the choice went: per step the layer chosen and what the others would have cost."""
    steps = report["suggestion"]["steps"]
    if not steps:
        return ""
    values = [kl for step in steps for kl in step["candidates"].values() if _known(kl)]
    scale = Scale.over(values, 18, DOTS - 18)
    rows, before = [], 0.0
    for place, step in enumerate(steps, start=1):
        others = sorted((kl, int(layer)) for layer, kl in step["candidates"].items() if _known(kl))
        others = [(kl, layer) for kl, layer in others if layer != step["layer"]]
        runners = ", ".join(f"{layer} <small>({_fixed(kl, 3)})</small>" for kl, layer in others[:3]) or DASH
        kl = step["kl_after"]
        added = f"{kl - before:+.3f}" if _known(kl) else DASH
        before = kl if _known(kl) else before
        cells = (place, step["layer"], _fixed(kl, 3), added, runners, _dots(scale, step["layer"], kl, others))
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
    if _known(kl):
        marks.append((kl, chosen, "cut", 4, "chosen: "))
    parts += [
        f'<circle class="{kind}" cx="{scale.at(value):.1f}" cy="11" r="{radius}">'
        f"<title>{word}layer {layer}: {value:.4g}</title></circle>"
        for value, layer, kind, radius, word in marks
    ]
    return _svg(DOTS, 22, f"candidates beside layer {chosen}", parts)


def _dots_axis(scale: Scale, name: str) -> str:
    parts = [_text(scale.at(tick), 14, f"{tick:g}", "mid") for tick in scale.ticks]
    return _svg(DOTS, 18, f"{name} {scale.kind}", parts)


def _dependencies(report: dict[str, Any]) -> str:
    runs = report["suggestion"]["fuse_runs"]
    figures = "".join(
        _figure(MATRICES[name].title, MATRICES[name].meaning, _dependency_map(report[name], runs, MATRICES[name].title))
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
    return _heat(cells, layers, ("removed i", "layer j"), 0, runs, title)


def _score_charts(report: dict[str, Any]) -> str:
    dropped = set(report["suggestion"]["drop_attention"])
    charts = "".join(
        _figure(about.title, f"{about.meaning} {about.reading}", _bars(report["scores"][name], dropped, about.title))
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
    bounds = [v for key in ("low", "high") for v in score[key] if _known(v)]
    scale = Scale.over([v for v in means if _known(v)], top + height, top, bounds)
    slot = min(64.0, width / len(means))
    thick = min(26.0, slot * 0.68)
    parts = [f'<path class="grid" d="M{left} {scale.at(t):.1f}h{width}"/>' for t in scale.ticks]
    parts += [_text(left - 6, scale.at(tick) + 4, f"{tick:g}", "end") for tick in scale.ticks]
    step = _every(len(means), slot, 26)
    for layer, mean in enumerate(means):
        x = left + (layer + 0.5) * slot
        if layer % step == 0:
            parts.append(_text(x, top + height + 19, layer, "mid"))
        if not _known(mean):
            continue
        low, high = score["low"][layer], score["high"][layer]
        interval = whisker = ""
        if _known(low) and _known(high):
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
    note = scale.kind if any(map(_known, means)) else "nothing was measured"
    note = f'<p class="note">{note}</p>' if note else ""
    return _svg(COLUMN, top + height + 25, title, parts) + note


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
        known = [(value, start) for start, value in enumerate(matrix[size - 1]) if _known(value)]
        if known:
            value, start = min(known)
            where = f"{start}" if size == 1 else _span(start, start + size - 1)
            rows.append(f'<tr><td class="n">{size}</td><td class="n">{where}</td><td class="n">{value:.4f}</td></tr>')
    table = _html_table("", (("Blocks", "n"), ("Layers", "n"), ("Distance", "n")), rows)
    figures = (
        _figure(
            about.title, about.meaning, _heat(cells, layers, ("n blocks", "first layer l"), 1, [], about.title, 360)
        ),
        _figure("Least window of each size", "The n neighbours that turn the hidden state least.", table),
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
            half = f" <small>±{(high - low) / 2:.4f}</small>" if _known(low) and _known(high) else ""
            cells.append(f'<td class="n">{_fixed(mean, 4)}{half}</td>')
        notes = []
        if layer in suggestion["drop_attention"]:
            notes.append('<b class="cut">attention out</b>' + (f" (step {order[layer]})" if layer in order else ""))
        if layer in run_of:
            notes.append(f"run {_span(run_of[layer][0], run_of[layer][-1])}")
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


# Drawing.


@dataclass(frozen=True)
class Scale:
    """Maps values to px, linearly or by logarithm; what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, bounds: Sequence[float] = ()) -> Scale:
        """Of `values` and the interval `bounds` about them: log where wide, from zero unless that hides everything."""
        if not values:
            return cls(0, 1, start, end, False, (0, 1))
        low, high = min(values), max((*values, *bounds))
        if low > 0 and high / low > WIDE:
            ticks = _log_ticks(low, high)
            return cls(min(low, ticks[0]), max(high, ticks[-1]), start, end, True, ticks)
        low = min(low, *bounds) if bounds and low > high / 2 else low
        if 0 <= low <= high / 2 or low == high:
            low, high = min(low, 0.0), max(high, 0.0)
        ticks = _linear_ticks(low, high)
        return cls(ticks[0], ticks[-1], start, end, False, ticks)

    def at(self, value: float) -> float:
        """Where `value` lies."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @property
    def from_zero(self) -> bool:
        """Whether a bar's length is its value."""
        return not self.log and self.low <= 0 <= self.high

    @property
    def kind(self) -> str:
        """What a reader should know about the axis; nothing where it begins at zero."""
        return "log scale" if self.log else "" if self.from_zero else f"axis begins at {self.low:g}"


def _linear_ticks(low: float, high: float, wanted: int = 4) -> tuple[float, ...]:
    span = (high - low) or 1.0
    size = 10 ** math.floor(math.log10(span / wanted))
    size = next(size * m for m in (1, 2, 5, 10) if span / (size * m) <= wanted + 0.5)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return tuple(round(k * size, 12) for k in range(first, max(last, first + 1) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = (1,) if last - first > 3 else (1, 3)
    ticks = [m * 10.0**k for k in range(first, last + 1) for m in marks]
    # One tick below the least value and one above the greatest, no more.
    below, above = max(t for t in ticks if t <= low), min((t for t in ticks if t >= high), default=high)
    return tuple(float(f"{t:.6g}") for t in ticks if below <= t <= above)


def _heat(
    cells: Iterable[tuple[int, int, Number, str]],
    layers: int,
    names: tuple[str, str],
    first_row: int,
    outlined: list[list[int]],
    title: str,
    room: int = 520,
) -> str:
    """A heat map of (row, column, value, tooltip) with its legend.

    Colours run from 0 to the maximum, or to the 90th percentile where the rest stand far above it: what the first
    layers do to all others would otherwise hide every difference among the low values, which are the ones that matter.
    """
    cells = list(cells)
    known = sorted(value for _, _, value, _ in cells if _known(value))
    top = known[-1] if known else 1.0
    if known and (usual := known[int(len(known) * 0.9)]) * 1.5 < top:
        top = usual or top
    size = max(3, min(40, room // layers))
    gap = 1 if size > 7 else 0
    left, head = 40, 34
    parts = []
    for row, column, value, tip in cells:
        x, y, side = left + column * size, head + row * size, size - gap
        level = f"c{_level(value, top)}" if _known(value) else "none"
        shown = f"{value:.4g}" if _known(value) else "not measured"
        parts.append(f'<path class="{level}" d="M{x} {y}h{side}v{side}h-{side}z"><title>{tip}: {shown}</title></path>')
    for run in outlined:
        x, y, side = left + run[0] * size, head + run[0] * size, len(run) * size - gap
        outline = f"M{x} {y}h{side}v{side}h-{side}z"
        parts.append(f'<path class="outline" d="{outline}"><title>run {_span(run[0], run[-1])}</title></path>')
    step = _every(layers, size, 22)
    centre = (size - gap) / 2
    parts += [_text(left + k * size + centre, head - 6, k, "mid") for k in range(0, layers, step)]
    marks = [k for k in range(layers) if (k + first_row) % step == 0 or (first_row and k == 0)]
    parts += [_text(left - 6, head + k * size + centre + 4, k + first_row, "end") for k in marks]
    turned = f'transform="translate(2 {head + 2}) rotate(90)"'
    parts.append(f'<text x="{left}" y="11">{names[1]} →</text><text {turned}>{names[0]} →</text>')
    width, height = max(left + layers * size + 2, 220), max(head + layers * size + 2, 110)
    return _svg(width, height, title, parts) + _legend(top, clipped=bool(known) and top < known[-1])


def _legend(top: float, clipped: bool) -> str:
    bar = [f'<rect class="c{k}" x="{40 + k * 4}" y="0" width="4.5" height="10"/>' for k in range(LEVELS)]
    for share in (0, 0.5, 1):
        sign = "≥ " if clipped and share == 1 else ""
        bar.append(_text(40 + share * LEVELS * 4, 24, f"{sign}{top * share:.2g}", "mid"))
    return _svg(290, 28, "colour scale", bar)


def _level(value: float, top: float) -> int:
    return min(LEVELS - 1, max(0, int(value / top * LEVELS))) if top > 0 else 0


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size}>{"".join(parts)}</svg>'


def _text(x: float, y: float, text: object, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _figure(title: str, caption: str, content: str) -> str:
    return (
        f'<figure><figcaption><b>{title}</b> {escape(caption)}</figcaption><div class="scroll">{content}</div></figure>'
    )


def _every(count: int, slot: float, wanted: float) -> int:
    """Label every how many, so that labels are `wanted` px apart."""
    return next((step for step in (1, 2, 5, 10, 20, 50) if step * slot >= wanted or step >= count), 100)


# Words and numbers.


def _known(value: Number) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _fixed(value: Number, digits: int) -> str:
    return f"{value:.{digits}f}" if _known(value) else DASH


def _span(first: int, last: int) -> str:
    return f"{first}{DASH}{last}"


def _named(noun: str, count: int, names: str) -> str:
    return f"{noun} {names}" if count == 1 else f"{count} {noun}s ({names})"


def _ranges(layers: Sequence[int]) -> str:
    """4, 7, 8, 9 -> 4, 7-9."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(_span(run[0], run[-1]) if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


# Colours: even steps of lightness in OKLCH (Ottosson 2020), so that equal differences look equal, in both themes.


def _oklch_hex(lightness: float, chroma: float, hue: float) -> str:
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    l_ = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m_ = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s_ = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_,
        -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_,
        -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_,
    )
    bounded = (min(1.0, max(0.0, c)) for c in linear)
    srgb = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in bounded)
    return "#" + "".join(f"{round(255 * c):02x}" for c in srgb)


def _ramp_css() -> str:
    """Classes c0 to c47: pale yellow to deep blue on light paper, deep blue to pale yellow on dark."""
    light, dark = [], []
    for k in range(LEVELS):
        t = k / (LEVELS - 1)
        bulge = math.sin(math.pi * t)
        # The chroma stays inside sRGB all along: clipping would make the steps uneven.
        light.append(f".c{k}{{fill:{_oklch_hex(0.965 - 0.665 * t, 0.04 + 0.042 * bulge + 0.02 * t, 100 + 165 * t)}}}")
        dark.append(f".c{k}{{fill:{_oklch_hex(0.27 + 0.65 * t, 0.045 + 0.025 * bulge + 0.04 * t, 265 - 165 * t)}}}")
    return "".join(light) + "@media screen and (prefers-color-scheme:dark){" + "".join(dark) + "}"


CSS = """
:root{--paper:#fdfdfc;--ink:#1c2024;--soft:#646b73;--rule:#e4e6e9;--panel:#f5f6f6;--attention:#5c6b7f;--ffn:#b4bfcc;
--fused:#1f6feb;--cut:#c2500c;--bar:#93a1b3;--on:#fff}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7ea;--soft:#98a1ab;--rule:#2b3037;
--panel:#1c2025;--attention:#8c9db3;--ffn:#4a5666;--fused:#4c8df5;--cut:#f0883e;--bar:#64748a;--on:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:1208px;margin:0 auto;padding:44px 24px 72px}
section{margin-top:52px}
h1{font-size:30px;line-height:1.2;font-weight:620;letter-spacing:-.015em;margin:2px 0 20px;overflow-wrap:anywhere}
h2{font-size:19px;font-weight:620;letter-spacing:-.005em;margin:0 0 6px;padding-top:14px;
border-top:1px solid var(--rule)}
section>p{margin:0 0 18px;max-width:82ch;color:var(--soft)}
section>p.lead{font-size:20px;line-height:1.45;color:var(--ink);max-width:66ch;margin-bottom:24px;text-wrap:pretty}
section>p.long{font-size:16px;max-width:98ch}
.whole{white-space:nowrap}
.eyebrow{margin:0;color:var(--soft);font-size:13px}
dl{margin:0;display:flex;flex-wrap:wrap;gap:12px 40px}
dt{color:var(--soft);font-size:13px}
dd{margin:0;overflow-wrap:anywhere}
.figures{gap:12px 56px;margin-bottom:28px}
.figures dd{font-size:26px;line-height:1.3;font-weight:560;letter-spacing:-.01em}
.figures small{font-size:14px;font-weight:400;letter-spacing:0}
small,.note{color:var(--soft);font-size:12px}
.note{margin:0 0 0 46px}
b{font-weight:620}
b.cut,td.cut{color:var(--cut);font-weight:620}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:32px}
figure{margin:0;break-inside:avoid}
figcaption{font-size:13px;color:var(--soft);margin-bottom:10px;min-height:64px;text-wrap:pretty}
figcaption b{display:block;color:var(--ink);font-size:15px}
.scroll{overflow-x:auto}
svg{display:block;max-width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}svg .strong{fill:var(--ink);font-weight:620;font-size:13px}
svg text.on{fill:var(--on)}
.attention{fill:var(--attention);background:var(--attention)}
.ffn{fill:var(--ffn);background:var(--ffn)}
.fused{fill:var(--fused);background:var(--fused)}
.gone{fill:none;stroke:var(--cut);stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:4px 24px;font-size:13px;margin-top:10px}
.legend i{display:inline-block;width:14px;height:12px;border-radius:2px;margin-right:7px;vertical-align:-1px}
.legend i.gone{border:1.2px solid var(--cut)}.legend i.fused{width:30px}
.grid{stroke:var(--rule);fill:none}
.bar{fill:var(--bar);stroke:var(--bar)}.bar rect,.bar circle{stroke:none}
.bar.cut{fill:var(--cut);stroke:var(--cut)}
.stem{fill:none;stroke-width:1.2;opacity:.35}
.whisker{fill:none;stroke:var(--ink);opacity:.75}
.dot .whisker{stroke:inherit;stroke-width:1.2;opacity:1}
.other{fill:var(--paper);stroke:var(--bar)}circle.cut{fill:var(--cut)}
.none{fill:var(--rule)}
.outline{fill:none;stroke:var(--cut);stroke-width:2}
table{border-collapse:collapse;font-size:13px}
th{font-weight:400;color:var(--soft);text-align:left;vertical-align:bottom;border-bottom:1px solid var(--rule)}
th,td{padding:3px 14px 3px 0;white-space:nowrap}
td{border-bottom:1px solid var(--rule)}
.n{text-align:right;padding:3px 18px 3px 0}
.every,.steps{width:100%}
.plot{padding:0;width:420px}
tr{break-inside:avoid}
pre{margin:0;padding:14px 16px;background:var(--panel);border:1px solid var(--rule);border-radius:4px;overflow-x:auto;
font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre.command{margin-bottom:12px;font-weight:600}
.reading{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px 32px}
.reading dt{color:var(--ink);font-weight:620;font-size:14px}
.reading dd{font-size:13px;color:var(--soft)}
cite{display:block;font-style:italic}
@media screen and (max-width:860px){.two,.reading{grid-template-columns:minmax(0,1fr)}h1{font-size:24px}
section>p.lead{font-size:18px}
.scroll>svg{max-width:none}}
@page{margin:12mm}
@media print{main{padding:0;max-width:none}.scroll{overflow:visible}section{margin-top:32px}h2{break-after:avoid}
section>p.lead{font-size:16px}table{font-size:9.5px}table small{font-size:8.5px}th,td,.n{padding:2px 6px 2px 0}
th{white-space:normal}.plot,.plot svg{width:290px}pre{white-space:pre-wrap}.note{margin-left:26px}}
"""
