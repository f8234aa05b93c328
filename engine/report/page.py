"""The report of a run as one HTML file that fetches nothing."""

import os
from collections.abc import Iterator
from pathlib import Path

from engine.observe.sizes import binary_size
from engine.report.clips import Clips
from engine.report.curves import curves, in_a_sentence, title_of
from engine.report.data_section import data_section
from engine.report.final_numbers import highest, last, median_of
from engine.report.html import contents, document, folded, joined, key_numbers, section, table, text
from engine.report.numbers import duration, number
from engine.report.players import players
from engine.report.rounds import rounds_of, score_table
from engine.report.run_folder import RunFolder, read_run

HELD_OUT = ("loss", "text_loss", "audio_loss", "text_accuracy", "audio_accuracy", "eos_accuracy")
KEY_NUMBERS = (
    # title, unit, value, what it is
    ("speed", "tokens/s", median_of("tokens_per_second"), "median"),
    ("memory, at its peak", "GiB", highest("memory_peak_gib"), "of a process"),
    ("speech trained on", "h", last("audio_hours_seen"), ""),
)
CURVES = "Dashed lines: where the run was resumed. Red marks: skipped steps. Over a pale line is its mean."
MOST_LINES = 20
"""Of a list that are seen at once."""
UNITS = {"text_accuracy": "share", "audio_accuracy": "share", "eos_accuracy": "share"}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes RUN_DIR/report.html, or `out`; whole or not at all.

    Raises:
        DataError: it is no folder of a run.
        OSError: the file cannot be written.
    """
    out = (out or folder / "report.html").resolve()
    draft = out.with_name(f".{out.name}.draft")
    draft.write_text(page(read_run(folder), out.parent), encoding="utf-8")
    os.replace(draft, out)
    return out


def page(run: RunFolder, beside: Path) -> str:
    """`beside`: folder of the page, from which files are linked."""
    done, total = run.steps
    state = f"step {done:,}" + (f" of {total:,}" if total else "") + (", complete" if done == total else "")
    sections = [
        section("warnings", "Warnings", _list(_warnings(run))),
        section("samples", "Speech", players(run, Clips(), beside) + score_table(rounds_of(run.samples))),
        section("curves", "Curves", curves([run]), CURVES),
        section("data", "Data", data_section(run)),
        section("evaluations", "Held-out data", _evaluations(run)),
        section("checkpoints", "Checkpoints", _checkpoints(run)),
        section("starts", "Starts", _starts(run)),
        section("settings", "Settings", _settings(run)),
    ]
    head = f"<header><h1>{text(run.name)}</h1><p class='about'>{state}</p>{contents(sections)}</header>"
    return document(f"{run.name}: training report", [head, _key_numbers(run), *sections])


def _key_numbers(run: RunFolder) -> str:
    found = [("time in steps", duration(run.metrics.seconds()), "")]
    if losses := run.metrics.points("loss"):
        found.append(_loss("loss", *losses[-1]))
    found += [(title, number(value(run), unit), small) for title, unit, value, small in KEY_NUMBERS]
    if losses := run.metrics.points("eval_loss"):
        found.append(_loss("best held-out loss", *min(losses, key=lambda point: point[1])))
    found.append(("skipped steps", f"{len(run.skipped):,}", ""))
    return key_numbers(found) if run.metrics.last else ""


def _loss(title: str, step: float, value: float) -> tuple[str, str, str]:
    return title, number(value, "nats"), f"at step {step:,.0f}"


def _warnings(run: RunFolder) -> Iterator[str]:
    yield from run.notes
    yield from (f"step {step:,.0f}: {line}" for step, line in run.metrics.alarms)
    yield from (f"step {line.get('step')} was skipped: {line.get('reason')}" for line in run.skipped)
    for name, lines in run.dropped.items():
        yield from ([f"{len(lines):,} samples of {name} are left out, the first: {lines[0]}"] if lines else [])
    for sample in run.samples:
        if sample.get("error"):
            yield f"sample {sample.get('name')} of step {sample.get('step')}: {sample['error']}"


def _list(lines: Iterator[str]) -> str:
    """All of them; what would push the rest of the page away is folded."""
    items = [f"<li>{text(line)}</li>" for line in lines]
    first, rest = (f"<ul>{joined(part)}</ul>" if part else "" for part in (items[:MOST_LINES], items[MOST_LINES:]))
    return joined([first, folded(f"{len(items) - MOST_LINES:,} more", rest)])


def _evaluations(run: RunFolder) -> str:
    points = dict(run.metrics.points("eval_loss"))
    columns = {name: dict(run.metrics.points(f"eval_{name}")) for name in HELD_OUT}
    columns = {name: values for name, values in columns.items() if values}
    best = min(points, key=points.get, default=None)
    rows = [[f"{s:,.0f}", *(number(v.get(s), UNITS.get(n, "")) for n, v in columns.items())] for s in points]
    heads = ["#step", *(f"#{in_a_sentence(title_of(name))}" for name in columns)]
    return table(heads, rows, "held-out losses by step", [n for n, step in enumerate(points) if step == best])


def _checkpoints(run: RunFolder) -> str:
    rows = (
        [text(c.name), binary_size(c.bytes), number(c.eval_loss, "nats"), f"{c.world_size} × {text(c.backend)}",
         ", ".join(name for name, target in run.pointers.items() if target == c.name)]
        for c in run.checkpoints
    )  # fmt: skip
    return table(["checkpoint", "#size", "#held-out loss", "written by", ""], rows, "checkpoints")


def _starts(run: RunFolder) -> str:
    """When, where and with what; the long words of the newest in a fold-out."""
    names = ("time", "step", "resumed_from", "world_size", "device", "hosts")
    heads = ("time", "#from step", "checkpoint", "#processes", "device", "hosts")
    rows = ([_shown(start.get(name)) for name in names] for start in run.starts)
    newest = run.starts[-1] if run.starts else {}
    long = ((name, newest.get(name)) for name in ("model", "versions", "engine_commit", "command"))
    facts = [[name.replace("_", " "), _shown(value)] for name, value in long if value]
    about = folded("model, versions and command of the newest", table(["what", "which"], facts, "provenance"))
    return joined([table(heads, rows, "starts of the run"), about])


def _shown(value: object) -> str:
    """Lists and mappings as people write them."""
    if isinstance(value, dict):
        return ", ".join(f"{text(key)} {_shown(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if type(value) is int else text(value)


def _settings(run: RunFolder) -> str:
    from engine.config import FIELDS

    known = {name: field.metadata["default"] for name, field in FIELDS.items()}
    rows = {name: [text(name), text(value)] for name, value in run.settings.items()}
    changed = [row for name, row in rows.items() if name not in known or known[name] != run.settings[name]]
    same = [row for name, row in rows.items() if name in known and known[name] == run.settings[name]]
    head = ["setting", "value"]
    return folded(f"{len(changed)} changed", table(head, changed, "changed settings")) + folded(
        f"{len(same)} as by default", table(head, same, "settings as by default")
    )
