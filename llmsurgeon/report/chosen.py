"""The drawing of what a search chose: of each layer how much of attention and FFN is left, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from llmsurgeon.report.charts import Scale, is_number, label, label_step, layer_range, svg
from llmsurgeon.report.drawings import PAGE

LEFT = 130
# Rows: attention, FFN, score; each from top to floor, px.
ATTENTION, FFN, SCORE = (20, 62), (70, 134), (156, 214)


def strip_of(chosen: Sequence[Mapping[str, Any]], parent: Sequence[Sequence[int]], short: str = "KL") -> Markup:
    """A column a layer of the parent, one over all layers of a run: outlines are the parent's, what is left is filled.

    chosen: entries of `layers` of a search's report; parent: (heads, KV heads, FFN width) of each of its layers; short:
    what the scores are called.
    """
    layers = len(parent)
    slot = min(52.0, (PAGE - LEFT - 10) / max(layers, 1))
    scale = Scale.over([0.0, *(each["kl"] for each in chosen if is_number(each["kl"]))], SCORE[1], SCORE[0])
    parts = [*_rows(scale, short)]
    step = label_step(layers, slot, 26)
    for layer in range(0, layers, step):
        parts.append(label(LEFT + (layer + 0.5) * slot - 1, 12, layer, "mid"))
    for each in chosen:
        parts += _column(each, parent, slot, scale, short)
    return svg(PAGE, SCORE[1] + 8, f"what was chosen in each of {layers} layers", parts)


def _rows(scale: Scale, short: str) -> list[str]:
    named = [("attention", ATTENTION), ("FFN", FFN), (f"{short} alone", SCORE)]
    parts = [label(LEFT - 54, (top + floor) / 2 + 4, name, "end") for name, (top, floor) in named]
    parts.append(label(LEFT - 54, 12, "layer", "end"))
    for tick in scale.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {scale.at(tick):.1f}H{PAGE - 10}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{scale.at(tick) + 4:.1f}">{tick:g}</text>')
    return parts


def _column(
    each: Mapping[str, Any], parent: Sequence[Sequence[int]], slot: float, scale: Scale, short: str
) -> list[str]:
    layers = each["layers"]
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layer_range(layers[0], layers[-1])}"
    tip = escape(f"{where}: {each['name']}" + (f", {short} {each['kl']:.4g}" if is_number(each["kl"]) else ""))
    x, width = LEFT + layers[0] * slot + 0.5, len(layers) * slot - (1 if slot < 14 else 3)
    parts = [f"<g><title>{tip}</title>"]
    for place, kind, (top, floor) in ((0, "attention", ATTENTION), (2, "ffn", FFN)):
        there = sum(parent[layer][place] for layer in layers)
        left = sum(stands[place] for stands in each["stands"])
        if not there:
            continue
        share = min(1.0, left / there)
        fill = kind if len(layers) == 1 else "fused"
        outline = "whole" if left else "gone"
        parts.append(_box(outline, x, floor, width, floor - top))
        if share:
            parts.append(_box(fill, x, floor, width, share * (floor - top)))
        if place == 0 and left:
            kv = sum(stands[1] for stands in each["stands"]) / max(1, sum(parent[layer][1] for layer in layers))
            if kv < share - 1e-9:
                at = floor - kv * (floor - top)
                parts.append(f'<path class="kv" d="M{x:.1f} {at:.1f}h{width:.1f}"/>')
    if is_number(each["kl"]) and each["kl"] > 0:
        y = scale.at(each["kl"])
        parts.append(_box("cost", x + width * 0.2, SCORE[1], width * 0.6, SCORE[1] - y))
    return [*parts, "</g>"]


def _box(kind: str, x: float, floor: float, width: float, height: float) -> str:
    size = f'x="{x:.1f}" y="{floor - height:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" {size} rx="2"/>'
