"""The checks that the fields of a row have in common, in every format.

Nothing is repaired: a field is what it should be, is null, or is a problem of the row.
"""

import base64
import difflib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.audio import Recording
from engine.data.conversation import Conversation, Row
from engine.data.formats import text_files
from engine.data.formats.json_rows import kind
from engine.errors import DataError

CODEBOOK_SIZE = 1024
"""Codes of a codebook; in the stream of the model 1024 begins and 1025 ends a clip."""
MOST_EMBEDDED = 96 << 20
"""Bytes of a recording within a row, which is in memory several times over: half an hour as wav, hours as flac."""


class RowCheck:
    """Collects everything that is wrong with one row; relative paths belong to `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []

    def row(self, number: int, conversation: Conversation | None) -> Row:
        return Row(number, None if self.problems else conversation, tuple(self.problems))

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def typed(self, value: Any, kinds: tuple[type, ...], where: str, wanted: str) -> Any:
        """`value` if it is of one of the kinds or null; a boolean never counts as a number."""
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
            return value
        self.problem(f"{where} is {kind(value)} → must be {wanted} or null")
        return None

    def string(self, value: Any, where: str, wanted: str = "a string") -> str | None:
        return self.typed(value, (str,), where, wanted)

    def seconds(self, value: Any, where: str) -> float | None:
        value = self.typed(value, (int, float), where, "a number of seconds")
        if value is not None and not abs(value) <= 1e9:
            self.problem(f"{where} is {value} → must be a number of seconds or null")
            return None
        return value

    def known_keys(self, item: dict, allowed: tuple[str, ...], where: str) -> None:
        for key in item:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.3)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
                self.problem(f"{where} has an unknown key {key!r} → {hint}")

    def one_of(self, row: dict, keys: Iterable[str]) -> str | None:
        """Which of several names for one field the row uses, the first if none."""
        keys = tuple(keys)
        given = [key for key in keys if row.get(key) not in (None, "")]
        if len(given) > 1:
            self.problem(f"gives both {given[0]} and {given[1]} → keep one")
        return given[0] if given else keys[0]

    def file(self, name: Any, where: str, **segment: float | None) -> Recording | None:
        """The recording of that name; None if it is null, empty or no path."""
        name = self.string(name, where, "a path")
        if not name:
            return None
        if "://" in name:
            self.problem(f"{where} is {name}, not a file → download it and give its path")
            return None
        return Recording(path=str(self.folder / name), **segment)

    def text_file(self, name: str, where: str) -> str | None:
        """The text of a file without the blank space around it; None if there is none."""
        path = self.folder / name
        if not path.is_file():
            self.problem(f"{where}: no such file → write down what the recording speaks")
            return None
        try:
            text = text_files.text_of(path).strip()
        except DataError as error:
            self.problem(f"{where}: {error.heading.removeprefix(f'{path}: ')}")
            return None
        if not text:
            self.problem(f"{where}: empty → write down what the recording speaks")
        return text or None

    def embedded(self, data: str | bytes, where: str, **segment: float | None) -> Recording | None:
        """The recording whose file is given whole, as bytes or in base64."""
        size = len(data) if isinstance(data, bytes) else len(data) // 4 * 3
        if size > MOST_EMBEDDED:
            self.problem(
                f"{where} has {size:,} bytes, {MOST_EMBEDDED:,} are allowed within a row → give the recording as a file"
            )
            return None
        try:
            data = data if isinstance(data, bytes) else base64.b64decode(data, validate=True)
        except ValueError as error:
            self.problem(f"{where} is not base64 ({error})")
            return None
        return Recording(data=data, **segment)

    def codes(self, codes: Any, where: str, duration: float | None = None) -> Recording | None:
        """The recording whose codes are given, a list for each codebook."""
        if not isinstance(codes, list) or not codes or not all(isinstance(book, list) for book in codes):
            self.problem(f"{where} is no list of codebooks → give [codebooks][frames], a list of integers a codebook")
            return None
        if not all(type(code) is int for book in codes for code in book):
            self.problem(f"{where} holds something other than integers → give the codec's codes")
            return None
        for number, book in enumerate(codes):
            if len(book) != len(codes[0]):
                self.problem(
                    f"{where}: codebook {number} has {len(book)} codes, codebook 0 has {len(codes[0])} → give one code "
                    "a frame in each"
                )
                return None
        if not codes[0]:
            self.problem(f"{where} has no frames → leave the recording out, or give its codes")
            return None
        for code in (min(map(min, codes)), max(map(max, codes))):
            if not 0 <= code < CODEBOOK_SIZE:
                self.problem(
                    f"{where} holds {code} → give the codec's own codes, 0 to {CODEBOOK_SIZE - 1}, without BOS, EOS "
                    "and delay"
                )
                return None
        return replace(Recording.of_codes(np.array(codes, np.int16)), duration=duration)
