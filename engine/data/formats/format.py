"""What a data format is to the rest of the engine: five answers about it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.data.conversation import Conversation, Row


@dataclass(frozen=True)
class Format:
    """One way to write conversations down.

    Attributes:
        name: what `--format` takes.
        summary: one line for `--help`, and for whoever looks for what a file should look like.
        detects: whether data is of this format, from its name and its beginning; DataError if that is damaged.
        read: the rows of a file or folder, one at a time. What is wrong with a row comes in the row, what is wrong
            with the file as DataError.
        write: writes conversations of which `lacks` has nothing to say, one at a time, to a new file or folder.
        lacks: what of a conversation the format cannot hold, in a few words; None if all can be read back. The
            length that a row gives of a whole recording (a duration without offset) does not count: it can be measured.
        suffixes: of a file to be written, the usual one first; none if the format is a folder with its recordings.
    """

    name: str
    summary: str
    detects: Callable[[Path], bool]
    read: Callable[[Path], Iterator[Row]]
    write: Callable[[Iterable[Conversation], Path], None]
    lacks: Callable[[Conversation], str | None]
    suffixes: tuple[str, ...] = ()
