"""Rows of JSON and JSONL files, one at a time: memory holds one row, however long the file.

A `.jsonl` (or `.ndjson`) file is read line by line. In any other file stand a list of rows, an object with such a
list under "samples", "data" or "items", or one row or more, each from a line of its own. The text is decoded a chunk
at a time by Python's own decoder, so that what is accepted, and what is said of what is not, is what `json.loads` of
the whole file would accept and say, with line and column of the file. Refused beyond that are a key that is twice in
an object, half of a surrogate pair, and rows of more than `MOST_CHARACTERS`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from engine.data.formats import text_files
from engine.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson")
LINE_SUFFIXES = (".jsonl", ".ndjson")
WRAPPERS = ("samples", "data", "items")

BLANK = " \t\n\r"

_BLANK = re.compile(f"[{BLANK}]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_UNSURE = 16  # characters at the end of what was read that may be a literal, number or escape cut in two
MOST_CHARACTERS = 1 << 28
"""Of a row, so that a file of one endless line does not fill the memory: hours of sound in base64."""
TOO_LONG = f"more than {MOST_CHARACTERS:,} characters in a row → give long recordings as files"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are each there once; of two values Python would keep one without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)[:100]!r} is there twice")
    return found


_decode = json.JSONDecoder(object_pairs_hook=_without_repetition).raw_decode


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON or JSONL file, whatever they are; an empty list gives none.

    Raises:
        DataError: the file cannot be read, is not JSON, or is neither an object nor a list.
    """
    return _line_rows(path) if path.suffix.lower() in LINE_SUFFIXES else _Scanner(path, text_files.chunks(path)).rows()


def first_row(path: Path) -> Any:
    """The first row of a file that has the suffix of a JSON file, else None; for telling formats apart.

    Raises:
        DataError: as `read_rows`, for the beginning of the file; or there is no row.
    """
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return None
    for row in read_rows(path):
        return row
    raise no_rows(path)


def no_rows(path: Path) -> DataError:
    return DataError(f"{path}: the list of samples is empty → nothing to train on.")


def write_rows(rows: Iterable[dict], path: Path) -> None:
    """A list with a row on each line, or JSONL where the suffix says so."""
    start, between, end = ("", "\n", "\n") if path.suffix.lower() in LINE_SUFFIXES else ("[\n", ",\n", "\n]\n")
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(start + json.dumps(row, ensure_ascii=False))
            start = between
        file.write(end)


def _line_rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(text_files.lines(path)):
        if line := line.rstrip(BLANK):
            scanner = _Scanner(path, iter([line]), number)
            row = scanner.value()
            if scanner.peek():
                scanner.fail("Extra data")
            yield row


def kind(value: Any) -> str:
    """What a JSON value is called in a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class _Scanner:
    """The part of the text that is read and not yet used up, and where in the file it stands."""

    def __init__(self, path: Path, chunks: Iterator[str], lines: int = 0):
        self.path, self.chunks = path, chunks
        self.buffer, self.at, self.length = "", 0, 0  # length: characters of the last value
        self.lines, self.columns = lines, 0  # that come before the buffer, columns on its first line

    def rows(self) -> Iterator[Any]:
        opening = self.peek()
        if opening == "[":
            yield from self.items()
        elif opening == "{":
            yield from self.object_rows()
            end = self.line
            while self.peek() and self.line > end:
                yield self.value()
                end = self.line
        else:
            found = kind(self.value())
            raise DataError(f"{self.path}: a data file holds one sample (an object) or a list of samples, not {found}.")
        if self.peek():
            self.fail("Extra data")

    def items(self) -> Iterator[Any]:
        """The values of the list that begins here, and the place behind it."""
        self.take("[")
        if self.peek() == "]":
            return self.take("]")
        while True:
            yield self.value()
            if self.peek() == "]":
                return self.take("]")
            self.take(",")

    def object_rows(self) -> Iterator[Any]:
        """The object that begins here as one row, or if it wraps a list of rows, those."""
        whole, wrapper, size = {}, None, 0
        self.take("{")
        while self.peek() != "}":
            if whole or wrapper:
                self.take(",")
            if self.peek() != '"':
                self.fail("Expecting property name enclosed in double quotes")
            key = self.value()
            self.take(":")
            if key in WRAPPERS and "messages" not in whole and wrapper is None and self.peek() == "[":
                wrapper = key
                yield from self.items()
                continue
            if key in whole:
                self.fail(f"the key {key[:100]!r} is there twice")
            whole[key] = self.value()
            size += self.length
            if size > MOST_CHARACTERS:
                self.fail(TOO_LONG)
            if wrapper and (key == "messages" or key in WRAPPERS and isinstance(whole[key], list)):
                raise DataError(
                    f"{self.path}: an object with {wrapper!r} and {key!r}, which both may be the samples → keep one."
                )
        self.take("}")
        if wrapper is None:
            yield whole

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            self.at = _BLANK.match(self.buffer, self.at).end()
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.fill():
                return ""

    def take(self, delimiter: str) -> None:
        if self.peek() != delimiter:
            self.fail(f"Expecting {delimiter!r} delimiter")
        self.at += 1

    def value(self) -> Any:
        """The value that begins here, and the place behind it."""
        self.peek()
        while True:
            try:
                value, end = _decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = len(self.buffer) - error.pos < _UNSURE or error.msg.startswith("Unterminated string")
                if cut and self.fill():
                    continue
                self.fail(error.msg, error.pos)
            except RecursionError:
                self.fail("nested too deeply")
            except ValueError as error:  # an integer of thousands of digits
                self.fail(str(error))
            if len(self.buffer) - end < _UNSURE and self.fill():
                continue
            self._require_whole_characters(value, end)
            self.at, self.length = end, end - self.at
            return value

    def fill(self) -> bool:
        """Reads on, as much again as is waiting, so that the time to read a long value is in proportion to it."""
        before, rest = self.buffer[: self.at], self.buffer[self.at :]
        if len(rest) > MOST_CHARACTERS:
            self.fail(TOO_LONG)
        parts, size = [rest], 0
        while size <= len(rest) and (chunk := next(self.chunks, "")):
            parts.append(chunk)
            size += len(chunk)
        if not size:
            return False
        self.lines, self.columns = self.lines + before.count("\n"), self._column(self.at) - 1
        self.buffer, self.at = "".join(parts), 0
        return True

    @property
    def line(self) -> int:
        return self.line_of(self.at)

    def line_of(self, at: int) -> int:
        return self.lines + self.buffer.count("\n", 0, at) + 1

    def _column(self, at: int) -> int:
        newline = self.buffer.rfind("\n", 0, at)
        return at - newline if newline >= 0 else self.columns + at + 1

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        place = f"line {self.line_of(at)}, column {self._column(at)}"
        raise DataError(f"{self.path}: not valid JSON at {place}: {message}.")

    def _require_whole_characters(self, value: Any, end: int) -> None:
        if _SURROGATE.search(self.buffer, self.at, end):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except RecursionError:
                self.fail("nested too deeply")
            except UnicodeEncodeError:
                self.fail("half of a surrogate pair (\\ud800 to \\udfff) is no character")
