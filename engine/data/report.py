"""The data report: what was accepted, what was rejected and why, row by row, and what the accepted rows amount to.

    rows.jsonl     every row, as it was added
    report.json    counts, kinds of reasons, quantiles and histograms, speakers, all rejected rows, the settings
    report.html    the same to look at, one self-contained file

The three appear together, at the end: a check that fails on its way leaves an earlier report as it was.

An accepted row costs four numbers of memory (and each speaker its name once), for there may be millions of them;
whatever is listed of accepted rows is listed up to a limit and counted beyond. Quantiles, hours and speakers are of
accepted rows, which is what training will see.
"""

import json
import os
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.distribution import describe
from engine.data.report_kinds import Kinds
from engine.data.report_page import page
from engine.errors import DataError

ROWS, SUMMARY, PAGE = "rows.jsonl", "report.json", "report.html"
QUANTITIES = ("seconds", "characters_per_second", "tokens", "clips_per_speaker")
MAX_LISTED, MAX_SPEAKERS, MAX_TEXTS, EXAMPLES = 1000, 100, 50, 3


@dataclass(frozen=True, slots=True)
class RowReport:
    """What is known of a row.

    Attributes:
        row: of the data file, from 0.
        problems: why the row is rejected, each a line with its remedy; empty: it is accepted.
        warnings: what is suspicious but accepted.
        text: to speak, as it is trained.
        written_text: as it stood in the data, if normalisation changed it.
        seconds: of the target audio; None: there is none, or it cannot be read.
        reference_seconds: of the reference audio.
        tokens: length of the packed sample; None: not known without the tokenizer.
    """

    row: int
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    speaker: str | None = None
    text: str = ""
    written_text: str | None = None
    seconds: float | None = None
    reference_seconds: float | None = None
    tokens: int | None = None

    @property
    def accepted(self) -> bool:
        return not self.problems

    @property
    def characters_per_second(self) -> float | None:
        return len(self.text) / self.seconds if self.text and self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name; dataclasses.asdict copies deeply, which takes ten times as long."""
        return {name: getattr(self, name) for name in self.__slots__}

    def lines(self, of: tuple[str, ...]) -> list[str]:
        """Problems or warnings with the number of the row in front, once."""
        prefix = f"row {self.row}: "
        return [prefix + line.removeprefix(prefix) for line in of]


class DataReport:
    """Collects rows and writes the report when the block ends without an exception, or at `finish`.

    Args:
        source: the data file or folder, as users know it.
        folder: where the report goes; None: nothing is written.
        max_bad_fraction: share of rejected rows up to which the data may be used.
        settings: what the rows were judged by.

    Raises:
        DataError: the folder cannot be written to.
    """

    def __init__(
        self,
        source: str,
        folder: Path | None,
        *,
        max_bad_fraction: float = 0.0,
        settings: dict[str, Any] | None = None,
    ):
        self.source, self.folder = source, folder
        self.max_bad_fraction, self.settings = max_bad_fraction, settings or {}
        self.rows = 0
        self._rejected: list[RowReport] = []
        self._warned: list[RowReport] = []
        self._warned_rows = self._changed_texts = self._without_speaker = 0
        self._texts: list[RowReport] = []
        self._reasons, self._warnings, self._speakers = Kinds(), Kinds(), Counter()
        self._seconds, self._reference_seconds = array("d"), array("d")
        self._characters_per_second, self._tokens = array("d"), array("q")
        self._stream = None if folder is None else self._open()

    def _open(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return _draft(self.folder / ROWS).open("w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def __enter__(self) -> "DataReport":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.finish()
        elif self._stream is not None:
            self._stream.close()
            _draft(self.folder / ROWS).unlink(missing_ok=True)

    def add(self, row: RowReport) -> None:
        self.rows += 1
        if self._stream is not None:
            try:
                self._stream.write(_json(row.as_dict()) + "\n")
            except OSError as error:
                raise _unwritable(self.folder, error) from None
        if row.accepted:
            self._accept(row)
        else:
            self._rejected.append(row)
            self._reasons.add(row.lines(row.problems))

    def _accept(self, row: RowReport) -> None:
        for numbers, value in (
            (self._seconds, row.seconds),
            (self._reference_seconds, row.reference_seconds),
            (self._characters_per_second, row.characters_per_second),
            (self._tokens, row.tokens),
        ):
            if value is not None:
                numbers.append(value)
        if row.speaker is None:
            self._without_speaker += 1
        else:
            self._speakers[row.speaker] += 1
        if row.warnings:
            self._warned_rows += 1
            self._warnings.add(row.lines(row.warnings))
            if len(self._warned) < MAX_LISTED:
                self._warned.append(row)
        if row.written_text is not None:
            self._changed_texts += 1
            if len(self._texts) < MAX_TEXTS:
                self._texts.append(row)

    @property
    def rejected(self) -> int:
        return len(self._rejected)

    @property
    def accepted(self) -> int:
        return self.rows - self.rejected

    @property
    def bad_fraction(self) -> float:
        return self.rejected / self.rows if self.rows else 0.0

    @property
    def passed(self) -> bool:
        """Whether the data may be used: it has rows, and no more of them are bad than allowed."""
        return self.rows > 0 and self.bad_fraction <= self.max_bad_fraction

    def verdict(self) -> str:
        """One sentence, with the remedy if the data is refused."""
        if not self.rows:
            return "there are no rows → nothing to train on"
        if not self.rejected:
            return f"all {self.rows:,} rows accepted"
        share = f"{self.rejected:,} of {self.rows:,} rows rejected ({self.bad_fraction:.2%})"
        if self.passed:
            return f"{share}, within max_bad_fraction = {self.max_bad_fraction:g}: they are left out"
        return f"{share}, more than max_bad_fraction = {self.max_bad_fraction:g} → mend them, or raise max_bad_fraction"

    def rejected_lines(self) -> list[str]:
        """ "row N: problem", for each problem of each rejected row."""
        return [line for row in self._rejected for line in row.lines(row.problems)]

    def summary(self) -> dict[str, Any]:
        """What report.json holds."""
        clips = np.array(list(self._speakers.values()), np.int64)
        numbers = (np.array(self._seconds), np.array(self._characters_per_second), np.array(self._tokens), clips)
        most = self._speakers.most_common(MAX_SPEAKERS)
        return {
            "source": self.source,
            "verdict": self.verdict(),
            "passed": self.passed,
            "rows": self.rows,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "bad_fraction": self.bad_fraction,
            "max_bad_fraction": self.max_bad_fraction,
            "hours": sum(self._seconds) / 3600,
            "reference_hours": sum(self._reference_seconds) / 3600,
            "tokens": sum(self._tokens),
            "quantities": {name: describe(values) for name, values in zip(QUANTITIES, numbers, strict=True)},
            "speakers": {
                "total": len(self._speakers),
                "rows_without": self._without_speaker,
                "most_clips": [{"speaker": name, "clips": count} for name, count in most],
                "not_listed": len(self._speakers) - len(most),
            },
            "reasons": self._reasons.listed(),
            "warnings": self._warnings.listed(),
            "rejected_rows": [row.as_dict() for row in self._rejected],
            "rows_with_warnings": {"total": self._warned_rows, "listed": [row.as_dict() for row in self._warned]},
            "changed_texts": {
                "total": self._changed_texts,
                "listed": [{"row": r.row, "written": r.written_text, "trained": r.text} for r in self._texts],
            },
            "settings": self.settings,
        }

    def finish(self) -> None:
        """Writes the report.

        Raises:
            DataError: the folder cannot be written to.
        """
        if self._stream is None:
            return
        summary = self.summary()
        contents = {SUMMARY: _json(summary, indent=1) + "\n", PAGE: page(summary)}
        try:
            self._stream.close()
            for name, text in contents.items():
                _draft(self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            for name in (ROWS, *contents):
                os.replace(_draft(self.folder / name), self.folder / name)
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        summary = self.summary()
        speakers, hours = summary["speakers"], f"{summary['hours']:.2f} h of targets"
        if self._reference_seconds:
            hours += f", {summary['reference_hours']:.2f} h of references"
        lines = [f"{self.source}: {self.verdict()}", f"  audio     {hours}"]
        without = f" ({self._without_speaker:,} rows without)" if self._without_speaker else ""
        lines.append(f"  speakers  {speakers['total']:,}{without}")
        lines += _quantile_lines(summary["quantities"])
        lines += _kind_lines(f"rejected: {self.rejected:,} rows", summary["reasons"])
        lines += _kind_lines(f"warnings: {self._warned_rows:,} accepted rows", summary["warnings"])
        if self._changed_texts:
            lines.append(f"  texts changed by normalisation: {self._changed_texts:,} rows, for example")
            lines += [f"    row {r.row}: {_short(r.written_text)} → {_short(r.text)}" for r in self._texts[:EXAMPLES]]
        if self.folder is not None:
            lines.append(f"  report    {self.folder / PAGE}")
        return lines


def _quantile_lines(quantities: dict[str, dict]) -> list[str]:
    names = ("min", "p5", "median", "p95", "max")
    lines = ["  " + " " * 22 + "".join(f"{name:>10}" for name in names)]
    for name, found in quantities.items():
        if found["count"]:
            lines.append(f"  {name.replace('_', ' '):22}" + "".join(f"{found[n]:>10,.1f}" for n in names))
    return lines if len(lines) > 1 else []


def _kind_lines(heading: str, kinds: list[dict], shown: int = 10) -> list[str]:
    if not kinds:
        return []
    lines = [f"  {heading}"]
    for kind in kinds[:shown]:
        lines += [f"  {kind['rows']:>8,}  {kind['kind']}", f"            {kind['examples'][0]}"]
    return lines + ([f"            … and {len(kinds) - shown} more kinds"] if len(kinds) > shown else [])


def _short(text: str, limit: int = 60) -> str:
    return json.dumps(text if len(text) <= limit else text[: limit - 1] + "…", ensure_ascii=False)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _draft(file: Path) -> Path:
    return file.with_name(f".{file.name}.draft")


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder}: the data report cannot be written: {error.strerror} → choose another folder.")
