"""The data of a run: how much there is to train on and to hold out, and how long the samples are."""

from engine.data.report_histogram import histogram_svg
from engine.report.html import joined, table, text
from engine.report.numbers import number
from engine.report.run_folder import RunFolder

SETS = {"train": "trained on", "eval": "held out"}
LENGTHS = {"seconds": ("Speech of a sample", "s"), "tokens": ("Tokens of a sample", "tokens")}


def data_section(run: RunFolder) -> str:
    """A table and histograms, of what the newest start found; "" for a run without one."""
    found = (run.starts[-1].get("data") if run.starts else None) or {}
    sets = {name: found[name] for name in SETS if isinstance(found.get(name), dict)}
    sizes = (("samples", ""), ("audio_hours", "h"), ("tokens", ""))
    rows = [[SETS[name], *(number(part.get(key), unit) for key, unit in sizes)] for name, part in sets.items()]
    pictures = [
        _picture(part, key, f"{title}, {SETS[name]}", unit)
        for name, part in sets.items()
        for key, (title, unit) in LENGTHS.items()
    ]
    charts = f'<div class="charts two">{joined(pictures)}</div>' if any(pictures) else ""
    return joined([table(["", "#samples", "#speech", "#tokens"], rows, "size of the data"), charts])


def _picture(part: dict, key: str, title: str, unit: str) -> str:
    lengths = part.get("lengths")
    described = lengths.get(key) if isinstance(lengths, dict) else None
    if not isinstance(described, dict) or "histogram" not in described:
        return ""
    median = f'<span class="now">median {number(described["median"], unit)}</span>'
    head = f"<figcaption><h4>{text(title)}</h4>{median}</figcaption>"
    return f'<figure class="chart histogram">{head}{histogram_svg(described, title, unit, "samples")}</figure>'
