"""What several runs make of the same words: a row for each text that at least two of them have spoken.

“The birch canoe …”
[reference] [target] [run a, step 500] [run b, step 800] …

Reference and target stand there once, or once for each recording where runs were given different ones.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engine.report.clips import LARGEST, Clips
from engine.report.html import joined, text
from engine.report.players import MOST_PROMPTS, cell, grid, left_out, link, sample_cell
from engine.report.rounds import rounds_of
from engine.report.run_folder import RunFolder
from engine.untrusted import path_within

Spoken = tuple[str, int]
"""A text, and which of the prompts with this text."""

Sample = tuple[RunFolder, dict]


def common_prompts(runs: Sequence[RunFolder], clips: Clips, beside: Path) -> str:
    """
    Args:
        beside: folder of the page, from which what it does not hold is linked.
    """
    newest = [newest_samples(run) for run in runs]
    times = Counter(spoken for samples in newest for spoken in samples)
    common = [spoken for spoken, count in times.items() if count > 1][:MOST_PROMPTS]
    if times and not common:
        return '<p class="about">No two runs have spoken the same text.</p>'
    pairs = list(zip(runs, newest, strict=True))
    rows = {spoken: [(run, samples.get(spoken)) for run, samples in pairs] for spoken in common}
    given = {spoken: _given([(run, sample) for run, sample in row if sample]) for spoken, row in rows.items()}
    for files in given.values():
        for _, run, file in files:
            clips.take(run.folder, [file])
    for row in rows.values():
        for run, sample in row:
            clips.take(run.folder, [sample.get("file") if sample else None])
    drawn = [_row(spoken, given[spoken], row, clips, beside) for spoken, row in rows.items()]
    rest = len(times) - len(common)
    notes = [f"{rest} more text(s) are not shown: one run alone has spoken them, or this page is full."] if rest else []
    return grid(drawn, [*notes, *left_out(clips)])


def newest_samples(run: RunFolder) -> dict[Spoken, dict]:
    """The sample of the newest round that has it, in the order of the prompts."""
    found: dict[Spoken, dict] = {}
    for one in rounds_of(run.samples):
        times: Counter[str] = Counter()
        for prompt in sorted(one.samples):
            words = str(one.samples[prompt].get("text") or "").strip()
            if words:
                found[words, times[words]] = one.samples[prompt]
                times[words] += 1
    return found


def _given(samples: Sequence[Sample]) -> list[tuple[str, RunFolder, str]]:
    """(kind, run, file) of the references, then the targets, each recording once."""
    found = {}
    for kind in ("reference", "target"):
        for run, sample in samples:
            if file := sample.get(kind):
                found.setdefault((kind, _content(run.folder, str(file))), (kind, run, str(file)))
    return list(found.values())


def _content(folder: Path, name: str) -> bytes | str:
    """What tells a recording from others; the name of one that cannot be read."""
    try:
        file = (folder / path_within(name)).resolve()
        if file.is_relative_to(folder) and file.stat().st_size <= LARGEST:
            return hashlib.sha256(file.read_bytes()).digest()
    except (OSError, ValueError):
        pass
    return name


def _row(
    spoken: Spoken, given: list[tuple[str, RunFolder, str]], row: list[tuple[RunFolder, dict | None]],
    clips: Clips, beside: Path,
) -> str:  # fmt: skip
    kinds = Counter(kind for kind, _, _ in given)
    parts = []
    for kind, run, file in given:
        head = kind.capitalize() + (f" of {run.name}" if kinds[kind] > 1 else "")
        player = clips.player(run.folder, file, link(run, file, beside), f"{head}: {spoken[0]}")
        parts.append(cell(head, player, [], "given"))
    for colour, (run, sample) in enumerate(row):
        head = f"{run.name}, step {sample['step']:,}" if sample else run.name
        its = sample_cell(run, sample, head, f"{head}: {spoken[0]}", clips, beside)
        parts.append(f'<div class="of c{colour}">{its}</div>')
    return (
        f'<article class="prompt"><h4><q dir="auto">{text(spoken[0])}</q></h4>'
        f'<div class="strip" tabindex="0" role="region" aria-label="{text(f"Recordings of {spoken[0]}")}">'
        f"{joined(parts)}</div></article>"
    )
