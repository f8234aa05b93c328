"""A chart as inline SVG: lines over steps, axes with round ticks, a legend, marks at chosen steps.

The SVG holds what is stretched to the width there is (lines, grid; strokes keep their width), and the labels are HTML
over it: so letters have the same size on a phone and on a wide screen. Colours come from the page's style. Each line
carries its exact values for the page's script, which shows them under the pointer.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.distribution import round_step
from engine.report.html import text
from engine.report.numbers import number, tick
from engine.report.series import Point, Series, thinned

SIDE = 1000
"""Of the square in which a chart is drawn."""

NOISY = 4.0
"""Ups and downs of a curve, as a multiple of its range, from which on its trend is drawn over it."""

FLAT_LOG = 30.0
"""Highest through median value from which on a chart that may be logarithmic is."""


@dataclass(frozen=True)
class Chart:
    """
    Attributes:
        meaning: a sentence below the plot.
        series: those without points are left out.
        from_zero: the axis of values begins at 0.
        may_be_log: powers of ten on the axis where few values tower over the rest.
        marks: (step, class, words): vertical lines, `resumed` over the height, `skipped` at the foot.
        steps: first and last step of the axis; None: those of the series.
        values: lowest and highest value, to share an axis; None: those of the series.
    """

    title: str
    series: Sequence[Series]
    unit: str = ""
    meaning: str = ""
    from_zero: bool = False
    may_be_log: bool = False
    marks: Sequence[tuple[float, str, str]] = ()
    steps: tuple[float, float] | None = None
    values: tuple[float, float] | None = None
    small: bool = False

    def html(self) -> str:
        """A figure; "" if there is no point to draw."""
        shown = [series for series in self.series if series.points]
        if not shown:
            return ""
        kind = "chart small" if self.small else "chart"
        meaning = f'<p class="meaning">{text(self.meaning)}</p>' if self.meaning else ""
        head = f'<h4>{text(self.title)}</h4><span class="now">{self._now(shown)}</span>'
        return (
            f'<figure class="{kind}"><figcaption>{head}</figcaption>{self._legend(shown)}'
            f"{_Plot(self, shown).html()}{meaning}</figure>"
        )

    def _now(self, shown: list[Series]) -> str:
        """The last value with its unit; of several lines, which have no such one, the unit."""
        if max(Counter(series.dots for series in shown).values()) == 1:
            return number(shown[0].last, self.unit)
        return "" if self.unit == "share" else text(self.unit)  # the ticks have a %

    def _legend(self, shown: list[Series]) -> str:
        if len(shown) < 2 or self.small:
            return ""
        entries = (
            f'<span class="key c{series.colour}{" dotted" if series.dots else ""}">{text(series.label)}</span>'
            for series in shown
        )
        return f'<p class="legend">{" ".join(entries)}</p>'

    def described(self, shown: list[Series]) -> str:
        """The chart in words, for who cannot see it."""
        parts = []
        for series in shown:
            first, low, high = series.points[0], min(series.values), max(series.values)
            parts.append(
                f"{series.label}: {number(first[1], self.unit)} at step {first[0]:,.0f}, "
                f"{number(series.last, self.unit)} "
                f"at step {series.points[-1][0]:,.0f}, "
                f"lowest {number(low, self.unit)}, highest {number(high, self.unit)}"
            )
        return f"{self.title}. " + "; ".join(parts)


class _Plot:
    """The picture: a chart's steps and values laid on the square."""

    def __init__(self, chart: Chart, shown: list[Series]):
        self.chart, self.shown = chart, shown
        steps = [point[0] for series in shown for point in (series.points[0], series.points[-1])]
        self.left, self.right = chart.steps or (min(steps), max(steps))
        if self.right <= self.left:
            self.right = self.left + 1
        values = [value for series in shown for value in series.values]
        low, high = chart.values or (min(values), max(values))
        self.log = chart.may_be_log and low > 0 and high > FLAT_LOG * sorted(values)[len(values) // 2]
        if self.log:
            self.ticks, self.step = _powers(low, high), 0.0
        else:
            low, high = (min(low, 0.0), max(high, 0.0)) if chart.from_zero else (low, high)
            self.step = _value_step(low, high, 3 if chart.small else 4)
            self.ticks = _multiples(low, high, self.step)
        self.low, self.high = self._scaled(self.ticks[0]), self._scaled(self.ticks[-1])

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, step: float) -> int:
        return round(SIDE * (step - self.left) / (self.right - self.left))

    def y(self, value: float) -> int:
        return round(SIDE * (self.high - self._scaled(value)) / (self.high - self.low))

    def html(self) -> str:
        grid = "".join(f"M0 {self.y(value)}H{SIDE}" for value in self.ticks)
        lines = "".join(self._line(series) for series in self.shown)
        label = text(self.chart.described(self.shown))
        return (
            f'<div class="plot" tabindex="0" role="img" aria-label="{label}" data-steps="{self.left:g} {self.right:g}">'
            f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">'
            f'<path class="grid" d="{grid}"/>{self._marks()}{lines}</svg>{self._labels()}</div>'
        )

    def _line(self, series: Series) -> str:
        points = thinned(series.points)
        told = " ".join(f"{step:g}:{value:.6g}" for step, value in points)
        about = f'data-label="{text(series.label)}" data-unit="{text(self.chart.unit)}" data-points="{told}"'
        line, colour = self._path(points), f"c{series.colour}"
        if series.dots or len(points) == 1:
            dots = "".join(f"M{self.x(step)} {self.y(value)}h0" for step, value in points)
            return f'<path class="line thin {colour}" d="{line}"/><path class="dot {colour}" {about} d="{dots}"/>'
        trend = self._trend(series)
        kind = "faint" if trend else "line"
        return f'<path class="{kind} {colour}" {about} d="{line}"/>{trend}'

    def _path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(step)} {self.y(value)}" for step, value in points)

    def _trend(self, series: Series) -> str:
        """Running means of a curve that goes up and down a lot."""
        values = series.values
        if len(values) < 60:
            return ""
        ups_and_downs = sum(abs(b - a) for a, b in zip(values, values[1:], strict=False))
        if ups_and_downs < NOISY * (max(values) - min(values)):
            return ""
        return f'<path class="line c{series.colour}" d="{self._path(running_means(series.points))}"/>'

    def _marks(self) -> str:
        drawn = []
        for step, kind, words in self.chart.marks:
            if self.left <= step <= self.right:
                top = 0 if kind == "resumed" else SIDE - 90
                drawn.append(
                    f'<path class="{kind}" d="M{self.x(step)} {top}V{SIDE}"><title>{text(words)}</title></path>'
                )
        return "".join(drawn)

    def _labels(self) -> str:
        unit = self.chart.unit
        labels = [(value, tick(value, self.step or value, unit)) for value in self.ticks]
        parts = [f'<span class="y" style="top:{self.y(value) / SIDE:.1%}">{label}</span>' for value, label in labels]
        for at, step in self._step_ticks():
            parts.append(f'<span class="x" style="left:{self.x(at) / SIDE:.1%}">{tick(at, step)}</span>')
        return "".join(parts)

    def _step_ticks(self) -> list[tuple[float, float]]:
        """(place, distance of places) of two ticks at least, where there are two steps."""
        for parts in (2, 3, 4) if self.chart.small else (4,):
            step = max(1.0, round_step((self.right - self.left) / parts))
            first, last = math.ceil(self.left / step - 1e-9), math.floor(self.right / step + 1e-9)
            if last > first:
                break
        return [(n * step, step) for n in range(first, last + 1)]


def running_means(points: Sequence[Point], places: int = 100) -> tuple[Point, ...]:
    """Means over a thirtieth of the points, around `places` of them."""
    half = max(1, len(points) // 60)
    found = []
    for place in sorted({i * (len(points) - 1) // (places - 1) for i in range(places)}):
        near = points[max(0, place - half) : place + half + 1]
        found.append((points[place][0], sum(value for _, value in near) / len(near)))
    return tuple(found)


def _value_step(low: float, high: float, parts: int) -> float:
    span = high - low
    if span <= 0 or span < 1e-9 * max(abs(low), abs(high)):
        span = abs(high) or 1.0
    return round_step(span / parts)


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 4)
    return [10.0**n for n in range(first, last + every, every)]
