"""report.html of a search: the curve of quality against the target, what was chosen where and why, and what it met.

One page with nothing to fetch and no script to run; it shows `Found.plain()` and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsurgeon.report.abouts import Words, words_of
from llmsurgeon.report.charts import DASH, fixed, is_number, layer_range
from llmsurgeon.report.chosen import strip_of
from llmsurgeon.report.pages import html_page
from llmsurgeon.report.scatter import Dot, Frame, scatter

Plain = Mapping[str, Any]
SPEEDS = ("decode", "prefill")
UNNAMED = ("measured", "made")


@dataclass(frozen=True)
class TargetWords:
    """How a target's ratio is called: on an axis, of the model that was made, of a share that is saved; its title."""

    title: str
    axis: str
    made: str
    saved: str


WORDS = {
    "decode": TargetWords(
        "Decode speed", "decode speed, of the parent's", "times as fast at decoding", "of a decode step's time"
    ),
    "prefill": TargetWords(
        "Prefill speed", "prefill speed, of the parent's", "times as fast at reading", "of a prompt's time"
    ),
    "params": TargetWords("Parameters", "parameters, of the parent's", "of the parameters", "of the parameters"),
    "flops": TargetWords(
        "Multiplications",
        "multiplications a token, of the parent's",
        "of the multiplications",
        "of the multiplications",
    ),
    "size": TargetWords("Size", "bytes of the weights, of the parent's", "of the bytes", "of the bytes of the weights"),
    "memory": TargetWords("Memory", "bytes of weights and KV cache, of the parent's", "of the memory", "of the memory"),
    "kv": TargetWords("KV cache", "bytes of the KV cache, of the parent's", "of the KV cache", "of the KV cache"),
}
KINDS = {
    "chosen": "the recipe's",
    "made": "made and measured",
    "measured": "measured before it is made",
    "single": "one method alone",
    "quantised": "the parent, quantised",
    "parent": "the parent",
}


def html_found(found: Plain, recipe: str) -> str:
    """The page for `Found.plain()` and the recipe that came of it. Null values are a dash; all text is escaped."""
    words = words_of(found)
    first = found["bounds"][0]["name"] if found["bounds"] else "params"
    chosen = next((point for point in found["points"] if point.get("chosen")), None)
    return html_page(
        "search.html.j2",
        name=found["model"],
        facts=_facts(found),
        words=words,
        lead=_lead(found, chosen, words),
        curve=_curve(found["points"], first, words),
        kinds=[(kind, text) for kind, text in KINDS.items() if kind in _kinds(found["points"])],
        strip=strip_of(found["layers"], found["parent"], words.short),
        rows=_rows(found),
        table=_table(found.get("table")),
        bounds=[_bound(bound) for bound in found["bounds"]],
        sums=_sums(found["points"], words),
        singles=_singles(found["points"], first, chosen),
        alone=_short_alone(found),
        axis=WORDS[first].axis,
        timings=[(phase, _duration(seconds)) for phase, seconds in found["timings"].items()],
        notes=found["notes"],
        recipe=recipe,
        dash=DASH,
    )


def _facts(found: Plain) -> dict[str, str]:
    return {
        "Targets": ", ".join(bound["target"] for bound in found["bounds"]),
        "Engine": found["engine"],
        "Text": found["text"],
        "Tokens": f"{found['tokens']:,} in sequences of {found['sequence_length']:,}",
        "Operations": ", ".join(found["operations"]),
    }


def _lead(found: Plain, chosen: Plain | None, words: Words) -> dict[str, Any]:
    """The result in one sentence, and its figures."""
    figures = []
    for bound in found["bounds"]:
        verdict = "met" if _met(bound) else f"missed by {100 * (_cost(bound) / bound['budget'] - 1):.1f} %"
        figures.append((WORDS[bound["name"]].title, f"{bound['ratio']:.3g} x", f"{bound['target']} {verdict}"))
    if chosen:
        figures.append((f"{words.short} to the parent", fixed(chosen["kl"], 3), words.unit))
        if is_number(chosen.get("pooled")):
            figures.append(("Cosine of pooled states", fixed(chosen["pooled"], 4), "to the parent's, held-out text"))
        if is_number(chosen.get("perplexity")):
            figures.append(("Perplexity", f"{chosen['perplexity']:.3f} x", "the parent's, held-out text"))
    said = " and ".join(f"{bound['ratio']:.3g} {WORDS[bound['name']].made}" for bound in found["bounds"])
    changed = sum(len(each["layers"]) for each in found["layers"] if not _whole(each, found["parent"]))
    table = found.get("table")
    fewer = (
        f" {table['rows']:,} of {table['parent']:,} tokens stay." if table and table["rows"] < table["parent"] else ""
    )
    return {
        "figures": figures,
        "said": said[:1].upper() + said[1:],
        "changed": changed,
        "layers": len(found["parent"]),
        "fewer": fewer,
    }


def _cost(bound: Plain) -> float:
    measured = bound["measured"]
    return float(measured if is_number(measured) else bound["predicted"])


def _met(bound: Plain) -> bool:
    return _cost(bound) <= 1.03 * float(bound["budget"])


def _kinds(points: Sequence[Plain]) -> set[str]:
    return {_kind(point) for point in points}


def _kind(point: Plain) -> str:
    return "chosen" if point.get("chosen") else str(point["kind"])


def _curve(points: Sequence[Plain], target: str, words: Words) -> Any:
    """Every model that was measured, by the first target's ratio and by its distance to the parent."""
    known = [point for point in points if is_number(point["ratios"].get(target)) and is_number(point["kl"])]
    # What matters is drawn last.
    order = list(KINDS)[::-1]
    known.sort(key=lambda point: order.index(_kind(point)))
    dots = [
        Dot(
            x=point["ratios"][target],
            y=point["kl"],
            kind=_kind(point),
            tip=f"{point['name']}: {point['ratios'][target]:.3g} x, {words.short} {point['kl']:.4g}",
            name="searched" if _kind(point) == "chosen" else "" if _kind(point) in UNNAMED else str(point["name"]),
            low=point["low"],
            high=point["high"],
            left=(point.get("ratio_low") or {}).get(target),
            right=(point.get("ratio_high") or {}).get(target),
        )
        for point in known
    ]
    if not dots:
        return None
    searched = [(dot.x, dot.y) for dot in dots if dot.kind in ("chosen", "made", "measured")]
    axis = f"{words.short} to the parent, {words.unit}"
    frame = Frame(WORDS[target].axis, axis, downhill=target not in SPEEDS, root=True)
    return scatter(dots, frame, "quality against the target", _front(searched, target in SPEEDS))


def _front(points: Sequence[tuple[float, float]], more: bool) -> list[tuple[float, float]]:
    """The points that none beats in both, from the cheapest cut on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0] if more else point[0], point[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _whole(each: Plain, parent: Sequence[Sequence[int]]) -> bool:
    return [list(stands) for stands in each["stands"]] == [list(parent[layer]) for layer in each["layers"]]


def _rows(found: Plain) -> list[dict[str, Any]]:
    """Layers where something was done: what, what it costs alone, and what else might have been."""
    rows = []
    for each in found["layers"]:
        if _whole(each, found["parent"]):
            continue
        layers = each["layers"]
        rows.append(
            {
                "layers": f"{layers[0]}" if len(layers) == 1 else layer_range(layers[0], layers[-1]),
                "name": each["name"],
                "kl": fixed(each["kl"], 4),
                "costs": [f"{100 * share:.0f} %" for share in each["costs"].values()],
                "others": [(name, fixed(kl, 4)) for name, kl in each["others"]],
            }
        )
    return rows


def _short_alone(found: Plain) -> list[str]:
    """The operations that do not reach the targets by themselves."""
    single = {point["name"] for point in found["points"] if point["kind"] == "single"}
    known = single and single <= set(found["operations"])
    return [op for op in found["operations"] if op not in single] if known else []


def _table(table: Plain | None) -> dict[str, Any] | None:
    """How many rows the table of tokens has left, and what that saves and costs."""
    if table is None:
        return None
    return {
        "rows": f"{table['rows']:,} of {table['parent']:,}",
        "kl": fixed(table["kl"], 4),
        "saved": [
            (WORDS[name].saved, f"{100 * share:.0f} %") for name, share in table["costs"].items() if share >= 0.005
        ],
        "others": [(name, fixed(kl, 4)) for name, kl in table["others"]],
        "whole": table["rows"] == table["parent"],
    }


def _bound(bound: Plain) -> dict[str, str]:
    predicted, measured = bound["predicted"], bound["measured"]
    of_parent = {key: 100 * value / bound["parent"] for key, value in bound.items() if key in ("budget", "predicted")}
    shown = 100 * measured / bound["parent"] if is_number(measured) else None
    return {
        "target": bound["target"],
        "budget": f"{of_parent['budget']:.1f} %",
        "predicted": f"{of_parent['predicted']:.1f} %",
        "measured": f"{shown:.1f} %" if is_number(shown) else DASH,
        "off": f"{100 * (predicted / measured - 1):+.1f} %" if is_number(measured) else DASH,
        "ratio": f"{bound['ratio']:.3g} x",
    }


def _sums(points: Sequence[Plain], words: Words) -> Any:
    """The distance of whole models against the sum of their options' single scores."""
    dots = [
        Dot(
            point["predicted"],
            point["kl"],
            _kind(point),
            f"{point['name']}: sum {point['predicted']:.4g}, measured {point['kl']:.4g}",
            low=point["low"],
            high=point["high"],
        )
        for point in points
        if is_number(point.get("predicted")) and is_number(point["kl"])
    ]
    if not dots:
        return None
    most = max(max(dot.x for dot in dots), max(dot.y for dot in dots))
    least = min(min(dot.x for dot in dots), min(dot.y for dot in dots))
    frame = Frame("sum of single scores", f"{words.short} of the whole model", width=564, height=360, even=True)
    return scatter(dots, frame, f"joint {words.short} against the sum of scores", [(least, least), (most, most)])


def _singles(points: Sequence[Plain], target: str, chosen: Plain | None) -> list[dict[str, Any]]:
    shown = [point for point in points if _kind(point) in ("chosen", "single", "quantised")]
    shown.sort(key=lambda point: point["kl"] if is_number(point["kl"]) else float("inf"))
    if len(shown) < 2:
        return []
    return [
        {
            "name": "searched" if point is chosen else point["name"],
            "chosen": point is chosen,
            "ratio": fixed(point["ratios"].get(target), 2),
            "kl": fixed(point["kl"], 3),
            "perplexity": fixed(point.get("perplexity"), 3),
        }
        for point in shown
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
