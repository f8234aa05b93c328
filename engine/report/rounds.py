"""Rounds of generated speech in numbers: what samples/samples.jsonl says of each, put together by step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.report.html import table, text
from engine.report.numbers import number


@dataclass
class Round:
    """The samples of a step, by number of their prompt."""

    step: int
    samples: dict[int, dict] = field(default_factory=dict)

    @property
    def spoken(self) -> list[dict]:
        return [sample for sample in self.samples.values() if sample.get("file")]

    @property
    def failed(self) -> int:
        return len(self.samples) - len(self.spoken)

    def mean(self, name: str) -> float | None:
        """Of a score, over samples that have it."""
        return mean(score(sample, name) for sample in self.spoken)

    def rate(self, errors: str, of: str, otherwise: str) -> float | None:
        """Errors of all samples together over words (or characters) of all; without the counts, the mean rate."""
        pairs = [(score(s, errors), score(s, of)) for s in self.spoken]
        pairs = [(wrong, count) for wrong, count in pairs if wrong is not None and count is not None]
        total = sum(count for _, count in pairs)
        return sum(wrong for wrong, _ in pairs) / total if total else self.mean(otherwise)

    def stopped(self) -> float | None:
        return mean(float(sample["stopped"]) for sample in self.spoken if isinstance(sample.get("stopped"), bool))

    def ratio(self, above: str, below: str) -> float | None:
        """Sum over sum, of samples that have both."""
        pairs = [(finite(sample.get(above)), finite(sample.get(below))) for sample in self.spoken]
        pairs = [(a, b) for a, b in pairs if a is not None and b]
        return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None


def finite(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def score(sample: dict, name: str) -> float | None:
    scores = sample.get("scores")
    return finite(scores.get(name)) if isinstance(scores, dict) else None


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def rounds_of(samples: Iterable[dict]) -> list[Round]:
    """By step; of a prompt that a resumed run has spoken again, the later line counts."""
    found: dict[int, Round] = {}
    for sample in samples:
        step, prompt = sample.get("step"), sample.get("prompt")
        if type(step) is int and type(prompt) is int:
            found.setdefault(step, Round(step)).samples[prompt] = sample
    return [found[step] for step in sorted(found)]


Column = tuple[str, str, Callable[[Round], float | None], str]
COLUMNS: tuple[Column, ...] = (
    # heading, what it means, value, unit
    ("word errors", "of all words of the round (WER)", lambda r: r.rate("word_errors", "words", "wer"), "share"),
    ("character errors", "of all characters (CER)",
     lambda r: r.rate("character_errors", "characters", "cer"), "share"),
    ("similarity", "of voice and reference, 1 is the same", lambda r: r.mean("speaker_similarity"), ""),
    ("stopped", "samples that ended by themselves", Round.stopped, "share"),
    ("length", "of the speech, over that of the target", lambda r: r.ratio("seconds", "target_seconds"), "×"),
    ("time to speak", "seconds of generation for a second of speech (RTF)",
     lambda r: r.ratio("generation_seconds", "seconds"), "×"),
    ("spectrum", "distance from the target's", lambda r: r.mean("spectral_distance_db"), "dB"),
    ("pitch", "median, mean over samples", lambda r: r.mean("pitch_median_hz"), "Hz"),
    ("silence", "share of the time", lambda r: r.mean("silence_share"), "share"),
    ("clipped", "share of the time", lambda r: r.mean("clipped_share"), "share"),
)  # fmt: skip


def score_table(rounds: list[Round]) -> str:
    """A row for each round; columns that nobody has measured are left out."""
    known = [column for column in COLUMNS if any(column[2](one) is not None for one in rounds)]
    heads = ["#step", *(f'#<abbr title="{text(about)}">{name}</abbr>' for name, about, _, _ in known), "#failed"]
    rows = (
        [f"{one.step:,}", *(_shown(column, one) for column in known), f"{one.failed:,}" if one.failed else ""]
        for one in rounds
    )
    if not any(one.failed for one in rounds):
        heads, rows = heads[:-1], (row[:-1] for row in rows)
    return table(heads, rows, "scores of the generated speech by step") if known or rounds else ""


def _shown(column: Column, one: Round) -> str:
    _, _, value, unit = column
    found = value(one)
    if column[0] == "pitch" and found is not None:
        low, high = one.mean("pitch_low_hz"), one.mean("pitch_high_hz")
        spread = f" <small>{low:.0f}–{high:.0f}</small>" if low is not None and high is not None else ""
        return f"{found:.0f} Hz{spread}"
    if unit == "share" or found is None:
        return number(found, unit)
    return f"{found:.2f} {unit}".rstrip() if unit != "dB" else f"{found:.1f} dB"
