"""The throughput table as an SVG: where each row's step goes, drawn as the time for as many tokens."""

from benchmarks.svg import COLOURS, box, drawing, text

LEFT, WIDTH, BAR, GAP, TOP = 330, 460, 18, 10, 44
PARTS = ("data", "forward", "backward", "optimizer")


def svg(results: dict[str, dict]) -> str:
    """A bar for each row of a report's `results`, of milliseconds a token by the median step."""
    bars = {}
    for row in results.values():
        spent = sum(row["parts"].values())
        bars[row["title"]] = {
            name: 1e3 * row["parts"].get(name, 0) / spent / row["tokens_per_second"] for name in PARTS
        }
    longest = max(sum(parts.values()) for parts in bars.values())
    shapes = [text(LEFT + 110 * number, 20, name, "start", COLOURS[number]) for number, name in enumerate(PARTS)]
    for number, (title, parts) in enumerate(bars.items()):
        x, y = LEFT, TOP + number * (BAR + GAP)
        shapes.append(text(x - 10, y + 13, title, "end"))
        for colour, name in zip(COLOURS, PARTS, strict=False):
            width = WIDTH * parts[name] / longest
            shapes.append(box(x, y, width, BAR, colour))
            x += width
        shapes.append(text(x + 6, y + 13, f"{sum(parts.values()):.3g} ms", "start"))
    return drawing(LEFT + WIDTH + 70, TOP + len(bars) * (BAR + GAP) + 10, shapes)
