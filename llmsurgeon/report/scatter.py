"""A plot of points with intervals: quality against speed, what was predicted against what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from llmsurgeon.report.charts import Number, Scale, is_number, label, svg

LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
LINE = 15  # px between two names, one above the other
LETTER = 6.3  # px of one in a name, about


@dataclass(frozen=True)
class Dot:
    """One point. kind: its CSS class; name: written beside it, nothing where empty; tip: shown when it is pointed at.

    low, high: the interval of y; left, right: that of x.
    """

    x: float
    y: float
    kind: str
    tip: str
    name: str = ""
    low: Number = None
    high: Number = None
    left: Number = None
    right: Number = None


@dataclass(frozen=True)
class Frame:
    """What the axes are called, and the size of the drawing in px.

    downhill: the x axis runs from high to low. root: the y axis, of values from zero on, by square root; even: in even
    steps, however far apart values are.
    """

    across: str
    up: str
    width: int = 1160
    height: int = 440
    downhill: bool = False
    root: bool = False
    even: bool = False


def scatter(dots: Sequence[Dot], frame: Frame, title: str, line: Sequence[tuple[float, float]] = ()) -> Markup:
    """The points over their axes, `line` joined up behind them, each name where it covers no other."""
    across, up = _scales(dots, frame)
    parts = [*_axes(across, up, frame)]
    if len(line) > 1:
        path = "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in line)
        parts.append(f'<path class="front" d="M{path}"/>')
    for dot in dots:
        parts.append(_drawn(dot, across, up))
    parts += _names(dots, across, up, frame)
    return svg(frame.width, frame.height, title, parts)


def _scales(dots: Sequence[Dot], frame: Frame) -> tuple[Scale, Scale]:
    xs = [dot.x for dot in dots]
    ends = [LEFT, frame.width - RIGHT]
    if frame.downhill:
        ends.reverse()
    across = Scale.narrow(min(xs, default=0.0), max(xs, default=1.0), *ends)
    bounds = [bound for dot in dots for bound in (dot.low, dot.high) if is_number(bound)]
    ys, floor = [dot.y for dot in dots], frame.height - BOTTOM
    if frame.root and ys and min(ys) >= 0:
        return across, Scale.rooted(max(*ys, *bounds, 1e-6), floor, TOP)
    if frame.even and ys:
        return across, Scale.narrow(min(*ys, *bounds), max(*ys, *bounds), floor, TOP)
    return across, Scale.over(ys, floor, TOP, bounds)


def _axes(across: Scale, up: Scale, frame: Frame) -> list[str]:
    floor = frame.height - BOTTOM
    parts = []
    for tick in up.ticks:
        at = up.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{frame.width - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{at + 4:.1f}">{tick:g}</text>')
    for tick in across.ticks:
        at = across.at(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{floor}"/>')
        parts.append(f'<text class="mid" x="{at:.1f}" y="{floor + 17}">{tick:g}</text>')
    note = f", {up.kind}" if up.kind else ""
    parts.append(label((LEFT + frame.width - RIGHT) / 2, floor + 37, escape(frame.across), "mid"))
    turned = f'transform="translate(13 {(TOP + floor) / 2:.0f}) rotate(-90)"'
    parts.append(f'<text class="mid" {turned}>{escape(frame.up + note)}</text>')
    return parts


def _drawn(dot: Dot, across: Scale, up: Scale) -> str:
    x, y = across.at(dot.x), up.at(dot.y)
    parts = []
    if is_number(dot.low) and is_number(dot.high):
        parts.append(f'<path class="span" d="M{x:.1f} {up.at(dot.low):.1f}V{up.at(dot.high):.1f}"/>')
    if is_number(dot.left) and is_number(dot.right):
        parts.append(f'<path class="span" d="M{across.at(dot.left):.1f} {y:.1f}H{across.at(dot.right):.1f}"/>')
    radius = 3.2 if dot.kind == "measured" else 6.5 if dot.kind == "chosen" else 4.6
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')
    return f'<g class="dot-{dot.kind}"><title>{escape(dot.tip)}</title>{"".join(parts)}</g>'


def _names(dots: Sequence[Dot], across: Scale, up: Scale, frame: Frame) -> list[str]:
    """Names to the right of their points, or to the left near the edge; moved up or down where one is already."""
    taken = [(across.at(dot.x) - 7, across.at(dot.x) + 7, up.at(dot.y)) for dot in dots]
    spans = [(dot.left, dot.right, dot.y) for dot in dots if is_number(dot.left) and is_number(dot.right)]
    taken += [(*sorted((across.at(left), across.at(right))), up.at(y)) for left, right, y in spans]  # type: ignore[misc]
    parts = []
    for dot in sorted((dot for dot in dots if dot.name), key=lambda dot: up.at(dot.y)):
        x, y = across.at(dot.x), up.at(dot.y)
        size = LETTER * len(dot.name)
        leftward = x + 12 + size > frame.width - RIGHT
        start = x - 12 - size if leftward else x + 12
        at = next(
            y + shift
            for shift in sorted((LINE * k for k in range(-30, 31)), key=abs)
            if _free(start, start + size, y + shift, taken, frame) or abs(shift) == 30 * LINE
        )
        taken.append((start, start + size, at))
        if abs(at - y) > 1:
            parts.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{x - 10 if leftward else x + 10:.1f} {at:.1f}"/>')
        anchor = "end" if leftward else "start"
        parts.append(
            f'<text class="name-{dot.kind} {anchor}" x="{x - 12 if leftward else x + 12:.1f}" y="{at + 4:.1f}">'
            f"{escape(dot.name)}</text>"
        )
    return parts


def _free(start: float, end: float, at: float, taken: Sequence[tuple[float, float, float]], frame: Frame) -> bool:
    if not TOP <= at <= frame.height - BOTTOM:
        return False
    return not any(abs(at - y) < LINE - 1 and start < right and left < end for left, right, y in taken)
