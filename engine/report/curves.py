"""The curves of one run, or of several over each other: what engine/observe/schema.py knows, group by group.

A metric of a run is drawn with its held-out value over it; one value for each codebook makes a row of small charts
with the same axis. In a comparison each run has a colour of its own.
"""

from collections.abc import Sequence

from engine.observe.schema import GROUPS, METRICS, Metric
from engine.report.chart import Chart
from engine.report.html import joined, text
from engine.report.run_folder import RunFolder
from engine.report.series import Series

TOGETHER = {"memory_gib": "memory_peak_gib", "mfu": "hfu", "data_share": "communication_share"}
"""Metrics that share a chart where there is one run."""

TITLES = {
    "memory_gib": "memory", "mfu": "MFU and HFU", "data_share": "time waiting", "hfu": "HFU", "eos_loss": "EOS loss",
    "eos_accuracy": "EOS accuracy", "grad_norm": "gradient norm", "tflops_per_gpu": "TFLOP/s per GPU",
    "codebook_losses": "loss of each codebook", "codebook_accuracies": "accuracy of each codebook",
    "tokens_per_second_per_gpu": "tokens per second per GPU",
    "audio_seconds_per_second_per_gpu": "audio seconds per second per GPU",
}  # fmt: skip
APART = {"memory_peak_gib": "memory peak", "mfu": "MFU", "data_share": "time waiting for data",
         "communication_share": "time in communication"}  # fmt: skip
"""Titles where several runs are compared, and each of `TOGETHER` has a chart for itself."""

LABELS = {"memory_gib": "now", "memory_peak_gib": "peak", "data_share": "for data", "mfu": "MFU",
          "communication_share": "for communication", "hfu": "HFU"}  # fmt: skip
FREE_BELOW = ("loss", "accuracy")
"""Groups whose axis need not begin at 0."""

NOT_DRAWN = "progress"


def curves(runs: Sequence[RunFolder]) -> str:
    """A heading and its charts for each group of metrics."""
    return joined(_group(runs, group) for group in GROUPS if group != NOT_DRAWN)


def title_of(name: str, alone: bool = True) -> str:
    """`alone`: of one run, where metrics share charts."""
    title = TITLES.get(name, name.replace("_", " ")) if alone or name not in APART else APART[name]
    return title[0].upper() + title[1:]


def in_a_sentence(title: str) -> str:
    """`EOS loss`, but `text loss`."""
    return title if title[:2].isupper() else title[0].lower() + title[1:]


def _group(runs: Sequence[RunFolder], group: str) -> str:
    charts, rows, zero = [], [], []
    joint = set(TOGETHER.values()) if len(runs) == 1 else set()
    for metric in METRICS:
        if metric.group != group or metric.name in joint or _repeats(runs, metric.name):
            continue
        if any(run.metrics.members(metric.name) for run in runs):
            rows.append(_small_multiples(runs, metric))
            continue
        series = _series(runs, metric.name)
        if not series:
            continue
        if group not in FREE_BELOW and not any(value for one in series for value in one.values):
            zero.append(f"<b>{text(in_a_sentence(title_of(metric.name, len(runs) == 1)))}</b> is 0 throughout.")
        else:
            charts.append(_chart(runs, metric, series).html())
    if not charts and not rows and not zero:
        return ""
    about = f"{text(GROUPS[group][0].upper() + GROUPS[group][1:])}. {' '.join(zero)}"
    grid = f'<div class="charts">{joined(charts)}</div>' if charts else ""
    return f'<h3>{group.capitalize()}</h3><p class="about">{about}</p>{grid}{joined(rows)}'


def _repeats(runs: Sequence[RunFolder], name: str) -> bool:
    """Whether it says of one GPU what the same name says of all: there is only one."""
    whole = name.removesuffix("_per_gpu")
    return whole != name and all(run.metrics.points(whole) == run.metrics.points(name) for run in runs)


def _series(runs: Sequence[RunFolder], name: str) -> list[Series]:
    """Training, then held-out; of one run also the metric that shares its chart."""
    found = []
    for colour, run in enumerate(runs):
        alone = len(runs) == 1
        label = LABELS.get(name, "training") if alone else run.name
        held_out = "held-out" if alone else f"{run.name}, held-out"
        found.append(Series(label, run.metrics.points(name), colour=colour))
        if alone and name in TOGETHER:
            found.append(Series(LABELS[TOGETHER[name]], run.metrics.points(TOGETHER[name]), colour=1))
        found.append(Series(held_out, run.metrics.points(f"eval_{name}"), dots=True, colour=1 if alone else colour))
    return [series for series in found if series.points]


def _chart(runs: Sequence[RunFolder], metric: Metric, series: list[Series]) -> Chart:
    marks = []
    if len(runs) == 1:
        marks = [(step, "resumed", f"resumed at step {step:,}") for step in runs[0].resumed_at]
        if metric.name in ("grad_norm", "loss"):
            marks += [(line["step"], "skipped", f"step {line['step']} was skipped") for line in skipped_lines(runs[0])]
    return Chart(
        title_of(metric.name, len(runs) == 1), series, metric.unit, _meaning(metric, len(runs) == 1),
        from_zero=metric.group not in FREE_BELOW, may_be_log=metric.name == "grad_norm", marks=marks,
        steps=_steps(runs),
    )  # fmt: skip


def skipped_lines(run: RunFolder) -> list[dict]:
    return [line for line in run.skipped if type(line.get("step")) is int]


def _meaning(metric: Metric, alone: bool = True) -> str:
    better = {True: "; more is better", False: "", None: ""}[metric.higher_is_better]
    other = TOGETHER.get(metric.name) if alone else None
    partner = next((f"; {LABELS[other]}: {one.meaning}" for one in METRICS if one.name == other), "")
    return metric.meaning[0].upper() + metric.meaning[1:] + partner + better * (metric.group == "accuracy") + "."


def _steps(runs: Sequence[RunFolder]) -> tuple[float, float]:
    return 0, max(1, *(run.steps[0] for run in runs))


def _small_multiples(runs: Sequence[RunFolder], metric: Metric) -> str:
    members = sorted({m for run in runs for m in run.metrics.members(metric.name)}, key=lambda m: int(m.split("/")[1]))
    charts = {member.split("/")[1]: _series(runs, member) for member in members}
    values = [value for series in charts.values() for one in series for value in one.values]
    shared = (min(values), max(values)) if values else None
    drawn = (
        Chart(f"book {number}", series, metric.unit, values=shared, steps=_steps(runs), small=True).html()
        for number, series in charts.items()
    )
    keys = {(one.label, one.colour, one.dots) for series in charts.values() for one in series}
    ordered = sorted(keys, key=lambda key: (key[1], key[2]))
    legend = " ".join(f'<span class="key c{c}{" dotted" * dots}">{text(label)}</span>' for label, c, dots in ordered)
    legend = f'<p class="legend">{legend}</p>' if len(keys) > 1 else ""
    return (
        f'<h4 class="row">{text(title_of(metric.name))}</h4><p class="meaning">{text(_meaning(metric))}</p>'
        f'{legend}<div class="multiples">{joined(drawn)}</div>'
    )
