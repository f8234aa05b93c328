"""Problems by kind: "a.wav: no such file" and "b.wav: no such file" are one, met twice."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

MAX_KINDS = 200
"""Kinds told apart; more are counted as `OTHER`, for wordings that defy grouping must not fill memory."""

OTHER = "other"
EXAMPLES = 3

_QUOTED = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*"|“[^”]*”)(?!\w)""")
_FILE = re.compile(r"(?<!\S)\.{0,2}[/\\]\S*|(?<!\S)\S+\.[A-Za-z]\w{1,4}\b")
_NUMBER = re.compile(r"(?<![A-Za-z_])[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


def kind_of(line: str) -> str:
    """A problem without what tells one row from another: names of files, quotations, numbers, and the remedy."""
    *places, what = _QUOTED.sub("'…'", line.partition(" → ")[0]).split(": ")
    places = [p for p in places if not (p.startswith("row ") or "/" in p or "\\" in p or _FILE.search(p))]
    return _NUMBER.sub("N", _FILE.sub("…", ": ".join([*places, what]))).strip()


class Kinds:
    """Counts rows by the kind of their lines and keeps the first few lines of each kind."""

    def __init__(self):
        self._rows: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, lines: Iterable[str]) -> None:
        """The lines of one row, which counts once for a kind."""
        found: dict[str, str] = {}
        for line in lines:
            kind = kind_of(line)
            found.setdefault(kind if kind in self._rows or len(self._rows) < MAX_KINDS else OTHER, line)
        for kind, line in found.items():
            self._rows[kind] += 1
            examples = self._examples.setdefault(kind, [])
            if len(examples) < EXAMPLES:
                examples.append(line)

    def listed(self) -> list[dict[str, Any]]:
        """Most frequent first."""
        return [{"kind": kind, "rows": n, "examples": self._examples[kind]} for kind, n in self._rows.most_common()]
