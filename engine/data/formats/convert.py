"""From one format to another: everything or nothing.

The source is read twice. The first time finds every row that has problems, that the target format would lose something
of, or whose recordings are not there to be copied, before anything is written. The second time writes under a hidden
name, which becomes the target when all of it is there.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from engine.data.conversation import Conversation
from engine.data.formats.format import Format
from engine.data.formats.registry import detect, named, read_rows
from engine.errors import DataError


def convert(source: str | Path, target: str | Path, to: str, format: str = "auto", progress: bool = True) -> int:
    """Writes the data `source` as the new file or folder `target`; gives the number of rows.

    Recordings stay where they are and are named from the target, by relative paths if they lie below its folder. To
    a format that is a folder with its recordings they are copied.

    Args:
        to: name of the target's format.
        format: name of the source's, "auto" to tell it from the data.

    Raises:
        DataError: the target exists or has another suffix than its format has, the source cannot be read, or rows
            have problems or cannot be written in full, all of them listed.
        ConfigError: there is no such format.
    """
    source, target, wanted = Path(source), Path(target), named(to)
    if os.path.lexists(target):
        raise DataError(f"{target}: exists already → give another name, or move it away.")
    if wanted.suffixes and target.suffix.lower() not in wanted.suffixes:
        raise DataError(f"{target}: {to} is a file {' or '.join(wanted.suffixes)} → name it so.")
    format = detect(source) if format == "auto" else named(format).name
    count = _check(source, format, wanted, progress)
    rows = tqdm(read_rows(source, format), "write", count, unit="row", disable=not progress)
    with _published(target) as partial:
        wanted.write(_conversations(source, rows), partial)
    return count


def _check(source: Path, format: str, wanted: Format, progress: bool) -> int:
    """Number of rows, if all of them can be written."""
    count, problems = 0, []
    for row in tqdm(read_rows(source, format), "check", unit="row", disable=not progress):
        count += 1
        found = row.problems or _obstacles(row.conversation, wanted)
        problems += [f"row {row.number}: {problem}" for problem in found]
    if problems:
        raise DataError(f"{source}: {len(problems)} problem(s), nothing is written:", problems)
    return count


def _obstacles(conversation: Conversation, wanted: Format) -> Iterator[str]:
    if loss := wanted.lacks(conversation):
        yield f"{wanted.name} cannot hold {loss} → chatml and chatml_parquet hold everything"
    elif not wanted.suffixes:
        for path in dict.fromkeys(audio.recording.path for audio in conversation.audios):
            if not os.path.isfile(path):
                yield f"{path}: no such file, so it cannot be copied → put it there"


def _conversations(source: Path, rows: Iterator) -> Iterator[Conversation]:
    for row in rows:
        if row.problems:
            raise DataError(f"{source}: row {row.number} has changed while it was converted → run it again.")
        yield row.conversation


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A hidden name beside the target, renamed to it once the block has filled it, else removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target.parent}: cannot be made: {error.strerror}.") from None
    partial = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield partial
        os.rename(partial, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}.") from None
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
