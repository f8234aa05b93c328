"""The numbers of several runs side by side, a column for each run, with the best of each row marked.

What is better engine/observe/schema.py says; a row of which it says nothing, or that one run alone knows, has no best.
Held-out numbers and those of training are the last ones measured. Speeds are medians over all logged lines: a single
line may have a save or a busy neighbour in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from engine.observe.schema import BY_NAME
from engine.report.curves import title_of
from engine.report.html import joined, table, text
from engine.report.numbers import duration, number
from engine.report.rounds import COLUMNS, Round, rounds_of
from engine.report.run_folder import RunFolder

MEASURED = ("loss", "text_loss", "audio_loss", "eos_loss", "text_accuracy", "audio_accuracy", "eos_accuracy")
SPEEDS = (
    "tokens_per_second_per_gpu", "audio_seconds_per_second_per_gpu", "audio_seconds_per_second", "tflops_per_gpu",
    "mfu", "seconds_per_step",
)  # fmt: skip
LOWER_SCORES = ("word errors", "character errors", "spectrum")
HIGHER_SCORES = ("similarity",)

Measure = Callable[[RunFolder], float | None]


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        heading: HTML.
        unit: as of engine/report/numbers.py; "time" is seconds, written as a duration.
        value: of a run; None where it is not known.
        small: what stands below a value, HTML.
    """

    heading: str
    unit: str
    higher_is_better: bool | None
    value: Measure
    small: Callable[[RunFolder], str] = lambda run: ""

    def cells(self, runs: Sequence[RunFolder]) -> list[str] | None:
        """None if no run knows the value."""
        values = [self.value(run) for run in runs]
        if all(value is None for value in values):
            return None
        winners = best(values, self.higher_is_better)
        pairs = enumerate(zip(runs, values, strict=True))
        return [self.heading, *(self._cell(run, value, n in winners) for n, (run, value) in pairs)]

    def _cell(self, run: RunFolder, value: float | None, wins: bool) -> str:
        shown = duration(value) if self.unit == "time" else number(value, self.unit)
        shown = f'<b>{shown} <abbr title="best of this row">★</abbr></b>' if wins else shown
        small = self.small(run) if value is not None else ""
        return f"{shown} <small>{small}</small>" if small else shown


def best(values: Sequence[float | None], higher_is_better: bool | None) -> set[int]:
    """Numbers of the best values; of none where nothing is better, or fewer than two differ."""
    known = [value for value in values if value is not None]
    if higher_is_better is None or len(set(known)) < 2:
        return set()
    target = max(known) if higher_is_better else min(known)
    return {n for n, value in enumerate(values) if value == target}


def final_numbers(runs: Sequence[RunFolder], heads: Sequence[str]) -> str:
    """
    Args:
        heads: of the runs' columns, HTML.
    """
    measured = [_of_metric(name, last(name), "") for name in MEASURED]
    held_out = [_of_metric(name, last(f"eval_{name}"), "") for name in MEASURED]
    groups = {
        "Held-out data, at the last evaluation": [_best_held_out(), *held_out],
        "Training, on the last logged line": measured,
        "Speed and memory": [
            *(_of_metric(name, median_of(name), "median") for name in SPEEDS),
            _of_metric("memory_peak_gib", highest("memory_peak_gib"), ""),
        ],
        "How far": [
            Row("Steps", "", None, lambda run: run.steps[0]),
            *(_of_metric(name, last(name), "") for name in ("epoch", "tokens_seen", "audio_hours_seen")),
            Row("Time in steps", "time", None, lambda run: run.metrics.seconds() or None),
            Row("Skipped steps", "", False, lambda run: len(run.skipped)),
        ],
        "Speech, of each run's newest round": [_of_score(*column) for column in COLUMNS],
    }
    return joined(side_by_side(title, heads, [row.cells(runs) for row in rows]) for title, rows in groups.items())


def side_by_side(title: str, heads: Sequence[str], rows: Sequence[list[str] | None]) -> str:
    """A table whose first column names the row, and a column of the same width for each run; "" without rows.

    Args:
        title: plain text, its heading; "" for none.
        rows: cells, HTML; None is left out.
    """
    drawn = table(["", *(f"#{head}" for head in heads)], [row for row in rows if row], title or "runs side by side")
    heading = f"<h3>{text(title)}</h3>" if title and drawn else ""
    return f'{heading}<div class="compared" style="--runs: {len(heads)}">{drawn}</div>' if drawn else ""


def _of_metric(name: str, value: Measure, how: str) -> Row:
    metric = BY_NAME[name]
    how = f", {how}" if how else ""
    heading = f'<abbr title="{text(metric.meaning)}">{text(title_of(name, alone=False))}</abbr>{how}'
    return Row(heading, metric.unit, metric.higher_is_better, value)


def _best_held_out() -> Row:
    def lowest(run: RunFolder) -> tuple[float, float] | None:
        return min(run.metrics.points("eval_loss"), key=lambda point: point[1], default=None)

    return Row(
        "Loss, the lowest of all evaluations", "nats", False,
        lambda run: (lowest(run) or (None, None))[1],
        lambda run: f"at step {lowest(run)[0]:,.0f}",
    )  # fmt: skip


def _of_score(heading: str, about: str, value: Callable[[Round], float | None], unit: str) -> Row:
    better = {**dict.fromkeys(LOWER_SCORES, False), **dict.fromkeys(HIGHER_SCORES, True)}.get(heading)

    def newest(run: RunFolder) -> float | None:
        rounds = rounds_of(run.samples)
        found = value(rounds[-1]) if rounds else None
        return None if found is None else round(found, 3)  # what is finer, a few samples do not tell

    return Row(f'<abbr title="{text(about)}">{heading[0].upper()}{heading[1:]}</abbr>', unit, better, newest)


def last(name: str) -> Measure:
    return lambda run: next((value for _, value in reversed(run.metrics.points(name))), None)


def median_of(name: str) -> Measure:
    return lambda run: median(value for _, value in points) if (points := run.metrics.points(name)) else None


def highest(name: str) -> Measure:
    return lambda run: max((value for _, value in run.metrics.points(name)), default=None)
