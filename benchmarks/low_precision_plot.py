"""Loss over steps as an SVG, one line a run."""

from benchmarks.svg import COLOURS, drawing, line, text

WIDTH, HEIGHT, LEFT, TOP = 640, 320, 50, 20


def svg(curves: dict[str, list[float]], first_step: int) -> str:
    """A drawing of `curves`: title -> losses, of the steps from `first_step` on."""
    everything = [loss for curve in curves.values() for loss in curve]
    low, high = int(min(everything)), int(max(everything)) + 1
    last = first_step + len(next(iter(curves.values()))) - 1

    def place(step: int, loss: float) -> tuple[float, float]:
        return LEFT + WIDTH * step / last, TOP + HEIGHT * (high - loss) / (high - low)

    parts = []
    for loss in range(low, high + 1):
        (left, y), (right, _) = place(0, loss), place(last, loss)
        parts += [line([(left, y), (right, y)], "#ddd"), text(left - 8, y + 4, str(loss), "end")]
    for step in range(0, last + 1, max(last // 6, 1)):
        parts.append(text(place(step, low)[0], TOP + HEIGHT + 18, str(step)))
    parts.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, f"step; loss, mean of {first_step} steps"))
    for number, (title, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(line([place(first_step + i, loss) for i, loss in enumerate(curve)], colour, 1.5))
        parts.append(text(LEFT + WIDTH - 12, TOP + 16 + 16 * number, title, "end", colour))
    return drawing(LEFT + WIDTH + 20, TOP + HEIGHT + 50, parts)
