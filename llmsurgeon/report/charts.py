"""What an HTML report is drawn with: scales, heat maps and labels as inline SVG, numbers as words.

Colours are CSS classes of templates/style.css.j2, so that the reader's light or dark theme decides them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup, escape

from llmsurgeon.model.layers import write_ranges

# Colours of a heat map, from class c0 on.
LEVELS = 48
# A range wider than this factor is drawn on a log scale.
WIDE = 20

Number = float | None
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Scale:
    """Maps values to px, linearly, by logarithm or by square root; what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]
    root: bool = False

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

    @classmethod
    def narrow(cls, low: float, high: float, start: float, end: float) -> Scale:
        """From `low` to `high`, for what has no use for a zero, such as a speedup; a little more than both."""
        ticks = _linear_ticks(low, high, wanted=7)
        return cls(ticks[0], ticks[-1], start, end, False, ticks)

    @classmethod
    def rooted(cls, high: float, start: float, end: float) -> Scale:
        """From zero, by square root: what is small is told apart beside what is large."""
        ticks = [0.0, *(m * 10.0**k for k in range(-6, 7) for m in (1, 2, 5))]
        above = next((tick for tick in ticks if tick >= high), high)
        kept = [tick for tick in ticks if tick <= above and (tick == 0 or tick > above / 100)]
        return cls(0.0, above, start, end, False, tuple(float(f"{tick:.6g}") for tick in kept), root=True)

    def at(self, value: float) -> float:
        """Where `value` lies."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        elif self.root:
            low, high, value = math.sqrt(low), math.sqrt(high), math.sqrt(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @property
    def from_zero(self) -> bool:
        """Whether a bar's length is its value."""
        return not self.log and self.low <= 0 <= self.high

    @property
    def kind(self) -> str:
        """What a reader should know about the axis; nothing where it begins at zero."""
        if self.root:
            return "square-root scale"
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


@dataclass(frozen=True)
class Axes:
    """What the rows and columns of a heat map are, the number of the first row, and the px that it may take."""

    rows: str
    columns: str
    first_row: int = 0
    room: int = 520


def heat_map(
    cells: Iterable[tuple[int, int, Number, str]],
    layers: int,
    axes: Axes,
    title: str,
    outlined: Sequence[Sequence[int]] = (),
) -> Markup:
    """A heat map of (row, column, value, tooltip) with its legend.

    Colours run from 0 to the maximum, or to the 90th percentile where the rest stand far above it: what the first
    layers do to all others would otherwise hide every difference among the low values, which are the ones that matter.
    """
    cells = list(cells)
    known = sorted(value for _, _, value, _ in cells if is_number(value))
    top = known[-1] if known else 1.0
    if known and (usual := known[int(len(known) * 0.9)]) * 1.5 < top:
        top = usual or top
    size = max(3, min(40, axes.room // layers))
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
    marks = [k for k in range(layers) if (k + axes.first_row) % step == 0 or (axes.first_row and k == 0)]
    parts += [label(left - 6, head + k * size + centre + 4, k + axes.first_row, "end") for k in marks]
    turned = f'transform="translate(2 {head + 2}) rotate(90)"'
    parts.append(f'<text x="{left}" y="11">{axes.columns} →</text><text {turned}>{axes.rows} →</text>')
    width, height = max(left + layers * size + 2, 220), max(head + layers * size + 2, 110)
    return svg(width, height, title, parts) + _legend(top, clipped=bool(known) and top < known[-1])


def _legend(top: float, clipped: bool) -> Markup:
    bar = [f'<rect class="c{k}" x="{40 + k * 4}" y="0" width="4.5" height="10"/>' for k in range(LEVELS)]
    for share in (0, 0.5, 1):
        sign = "≥ " if clipped and share == 1 else ""
        bar.append(label(40 + share * LEVELS * 4, 24, f"{sign}{top * share:.2g}", "mid"))
    return svg(290, 28, "colour scale", bar)


def shade(value: float, top: float) -> int:
    """Which colour of a heat map stands for `value`: 0 to LEVELS - 1."""
    return min(LEVELS - 1, max(0, int(value / top * LEVELS))) if top > 0 else 0


def svg(width: float, height: float, alternative: str, parts: Iterable[str]) -> Markup:
    """A drawing of that size in px, of `parts` that are SVG; `alternative` is read out where it cannot be seen."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return Markup(f'<svg role="img" aria-label="{escape(alternative)}" {size}>{"".join(parts)}</svg>')


def label(x: float, y: float, text: object, kind: str) -> str:
    """A text of an SVG at (x, y); `kind` is its CSS class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


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


def ramp_css() -> Markup:
    """Classes c0 to c47: pale yellow to deep blue on light paper, deep blue to pale yellow on dark."""
    light, dark = [], []
    for k in range(LEVELS):
        t = k / (LEVELS - 1)
        bulge = math.sin(math.pi * t)
        # The chroma stays inside sRGB all along: clipping would make the steps uneven.
        light.append(f".c{k}{{fill:{_oklch_hex(0.965 - 0.665 * t, 0.04 + 0.042 * bulge + 0.02 * t, 100 + 165 * t)}}}")
        dark.append(f".c{k}{{fill:{_oklch_hex(0.27 + 0.65 * t, 0.045 + 0.025 * bulge + 0.04 * t, 265 - 165 * t)}}}")
    return Markup("".join(light) + "@media screen and (prefers-color-scheme:dark){" + "".join(dark) + "}")
