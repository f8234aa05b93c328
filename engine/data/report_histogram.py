"""A histogram as inline SVG: bars, both axes with units, lines at the median and the 95th percentile.

Colours come from the page's style (classes bar, above, grid, axis, mark, name), so that they follow light and dark.
"""

from typing import Any

from engine.data.distribution import round_step

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 44
FLOOR, END = HEIGHT - BOTTOM, WIDTH - RIGHT
MAX_TICKS = 7
LABEL_ROOM = 110


def histogram_svg(found: dict[str, Any], title: str, unit: str, counted: str) -> str:
    """The picture of what `distribution.describe` found, which has values.

    Args:
        unit: of the values, on the x axis.
        counted: what the y axis counts.
    """
    plot = _Plot(found["histogram"], unit, counted)
    parts = [*plot.y_axis(), *plot.bars(), *plot.x_axis()]
    parts += [part for row, name in enumerate(("median", "p95")) for part in plot.mark(name, found[name], row)]
    label = f'role="img" aria-label="Histogram: {title} in {unit}"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(parts)}</svg>'


class _Plot:
    def __init__(self, shape: dict[str, Any], unit: str, counted: str):
        self.start, self.width, self.counts, self.above = (shape[k] for k in ("start", "width", "counts", "above"))
        self.unit, self.counted = unit, counted
        slots = len(self.counts) + (2 if self.above else 0)  # an empty one sets the open bar apart
        self.slot = (END - LEFT) / slots
        most = max(*self.counts, self.above)
        self.step = int(max(1, round_step(most / 4)))
        self.highest = self.step * -(-most // self.step)

    def x(self, value: float) -> float:
        return LEFT + min((value - self.start) / self.width, len(self.counts) + 1.5) * self.slot

    def y(self, count: float) -> float:
        return FLOOR - (FLOOR - TOP) * count / self.highest

    def edge(self, index: int) -> str:
        return f"{self.start + index * self.width:,.10g}"

    def bars(self) -> list[str]:
        bins = enumerate(self.counts)
        bars = [self._bar(i, n, f"{self.edge(i)} to below {self.edge(i + 1)} {self.unit}", "bar") for i, n in bins]
        if self.above:
            last, end = len(self.counts) + 1, self.edge(len(self.counts))
            bars.append(self._bar(last, self.above, f"{end} {self.unit} and more", "bar above"))
            bars.append(f'<text x="{END}" y="{FLOOR + 28}" text-anchor="end">▴ {end} and more</text>')
        return bars

    def _bar(self, index: int, count: int, label: str, kind: str) -> str:
        left, top = LEFT + index * self.slot, self.y(count)
        return (
            f'<rect class="{kind}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(self.slot - 1, 0.5):.1f}" '
            f'height="{FLOOR - top:.1f}"><title>{label}: {count:,} {self.counted}</title></rect>'
        )

    def x_axis(self) -> list[str]:
        parts = [f'<line class="axis" x1="{LEFT}" x2="{END}" y1="{FLOOR}" y2="{FLOOR}"/>']
        for i in range(0, len(self.counts) + 1, -(-len(self.counts) // MAX_TICKS)):
            at = f"{LEFT + i * self.slot:.1f}"
            parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="{FLOOR}" y2="{FLOOR + 4}"/>')
            parts.append(f'<text x="{at}" y="{FLOOR + 16}" text-anchor="middle">{self.edge(i)}</text>')
        middle = (LEFT + END) // 2
        return parts + [f'<text class="name" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{self.unit}</text>']

    def y_axis(self) -> list[str]:
        parts = []
        for tick in range(0, self.highest + 1, self.step):
            at = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{END}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:,}</text>')
        middle = (TOP + FLOOR) // 2
        place = f'x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})"'
        return parts + [f'<text class="name" {place}>{self.counted}</text>']

    def mark(self, name: str, value: float, row: int) -> list[str]:
        """Rows keep the labels of two values that are close from lying on each other."""
        at, height = self.x(value), 11 + 12 * row
        anchor, gap = ("end", -4) if at > WIDTH - LABEL_ROOM else ("start", 4)
        place = f'x="{at + gap:.1f}" y="{height}" text-anchor="{anchor}"'
        return [
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{height - 8}" y2="{FLOOR}"/>',
            f'<text class="name" {place}>{name} {rounded(value)}</text>',
        ]


def rounded(value: float) -> str:
    """Three digits, and all of a whole number."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
