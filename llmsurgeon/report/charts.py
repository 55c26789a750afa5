"""What an HTML report is drawn with: scales, heat maps and labels as inline SVG, numbers as words, one style sheet.

Colours are CSS classes, so that the reader's light or dark theme decides them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

from llmsurgeon.model.layers import write_ranges

# Colours of a heat map, from class c0 on.
LEVELS = 48
# A range wider than this factor is drawn on a log scale.
WIDE = 20

Number = float | None
DASH = "\N{EN DASH}"


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


def heat_map(
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
    known = sorted(value for _, _, value, _ in cells if is_number(value))
    top = known[-1] if known else 1.0
    if known and (usual := known[int(len(known) * 0.9)]) * 1.5 < top:
        top = usual or top
    size = max(3, min(40, room // layers))
    gap = 1 if size > 7 else 0
    left, head = 40, 34
    parts = []
    for row, column, value, tip in cells:
        x, y, side = left + column * size, head + row * size, size - gap
        level = f"c{shade(value, top)}" if is_number(value) else "none"
        shown = f"{value:.4g}" if is_number(value) else "not measured"
        parts.append(f'<path class="{level}" d="M{x} {y}h{side}v{side}h-{side}z"><title>{tip}: {shown}</title></path>')
    for run in outlined:
        x, y, side = left + run[0] * size, head + run[0] * size, len(run) * size - gap
        outline = f"M{x} {y}h{side}v{side}h-{side}z"
        parts.append(f'<path class="outline" d="{outline}"><title>run {layer_range(run[0], run[-1])}</title></path>')
    step = label_step(layers, size, 22)
    centre = (size - gap) / 2
    parts += [label(left + k * size + centre, head - 6, k, "mid") for k in range(0, layers, step)]
    marks = [k for k in range(layers) if (k + first_row) % step == 0 or (first_row and k == 0)]
    parts += [label(left - 6, head + k * size + centre + 4, k + first_row, "end") for k in marks]
    turned = f'transform="translate(2 {head + 2}) rotate(90)"'
    parts.append(f'<text x="{left}" y="11">{names[1]} →</text><text {turned}>{names[0]} →</text>')
    width, height = max(left + layers * size + 2, 220), max(head + layers * size + 2, 110)
    return svg(width, height, title, parts) + _legend(top, clipped=bool(known) and top < known[-1])


def _legend(top: float, clipped: bool) -> str:
    bar = [f'<rect class="c{k}" x="{40 + k * 4}" y="0" width="4.5" height="10"/>' for k in range(LEVELS)]
    for share in (0, 0.5, 1):
        sign = "≥ " if clipped and share == 1 else ""
        bar.append(label(40 + share * LEVELS * 4, 24, f"{sign}{top * share:.2g}", "mid"))
    return svg(290, 28, "colour scale", bar)


def shade(value: float, top: float) -> int:
    """Which colour of a heat map stands for `value`: 0 to LEVELS - 1."""
    return min(LEVELS - 1, max(0, int(value / top * LEVELS))) if top > 0 else 0


def svg(width: float, height: float, alternative: str, parts: Iterable[str]) -> str:
    """A drawing of that size in px; `alternative` is read out where it cannot be seen."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg role="img" aria-label="{escape(alternative)}" {size}>{"".join(parts)}</svg>'


def label(x: float, y: float, text: object, kind: str) -> str:
    """A text of an SVG at (x, y); `kind` is its CSS class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def figure(title: str, caption: str, content: str) -> str:
    """A drawing under its title and caption."""
    return (
        f'<figure><figcaption><b>{title}</b> {escape(caption)}</figcaption><div class="scroll">{content}</div></figure>'
    )


def label_step(count: int, slot: float, wanted: float) -> int:
    """Label every how many, so that labels are `wanted` px apart."""
    return next((step for step in (1, 2, 5, 10, 20, 50) if step * slot >= wanted or step >= count), 100)


# Words and numbers.


def is_number(value: Number) -> TypeGuard[float]:
    """False for what was not measured."""
    return value is not None and math.isfinite(value)


def fixed(value: Number, digits: int) -> str:
    """The value with so many digits behind the point, a dash where there is none."""
    return f"{value:.{digits}f}" if is_number(value) else DASH


def layer_range(first: int, last: int) -> str:
    """4-9."""
    return f"{first}{DASH}{last}"


def named(noun: str, count: int, names: str) -> str:
    """run 4-9, 2 runs (4-9, 12-13)."""
    return f"{noun} {names}" if count == 1 else f"{count} {noun}s ({names})"


def ranges(layers: Sequence[int]) -> str:
    """4, 7, 8, 9 -> 4, 7-9."""
    return write_ranges(layers, DASH)


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


def ramp_css() -> str:
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
