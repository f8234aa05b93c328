"""ChatML in Parquet: a column `messages`, and if they are there `start_index`, `speaker` and `misc`.

`messages` is a list of structs with the keys of ChatML, or the same as JSON text, and `misc` a struct or JSON text. A
null counts as left out, for every struct of a column has all its fields. `raw_audio` may be bytes; in its place an
audio item may have an `audio` struct of `bytes` and `path`, as Hugging Face's data sets do. Relative paths belong to
the folder of the file. Files are read a few rows at a time.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from engine.data.conversation import Audio, Conversation, Message, Row, Text
from engine.data.formats import chatml
from engine.data.formats.format import Format
from engine.data.formats.recording_files import path_from
from engine.errors import DataError
from engine.untrusted import parse_json

COLUMNS = ("messages", "start_index", "speaker", "misc")
READ_ROWS = 16  # held as Python objects at a time; each may have minutes of embedded audio
WRITE_ROWS = 256  # of a row group


def read(path: Path) -> Iterator[Row]:
    pyarrow, parquet = _pyarrow()
    try:
        file = parquet.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such data file → check train_data_file / eval_data_file.") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file, or damaged: {_line(error)}.") from None
    with file:
        columns = [name for name in file.schema_arrow.names if name in COLUMNS]
        if "messages" not in columns:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path}: no column 'messages', only {names} → ChatML in Parquet needs one.")
        number = 0
        try:
            for batch in file.iter_batches(READ_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield _row(number, row, path.parent)
                    number += 1
        except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:  # values that Python has not
            raise DataError(f"{path}: damaged after row {number}: {_line(error)}.") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _row(number: int, row: dict, folder: Path) -> Row:
    problems = []
    for name in ("messages", "misc"):
        if isinstance(row.get(name), str):
            try:
                row[name] = parse_json(row[name])
            except ValueError as error:
                problems.append(f"{name} is not valid JSON: {error} → must be JSON text or structs")
        elif isinstance(row.get(name), dict):
            row[name] = _given(row[name])
    try:
        json.dumps(row.get("misc"), ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        problems.append(f"misc holds what JSON cannot: {error}")
    if problems:
        return Row(number, None, tuple(problems))
    if isinstance(row["messages"], list):
        row["messages"] = [_message(message) for message in row["messages"]]
    return chatml.read_row(number, row, folder)


def _given(struct: dict) -> dict:
    return {key: value for key, value in struct.items() if value is not None}


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    message = _given(message)
    if isinstance(message.get("content"), list):
        message["content"] = [_item(item) if isinstance(item, dict) else item for item in message["content"]]
    elif isinstance(message.get("content"), dict):
        message["content"] = _item(message["content"])
    return message


def _item(item: dict) -> dict:
    item = _given(item)
    if isinstance(item.get("audio"), dict):
        audio = item.pop("audio")
        # its path is but the name that the bytes once had
        key, value = ("raw_audio", "bytes") if audio.get("bytes") is not None else ("audio_url", "path")
        item = {"type": "audio", key: audio.get(value)} | item
    return item


def write(conversations: Iterable[Conversation], path: Path) -> None:
    """A file with the columns of `schema`."""
    pyarrow, parquet = _pyarrow()
    columns = schema()
    rows = (_to_row(conversation, path.parent) for conversation in conversations)
    with parquet.ParquetWriter(path, columns) as writer:
        while group := list(islice(rows, WRITE_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=columns))


def schema():
    """The columns that are written, a pyarrow.Schema."""
    pa, _ = _pyarrow()
    seconds = {"offset": pa.float64(), "duration": pa.float64()}
    source = {"audio_url": pa.string(), "raw_audio": pa.binary(), "audio_tokens": pa.list_(pa.list_(pa.int16()))}
    item = pa.struct({"type": pa.string(), "text": pa.string(), **source, **seconds})
    message = pa.struct({"role": pa.string(), "recipient": pa.string(), "content": pa.list_(item)})
    columns = {"messages": pa.list_(message), "start_index": pa.int64(), "speaker": pa.string(), "misc": pa.string()}
    return pa.schema(columns)


def _to_row(conversation: Conversation, folder: Path) -> dict:
    return {
        "messages": [_to_message(message, folder) for message in conversation.messages],
        "start_index": conversation.start_index,
        "speaker": conversation.speaker,
        "misc": json.dumps(conversation.misc, ensure_ascii=False),
    }


def _to_message(message: Message, folder: Path) -> dict:
    content = [
        {"type": "text", "text": item.text} if isinstance(item, Text) else _to_item(item, folder)
        for item in message.content
    ]
    return {"role": message.role, "recipient": message.recipient, "content": content}


def _to_item(item: Audio, folder: Path) -> dict:
    recording = item.recording
    return {
        "type": "audio",
        "audio_url": None if recording.path is None else path_from(folder, recording),
        "raw_audio": recording.data,
        "audio_tokens": None if recording.codes is None else recording.code_array.tolist(),
        "offset": recording.offset,
        "duration": recording.duration,
    }


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("Parquet files need pyarrow → pip install 'higgs-engine[parquet]'.") from None
    return pyarrow, pyarrow.parquet


FORMAT = Format(
    name="chatml_parquet",
    summary="Parquet with the fields of ChatML as columns, messages as structs or JSON text",
    detects=lambda path: path.suffix.lower() == ".parquet" and path.is_file(),
    read=read,
    write=write,
    lacks=lambda conversation: None,
    suffixes=(".parquet",),
)
