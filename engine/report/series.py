"""A curve: steps and values, and the few hundred points of it that a picture shows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

MOST_POINTS = 400
"""Of a curve as it is drawn; more than a picture has columns, so that none is missed."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """
    Attributes:
        label: in the legend.
        points: (step, value), by step; only values that are numbers.
        dots: the points are few and each is meant to be seen, as evaluations.
        colour: number of the colour in the page's palette, from 0.
    """

    label: str
    points: tuple[Point, ...]
    dots: bool = False
    colour: int = 0

    @property
    def last(self) -> float:
        return self.points[-1][1]

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points]


def thinned(points: Iterable[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """At most `most` of the points: the first, the last, and of equal stretches between the lowest and the highest.

    So a spike of a single step is seen in a run of any length.
    """
    points = tuple(points)
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for i in range(stretches):
        stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return (*kept, points[-1])


def cleaned(steps: Iterable[float], values: Iterable[float]) -> tuple[Point, ...]:
    """Points by step: what is no number is left out, and of a step that is there twice the later counts."""
    found = {step: value for step, value in zip(steps, values, strict=True) if math.isfinite(value)}
    return tuple(sorted(found.items()))
