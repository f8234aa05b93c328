"""Numbers as people read them: few digits, thousands apart, with their unit."""

import math

NOTHING = "–"


def number(value: float | None, unit: str = "") -> str:
    """`12,345 tokens/s`, `3.142 nats`, `42.1 %`, `5e-05`; `–` for what is not known."""
    if value is None:
        return NOTHING
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{_digits(value)} {unit}".rstrip()


def _digits(value: float) -> str:
    size = abs(value)
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}" if size < 1e15 else f"{value:.3g}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.3g}"


def tick(value: float, step: float, unit: str = "") -> str:
    """The label of a tick on an axis whose ticks are `step` apart: `0.25`, `40%`, `12k`, `2e-05`."""
    if unit == "share":
        return f"{tick(100 * value, 100 * step)}%"
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and step >= size / 100:
            return f"{value / size:.{_decimals(step / size)}f}{letter}"
    if step < 1e-3:
        return f"{value:.{max(0, _decimals(step) + math.floor(math.log10(abs(value))))}e}"
    return f"{value:.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    """Digits behind the point that a multiple of a round step has."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


def duration(seconds: float | None) -> str:
    """`2 d 3 h`, `4 h 05 min`, `12 min 30 s`, `8.4 s`."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
