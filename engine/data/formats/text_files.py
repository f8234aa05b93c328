"""Data files as text, a piece at a time: never more of a file in memory than a reader asks for.

A file that is missing, cannot be read or is not UTF-8 (with or without a byte order mark) is a DataError that names
it; no character is replaced.
"""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import DataError

CHUNK_BYTES = 1 << 16
MOST_LINE, MOST_TEXT = 1 << 28, 1 << 20
"""Bytes of a line, which may hold hours of sound in base64, and of a file that holds a transcript."""


def chunks(path: Path, size: int = CHUNK_BYTES) -> Iterator[str]:
    """The text of a file in pieces of about `size` bytes; none of them is empty."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    with _named(path), path.open("rb") as stream:
        while data := stream.read(size):
            read += len(data)
            with _decoding(path, read):
                text = decoder.decode(data)
            if text:
                yield text
        with _decoding(path, read):
            decoder.decode(b"", final=True)


def lines(path: Path) -> Iterator[str]:
    """The lines of a file, each with the line break that ends it."""
    read, encoding, number = 0, "utf-8-sig", 0
    with _named(path), path.open("rb") as stream:
        while line := stream.readline(MOST_LINE + 1):
            read, number = read + len(line), number + 1
            if len(line) > MOST_LINE:
                raise DataError(
                    f"{path}: line {number} has more than {MOST_LINE >> 20} MiB → give long recordings as files."
                )
            with _decoding(path, read):
                yield line.decode(encoding)
            encoding = "utf-8"


def text_of(path: Path) -> str:
    """All the text of a small file, its line breaks as they are.

    Raises:
        DataError: it cannot be read, or is not small.
    """
    with _named(path):
        size = path.stat().st_size
    if size > MOST_TEXT:
        raise DataError(f"{path}: larger than {MOST_TEXT >> 20} MiB, which no transcript is → name the right file.")
    return "".join(chunks(path))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such data file → check train_data_file / eval_data_file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


@contextmanager
def _decoding(path: Path, read: int) -> Iterator[None]:
    """Names the byte of the file at which decoding failed, of which the first `read` bytes were given to it."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = read - len(error.object) + error.start
        raise DataError(f"{path}: not UTF-8 text (byte {byte}) → save the file as UTF-8.") from None
