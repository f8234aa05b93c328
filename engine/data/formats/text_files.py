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
    read, encoding = 0, "utf-8-sig"
    with _named(path), path.open("rb") as stream:
        for line in stream:
            read += len(line)
            with _decoding(path, read):
                yield line.decode(encoding)
            encoding = "utf-8"


def text_of(path: Path) -> str:
    """All the text of a small file, its line breaks as they are."""
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
