"""Line charts as SVG: curves over training steps, several runs in one, for pages and by themselves.

Charts have no scripts. Resting the pointer on a chart shows the values of the nearest step. Colours are told apart on
white and on black paper, and curves also by their dashes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nestseg.core.taxonomy import Colour
from nestseg.report.html import Html, escape, join

COLOURS: tuple[Colour, ...] = (
    (46, 124, 196),
    (200, 96, 26),
    (46, 145, 88),
    (178, 84, 154),
    (140, 118, 20),
    (126, 102, 208),
    (200, 72, 78),
    (32, 140, 152),
)
"""Of the curves in their order; contrast at least 3 on both papers of a page."""

DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""Of the curves in their order; the next ones come when the colours begin again."""

_WIDTH, _HEIGHT = 400, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 28, 26
_MOST_POINTS = 400
_MOST_HOVERS = 120
_MOST_READ = 3


class Curve(NamedTuple):
    """Values over steps."""

    name: str
    steps: Sequence[int]
    """Ascending."""
    values: Sequence[float | None]
    """One a step; None is a gap."""


class Unit(NamedTuple):
    """How values are written."""

    factor: float = 1.0
    """A value times this is shown."""
    suffix: str = ""

    def show(self, value: float) -> str:
        """Write a value with the digits that matter.

        Example:
            >>> Unit(100, " %").show(0.4567), Unit().show(0.00012345), Unit().show(12345.6)
            ('45.67 %', '0.000123', '12,346')
        """
        shown = value * self.factor
        if shown and abs(shown) < 0.1:
            return f"{shown:.3g}{self.suffix}"
        return f"{shown:,.0f}{self.suffix}" if abs(shown) >= 1000 else f"{shown:.4g}{self.suffix}"


PERCENT = Unit(100, " %")
PLAIN = Unit()


def draw_chart(title: str, curves: Sequence[Curve], *, unit: Unit = PLAIN) -> Html:
    """Draw curves over their steps.

    Args:
        title: What is drawn.
        curves: Any number; their places decide colours and dashes. Those without a value are left out.
        unit: How values are written.

    Returns:
        An ``svg`` element.
    """
    title += f" ({unit.suffix.strip()})" if unit.suffix else ""
    known = [(place, _drop_gaps(curve)) for place, curve in enumerate(curves)]
    known = [(place, curve) for place, curve in known if curve.steps]
    if not known:
        return _frame(title, "no values", Html(f'<text x="{_LEFT}" y="{_HEIGHT / 2}">no values yet</text>'))
    values = [value * unit.factor for _, curve in known for value in curve.values if value is not None]
    y_ticks = choose_ticks(min(values), max(values), most=5)
    x_ticks = choose_ticks(0, max(1, *(curve.steps[-1] for _, curve in known)), most=5)
    low, high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))
    last = x_ticks[-1]

    def x(step: float) -> float:
        return _LEFT + step / last * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value * unit.factor) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    grid = [
        Html(
            f'<line class="chart-grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick / unit.factor):.1f}" '
            f'y2="{y(tick / unit.factor):.1f}"/><text text-anchor="end" x="{_LEFT - 6}" '
            f'y="{y(tick / unit.factor) + 4:.1f}">{escape(_word_tick(tick, y_ticks))}</text>'
        )
        for tick in y_ticks
    ]
    grid += [
        Html(
            f'<text text-anchor="{"end" if tick == x_ticks[-1] else "middle"}" x="{x(tick):.1f}" '
            f'y="{_HEIGHT - 8}">{escape(_word_tick(tick, x_ticks))}</text>'
        )
        for tick in x_ticks
    ]
    lines = [Html(f'<path class="chart-line" {_stroke(place)} d="{_path(curve, x, y)}"/>') for place, curve in known]
    lines += [
        Html(f'<circle r="3" fill="{_paint(place)}" cx="{x(curve.steps[0]):.1f}" cy="{y(curve.values[0] or 0):.1f}"/>')
        for place, curve in known
        if len(curve.steps) == 1  # a path of one point is not drawn
    ]
    summary = "; ".join(
        f"{curve.name} ends at {unit.show(curve.values[-1] or 0)} after step {curve.steps[-1]:,}" for _, curve in known
    )
    return _frame(title, summary, join([*grid, *lines, *_hovers(known, unit, x, y)]))


def draw_legend(names: Iterable[str]) -> Html:
    """Set the names of runs with their lines, in the order of their places."""
    items = join(
        Html(
            '<li><span class="swatch"><svg width="28" height="10" aria-hidden="true" style="flex:none">'
            f'<path fill="none" stroke-width="2.5" {_stroke(place)} d="M0 5H28"/></svg>'
            f"<span>{escape(name)}</span></span></li>"
        )
        for place, name in enumerate(names)
    )
    return Html(f'<ul class="legend">{items}</ul>')


def choose_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Choose round numbers, evenly spaced, inside a range or just outside of it.

    Args:
        low: Smallest value.
        high: Largest value.
        most: How many spaces between them lie inside the range, at most; one at each end may be larger.

    Example:
        >>> choose_ticks(0.12, 0.87, most=5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> choose_ticks(0, 400, most=5)
        [0.0, 100.0, 200.0, 300.0, 400.0]
    """
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-9 * largest, 1e-30):
        # as good as one value
        margin = largest / 10 if largest > 1e-30 else 1.0
        low, high = low - margin, high + margin
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * 0.999)
    # the range is widened to whole steps, so that every curve lies between two lines
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def _drop_gaps(curve: Curve) -> Curve:
    pairs = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None]
    return Curve(curve.name, [step for step, _ in pairs], [value for _, value in pairs])


def _thin(curve: Curve) -> Curve:
    """Average neighbours where there are more points than a chart can show."""
    size = math.ceil(len(curve.steps) / _MOST_POINTS)
    if size == 1:
        return curve
    parts = range(0, len(curve.steps), size)
    values = [value or 0.0 for value in curve.values]
    means = [sum(values[part : part + size]) / len(values[part : part + size]) for part in parts]
    return Curve(curve.name, [curve.steps[min(part + size, len(curve.steps)) - 1] for part in parts], means)


def _path(curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    thin = _thin(curve)
    points = (f"{x(step):.1f} {y(value or 0):.1f}" for step, value in zip(thin.steps, thin.values, strict=True))
    return "M" + "L".join(points)


def _hovers(
    known: Sequence[tuple[int, Curve]], unit: Unit, x: Callable[[float], float], y: Callable[[float], float]
) -> list[Html]:
    """Lay strips over the chart, each of which shows the values of its step while the pointer rests on it."""
    steps = sorted({step for _, curve in known for step in curve.steps})
    steps = steps[:: math.ceil(len(steps) / _MOST_HOVERS)]
    strips = []
    for place, step in enumerate(steps):
        left = x((steps[place - 1] + step) / 2) if place else _LEFT
        right = x((steps[place + 1] + step) / 2) if place + 1 < len(steps) else _WIDTH - _RIGHT
        # a curve that ended before says nothing here
        shown = [
            (number, curve, _nearest(curve, step))
            for number, curve in known
            if curve.steps[0] <= step <= curve.steps[-1]
        ]
        lines = [f"step {step:,}", *(f"{curve.name}: {unit.show(value)}" for _, curve, value in shown)]
        dots = join(
            Html(f'<circle r="3.5" fill="{_paint(number)}" cx="{x(step):.1f}" cy="{y(value):.1f}"/>')
            for number, _, value in shown
        )
        # more than these do not fit beside the title; the tooltip has all
        readout = join(
            Html(f'<tspan dx="6" fill="{_paint(number)}">{escape(unit.show(value))}</tspan>')
            for number, _, value in shown[:_MOST_READ]
        )
        strips.append(
            Html(
                f'<g class="chart-hover"><title>{escape(chr(10).join(lines))}</title>'
                f'<rect x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0.1):.1f}" '
                f'height="{_HEIGHT - _TOP - _BOTTOM}"/><g><path d="M{x(step):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>{dots}'
                f'<text text-anchor="end" x="{_WIDTH - _RIGHT}" y="16">{step:,}{readout}</text></g></g>'
            )
        )
    return strips


def _nearest(curve: Curve, step: int) -> float:
    after = bisect_left(curve.steps, step)
    places = [place for place in (after - 1, after) if 0 <= place < len(curve.steps)]
    return curve.values[min(places, key=lambda place: abs(curve.steps[place] - step))] or 0.0


def _frame(title: str, summary: str, content: Html) -> Html:
    return Html(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{title}: {summary}")}" '
        f'xmlns="http://www.w3.org/2000/svg"><style>{_STYLE}</style>'
        f'<text class="chart-title" x="0" y="16">{escape(title)}</text>{content}</svg>'
    )


def _word_tick(tick: float, ticks: Sequence[float]) -> str:
    """Write a tick with as many decimals as tell it from its neighbours."""
    spacing = ticks[1] - ticks[0]
    if max(abs(ticks[0]), abs(ticks[-1])) >= 10_000:
        decimals = max(0, -math.floor(math.log10(spacing / 1000) + 1e-9))
        return f"{tick / 1000:.{decimals}f}k" if tick else "0"
    decimals = max(0, -math.floor(math.log10(spacing) + 1e-9))
    if not math.isclose(round(spacing, decimals), spacing, rel_tol=1e-6):  # 0.25
        decimals += 1
    return f"{tick:.{decimals}f}" if decimals <= 4 or not tick else f"{tick:.1e}"


def _paint(place: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*COLOURS[place % len(COLOURS)])


def _stroke(place: int) -> str:
    dash = DASHES[place // len(COLOURS) % len(DASHES)]
    return f'stroke="{_paint(place)}"' + (f' stroke-dasharray="{dash}"' if dash else "")


# in every chart, so that each also stands by itself; a page has its own colours
_STYLE = """
.chart { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.chart text { fill: var(--soft, #59636e); font-variant-numeric: tabular-nums; }
.chart .chart-title { fill: var(--ink, #1c2126); font-size: 13px; font-weight: 600; }
.chart-grid { stroke: var(--line, #d8dee4); }
.chart-line { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
.chart-hover rect { fill: transparent; }
.chart-hover > g { visibility: hidden; }
.chart-hover:hover > g { visibility: visible; }
.chart-hover path { stroke: var(--soft, #59636e); stroke-dasharray: 2 2; }
"""
