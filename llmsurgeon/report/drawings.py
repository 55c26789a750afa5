"""The drawings of an analysis' page: layers before and after, steps of the search, dependencies, scores, windows."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from llmsurgeon.report.charts import Axes, Number, Scale, heat_map, is_number, label, label_step, layer_range, svg

# Of the page, of one of two columns, and of the dots beside a search step; px.
PAGE, COLUMN, DOTS = 1160, 564, 420


def strip(layers: int, dropped: list[int], runs: list[list[int]]) -> Markup:
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
    return svg(PAGE, 160, alternative, parts)


def dots(scale: Scale, chosen: int, kl: Number, others: Sequence[tuple[float, int]]) -> Markup:
    """One step of the search: the layer chosen and what the others would have cost."""
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


def dots_axis(scale: Scale, name: str) -> Markup:
    """The axis above the dots."""
    parts = [label(scale.at(tick), 14, f"{tick:g}", "mid") for tick in scale.ticks]
    return svg(DOTS, 18, f"{name} {scale.kind}", parts)


def dependency_map(matrix: list[list[Number]], runs: list[list[int]], title: str) -> Markup:
    """The dependency matrix of an analysis, its suggested runs outlined."""
    layers = len(matrix)
    cells = [(i, j, matrix[i][j], f"i {i}, j {j}") for i in range(layers) for j in range(i + 1, layers)]
    return heat_map(cells, layers, Axes("removed i", "layer j"), title, outlined=runs)


def bars(score: dict[str, list[Number]], dropped: set[int], title: str) -> Markup:
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
    return svg(COLUMN, top + height + 25, title, parts) + (
        Markup('<p class="note">{}</p>').format(note) if note else ""
    )


def angular_map(matrix: list[list[Number]], title: str) -> Markup:
    """The angular distance of every window of neighbouring blocks."""
    layers = len(matrix)
    cells = [
        (n, start, matrix[n][start], f"layers {start} to {start + n} ({n + 1})")
        for n in range(layers)
        for start in range(layers - n)
    ]
    return heat_map(cells, layers, Axes("n blocks", "first layer l", first_row=1, room=360), title)
