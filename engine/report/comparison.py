"""Several runs side by side as one HTML file that fetches nothing: numbers, curves, what differs, speech.

Each run has a colour of its own on the whole page. Runs may have nothing in common: parts that would be empty are
left out, and what makes their losses incomparable is said above the numbers.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.errors import DataError
from engine.report.clips import Clips
from engine.report.common_prompts import common_prompts
from engine.report.curves import curves
from engine.report.final_numbers import final_numbers, side_by_side
from engine.report.html import contents, document, folded, joined, section, text
from engine.report.numbers import NOTHING
from engine.report.rounds import rounds_of, score_table
from engine.report.run_folder import RunFolder, read_run

MOST_RUNS = 8
"""As many as there are colours that can be told apart."""

MORE_COLOURS = {
    4: ("#8a6500", "#dcb84e"), 5: ("#b81e5b", "#ff86b0"), 6: ("#5b6068", "#b9bec7"), 7: ("#007584", "#5fd3e3"),
}  # fmt: skip
"""Beside those of engine/report/style.py: on light ground, on dark ground."""

MEANING_OF_LOSS = ("text_loss_weight", "audio_loss_weight", "codebook_weights", "eval_data_file")
IF_SET_ASIDE = ("train_data_file", "validation_split")
UNKNOWN = object()


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Writes `out`, whole or not at all.

    Raises:
        DataError: a folder is none of a run or is there twice, or there are too many.
        OSError: the file cannot be written.
    """
    out = out.resolve()
    draft = out.with_name(f".{out.name}.draft")
    draft.write_text(comparison(_read(folders), out.parent), encoding="utf-8")
    os.replace(draft, out)
    return out


def _read(folders: Sequence[Path]) -> list[RunFolder]:
    runs, problems = [], []
    times = Counter(folder.resolve() for folder in folders)
    problems += [f"{folder} is given {count} times → give it once" for folder, count in times.items() if count > 1]
    if len(times) > MOST_RUNS:
        problems.append(f"{len(times)} runs are more than {MOST_RUNS}, the colours of the page → compare fewer")
    for folder in times:
        try:
            runs.append(read_run(folder))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("these runs cannot be compared:", problems)
    for run, name in zip(runs, distinct_names(runs), strict=True):
        run.name = name
    return runs


def distinct_names(runs: Sequence[RunFolder]) -> list[str]:
    """Names of runs; of those that have the same name as much of their paths as tells all of them apart."""
    times = Counter(run.name for run in runs)
    names = [run.name for run in runs]
    for parts in range(1, max(len(run.folder.parts) for run in runs) + 1):
        names = [r.name if times[r.name] == 1 else "/".join(r.folder.parts[-parts:]) for r in runs]
        if len(set(names)) == len(runs):
            break
    return names


def comparison(runs: Sequence[RunFolder], beside: Path) -> str:
    """`beside`: folder of the page, from which files are linked."""
    heads = [f'<span class="key c{n}">{text(run.name)}</span>' for n, run in enumerate(runs)]
    title = " · ".join(run.name for run in runs)
    clips = Clips()
    sections = [
        section("warnings", "Warnings", _warnings(runs)),
        section("numbers", "Numbers", final_numbers(runs, heads), "★ marks the best of a row, where one is better."),
        section("samples", "Speech", common_prompts(runs, clips, beside) + _scores(runs)),
        section("curves", "Curves", curves(runs)),
        section("settings", "Settings that differ", side_by_side("", heads, setting_rows(runs))),
        section("provenance", "Provenance that differs", side_by_side("", heads, provenance_rows(runs))),
    ]
    head = f"<h1>{len(runs)} runs side by side</h1>{_legend(runs, heads, beside)}{contents(sections)}"
    return document(f"{title}: runs side by side", [f"<style>{_style()}</style><header>{head}</header>", *sections])


def _style() -> str:
    more = "".join(f"--c{n}: light-dark({light}, {dark});" for n, (light, dark) in MORE_COLOURS.items())
    used = "".join(
        f"path.c{n} {{ stroke: var(--c{n}); }} .c{n}::before {{ color: var(--c{n}); }}" for n in MORE_COLOURS
    )
    waves = "".join(f".of.c{n} .cell .wave path {{ stroke: var(--c{n}); }}" for n in range(MOST_RUNS))
    return (
        f":root {{ {more} }} {used}{waves}"
        """
.key { display: inline-block; } .of { display: contents; } .runs { list-style: none; padding: 0; margin: 8px 0; }
.runs li { margin: 2px 0; overflow-wrap: anywhere; }
.compared table { table-layout: fixed; min-width: calc(11rem + var(--runs) * 8rem); }
.compared th:first-child { width: 11rem; } .compared .n { white-space: normal; overflow-wrap: anywhere; }
.compared :is(th, td):first-child { position: sticky; left: 0; background: var(--ground); z-index: 1; }
.compared th, .compared th:first-child { background: var(--panel); z-index: 2; }
.compared small { display: block; } .compared .key { margin: 0; } .compared abbr { text-decoration: none; }
"""
    )


def _legend(runs: Sequence[RunFolder], heads: Sequence[str], beside: Path) -> str:
    items = []
    for run, head in zip(runs, heads, strict=True):
        done, total = run.steps
        state = f"step {done:,}" + (f" of {total:,}" if total else "") + (", complete" if done == total else "")
        page = run.folder / "report.html"
        link = quote(os.path.relpath(page, beside).replace(os.sep, "/"))
        link = f' · <a href="{text(link)}">its report</a>' if page.is_file() else ""
        items.append(f'<li>{head} <span class="about">{state}{link}</span></li>')
    return f'<ul class="runs">{joined(items)}</ul>'


def _warnings(runs: Sequence[RunFolder]) -> str:
    lines = [*_incomparable(runs), *(f"{run.name}: {line}" for run in runs for line in _notes(run))]
    return f"<ul>{joined(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""


def _incomparable(runs: Sequence[RunFolder]) -> Iterator[str]:
    """What makes the held-out losses of the runs those of different things."""
    known = [run.settings for run in runs if run.settings]
    set_aside = any(not settings.get("eval_data_file") for settings in known)
    names = MEANING_OF_LOSS + (IF_SET_ASIDE if set_aside else ())
    differing = [name for name in names if _differ(settings.get(name) for settings in known)]
    if differing:
        yield f"the runs differ in {', '.join(differing)}: their held-out losses do not measure the same"


def _notes(run: RunFolder) -> Iterator[str]:
    yield from run.notes
    if run.metrics.alarms:
        step, line = run.metrics.alarms[-1]
        yield f"{len(run.metrics.alarms):,} alarm(s), the last at step {step:,.0f}: {line}"


def _scores(runs: Sequence[RunFolder]) -> str:
    tables = ((run, score_table(rounds_of(run.samples))) for run in runs)
    return joined(folded(f"Scores of {text(run.name)} by step", drawn) for run, drawn in tables)


def setting_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Name and values, HTML, of the settings that differ; those that say where something lies come last."""
    from engine.config import FIELDS

    places = [name for name, field in FIELDS.items() if field.metadata.get("path")]
    last = [*(name for name in places if name != "output_dir"), "run_name", "output_dir"]
    names = dict.fromkeys([*FIELDS, *(str(name) for run in runs for name in run.settings)])
    ordered = [*(name for name in names if name not in last), *last]
    return _differing(ordered, [run.settings or None for run in runs])


def provenance_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Name and values, HTML, of what the runs' newest starts say differently."""
    facts = [_provenance(run.starts[-1]) if run.starts else None for run in runs]
    return _differing(dict.fromkeys(name for one in facts if one for name in one), facts)


def _provenance(start: dict) -> dict[str, Any]:
    names = ("device", "world_size", "hosts", "engine_commit")
    facts = {name.replace("_", " "): start.get(name) for name in names}
    for group in ("versions", "model"):
        found = start.get(group)
        facts |= {f"{group}: {name}": value for name, value in found.items()} if isinstance(found, dict) else {}
    data = start.get("data")
    for name in ("train", "eval"):
        found = data.get(name) if isinstance(data, dict) else None
        for fact in ("samples", "tokens", "audio_hours"):
            facts[f"{name} data: {fact}"] = found.get(fact) if isinstance(found, dict) else None
    return facts


def _differing(names: Iterable[str], runs: Sequence[dict | None]) -> list[list[str]]:
    """Rows of what differs between those runs of which anything is known; a run that is None has an empty cell."""
    rows = []
    for name in names:
        if _differ(run.get(name) for run in runs if run is not None):
            rows.append([text(name), *(_value(run, name) for run in runs)])
    return rows


def _differ(values: Iterable[Any]) -> bool:
    """1 and True, and 1 and 1.0, are written differently, so they differ only in kind: compared as written."""
    return len({repr(value) for value in values}) > 1


def _value(run: dict | None, name: str) -> str:
    value = None if run is None else run.get(name)
    value = ", ".join(map(str, value)) if isinstance(value, list) else value
    return NOTHING if value is None or value == "" else text(value)
