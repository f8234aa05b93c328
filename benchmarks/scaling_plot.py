"""MFU over GPUs as an SVG: one panel a table of predictions, one line a way to spread the model."""

import math

from benchmarks.svg import COLOURS, drawing, line, text

WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 300, 50, 40, 60
TOP_MFU = 0.8


def _x(panel: int, gpus: int, smallest: int, largest: int) -> float:
    return LEFT + panel * (WIDTH + GAP) + WIDTH * math.log2(gpus / smallest) / math.log2(largest / smallest)


def _y(mfu: float) -> float:
    return TOP + HEIGHT * (1 - mfu / TOP_MFU)


def svg(panels: dict[str, dict[str, dict[int, float]]], ceiling: float) -> str:
    """A drawing of `panels`: title -> name of the line -> GPUs -> MFU, with a dashed line at `ceiling`."""
    parts = []
    for number, (title, lines) in enumerate(panels.items()):
        sizes = list(next(iter(lines.values())))
        ends = sizes[0], sizes[-1]
        left, right = _x(number, ends[0], *ends), _x(number, ends[1], *ends)
        parts.append(text((left + right) / 2, TOP - 16, title, size=14))
        for step in range(0, 9, 2):
            parts.append(line([(left, _y(step / 10)), (right, _y(step / 10))], "#ddd"))
            parts.append(text(left - 8, _y(step / 10) + 4, f"{step * 10} %", "end"))
        for gpus in sizes:
            parts.append(text(_x(number, gpus, *ends), TOP + HEIGHT + 18, str(gpus)))
        parts.append(text((left + right) / 2, TOP + HEIGHT + 36, "GPUs"))
        parts.append(line([(left, _y(ceiling)), (right, _y(ceiling))], "#333", dashes="5 4"))
        parts.append(text(right, _y(ceiling) - 5, "matmuls at their best", "end"))
        for place, (name, values) in enumerate(lines.items()):
            colour = COLOURS[place % len(COLOURS)]
            parts.append(line([(_x(number, gpus, *ends), _y(mfu)) for gpus, mfu in values.items()], colour, 2))
            parts.append(text(left + 12, TOP + HEIGHT - 12 - 16 * (len(lines) - 1 - place), name, "start", colour))
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 50
    return drawing(width, height, parts)
