"""All formats by name, the format of given data, and its rows."""

from collections.abc import Iterator
from pathlib import Path

from engine.data.conversation import Conversation, Row
from engine.data.formats import chatml, chatml_parquet, ljspeech, manifest, metadata_json, ms_swift, wav_txt
from engine.data.formats.format import Format
from engine.data.formats.json_rows import no_rows
from engine.errors import ConfigError, DataError

MODULES = (chatml, chatml_parquet, ms_swift, manifest, metadata_json, wav_txt, ljspeech)
FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in MODULES}
FORMAT_NAMES: tuple[str, ...] = tuple(FORMATS)


def detect(path: str | Path) -> str:
    """The name of the format that a file or folder is in, told from its name and beginning.

    Raises:
        DataError: there is no such file, its beginning is damaged, or it fits no format or more than one.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such data file → check train_data_file / eval_data_file.")
    fitting = [name for name, candidate in FORMATS.items() if candidate.detects(path)]
    if len(fitting) > 1:
        raise DataError(f"{path}: may be {' or '.join(fitting)} → say which with --format NAME.")
    if not fitting:
        raise DataError(
            f"{path}: its format cannot be told → bring it into one of these, or if it is one, say so with "
            "--format NAME:",
            [f"{name}: {candidate.summary}" for name, candidate in FORMATS.items()],
        )
    return fitting[0]


def read_rows(path: str | Path, format: str = "auto") -> Iterator[Row]:
    """The rows of a data file or folder, one at a time; what is wrong with a row comes with it.

    Raises:
        DataError: the data as a whole cannot be read (missing, damaged, no text, no rows), or its format not told.
        ConfigError: there is no such format.
    """
    path = Path(path)
    count = 0
    for row in named(detect(path) if format == "auto" else format).read(path):
        count += 1
        yield row
    if not count:
        raise no_rows(path)


def named(format: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: there is none.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: {format!r} is none of {', '.join(FORMAT_NAMES)} → choose one.")
    return FORMATS[format]


def read_conversations(path: str | Path, format: str = "auto") -> list[Conversation]:
    """All rows of a data file or folder, in its order, in memory.

    Raises:
        DataError: as `read_rows`, and for rows with problems, all of them listed.
    """
    conversations, problems = [], []
    for row in read_rows(path, format):
        problems += [f"row {row.number}: {problem}" for problem in row.problems]
        conversations.append(row.conversation)
    if problems:
        raise DataError(f"{path}: {len(problems)} mistake(s) in the data:", problems)
    return conversations
