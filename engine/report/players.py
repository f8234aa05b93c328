"""Speech to listen to: a row for each prompt, with its reference, its target and the samples of each round.

Prompt 1 “The birch canoe …”
[reference] [target] [step 500] [step 1,000] …
"""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from engine.report.clips import Clips
from engine.report.html import joined, text
from engine.report.numbers import number
from engine.report.rounds import Round, finite, rounds_of, score
from engine.report.run_folder import RunFolder

MOST_ROUNDS = 12
"""Columns; of more rounds the first, the last, and those spread evenly between."""

MOST_PROMPTS = 50


def chosen(rounds: Sequence[Round], most: int = MOST_ROUNDS) -> list[Round]:
    if len(rounds) <= most:
        return list(rounds)
    return [rounds[i * (len(rounds) - 1) // (most - 1)] for i in range(most)]


def players(run: RunFolder, clips: Clips, beside: Path) -> str:
    """The samples of a run.

    Args:
        beside: folder of the page, from which what it does not hold is linked.
    """
    rounds = rounds_of(run.samples)
    shown = chosen(rounds)
    prompts = sorted({prompt for one in shown for prompt in one.samples})[:MOST_PROMPTS]
    _hold(run, clips, shown, prompts)
    rows = [
        _prompt_row(prompt, [(run, one, f"step {one.step:,}") for one in shown], clips, beside) for prompt in prompts
    ]
    notes = [f"{len(rounds)} rounds were spoken, {len(shown)} of them are shown."] if len(shown) < len(rounds) else []
    return grid(rows, [*notes, *left_out(clips)])


def _hold(run: RunFolder, clips: Clips, shown: Sequence[Round], prompts: Sequence[int]) -> None:
    """Takes files into the page, those first that would be missed most: references, targets, the last round."""
    for kind in ("reference", "target"):
        clips.take(run.folder, (_first(shown, prompt, kind) for prompt in prompts))
    for one in (*shown[-1:], *shown[:1], *reversed(shown[1:-1])):
        clips.take(run.folder, (one.samples[p].get("file") for p in prompts if p in one.samples))


def _first(rounds: Sequence[Round], prompt: int, kind: str) -> str | None:
    return next((name for one in rounds if (name := one.samples.get(prompt, {}).get(kind))), None)


def left_out(clips: Clips) -> list[str]:
    notes = [f"{text(note)}." for note in clips.notes]
    if clips.left_out:
        notes.append(
            f"{len(clips.left_out)} recording(s) are linked, not held, to keep this page small enough to send."
        )
    return notes


def grid(rows: list[str], notes: list[str]) -> str:
    if not rows:
        return ""
    return f'<div class="prompts">{joined(rows)}</div>' + "".join(f'<p class="about">{note}</p>' for note in notes)


def _prompt_row(prompt: int, cells: list[tuple[RunFolder, Round, str]], clips: Clips, beside: Path) -> str:
    with_it = [(run, one, label) for run, one, label in cells if prompt in one.samples]
    run, one, _ = with_it[-1]
    about = one.samples[prompt]
    name = about.get("name") or f"prompt {prompt + 1}"
    parts = []
    for kind in ("reference", "target"):
        if file := _first([one for _, one, _ in with_it], prompt, kind):
            player = clips.player(run.folder, str(file), link(run, str(file), beside), f"{name}, {kind}")
            length = number(finite(about.get("target_seconds")), "s") if kind == "target" else ""
            parts.append(cell(kind.capitalize(), player, [length] if about.get("target_seconds") else [], "given"))
    for run, one, label in cells:
        parts.append(sample_cell(run, one.samples.get(prompt), label, f"{name}, {label}", clips, beside))
    label = text(f"Recordings of {name}")
    return (
        f'<article class="prompt"><h4><small>{text(name)}</small> <q dir="auto">{text(about.get("text"))}</q></h4>'
        f'<div class="strip" tabindex="0" role="region" aria-label="{label}">{joined(parts)}</div></article>'
    )


def sample_cell(run: RunFolder, sample: dict | None, head: str, label: str, clips: Clips, beside: Path) -> str:
    if sample is None:
        return cell(head, '<p class="gone">not spoken</p>', [])
    file = sample.get("file")
    if not file:
        return cell(head, f'<p class="gone">{text(sample.get("error") or "not spoken")}</p>', [], "failed")
    length = finite(sample.get("seconds"))
    facts = [] if length is None else [f"{length:.1f} s"]
    if sample.get("stopped") is False:
        facts.append("<b>did not stop</b>")
    if (wer := score(sample, "wer")) is not None:
        facts.append(f"WER {number(wer, 'share')}")
    if (similarity := score(sample, "speaker_similarity")) is not None:
        facts.append(f"similarity {similarity:.2f}")
    scores = sample.get("scores")
    heard = scores.get("transcript") if isinstance(scores, dict) else None
    player = clips.player(run.folder, str(file), link(run, str(file), beside), label)
    return cell(head, player, facts, heard=heard)


def cell(head: str, player: str, facts: list[str], kind: str = "", heard: object = None) -> str:
    told = f'<p class="facts">{" · ".join(facts)}</p>' if facts else ""
    heard = f'<p class="heard" dir="auto">heard: {text(heard)}</p>' if heard else ""
    return f'<div class="cell {kind}"><h5>{text(head)}</h5>{player}{told}{heard}</div>'


def link(run: RunFolder, name: str, beside: Path) -> str:
    return quote(os.path.relpath(run.folder / name, beside).replace(os.sep, "/"))
