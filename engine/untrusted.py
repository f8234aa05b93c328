"""What is taken from files that anybody may have written: JSON, and the names of files beside them.

Checkpoints, models and prepared stores are handed around. Whatever such a file says, reading it gives plain values or a
ValueError of one line, takes memory in proportion to its size, and leads to no file outside of its own folder. Symbolic
links within a folder are followed: its owner made them, and Hugging Face's cache of models consists of them. Recordings
are no such files: data name them wherever they lie, and they are only read.
"""

import json
import re
from pathlib import Path, PurePath
from typing import Any

MOST_BYTES = 64 << 20
"""Of a JSON file. The largest that are written, a tokenizer or a manifest of 1,000 processes, have a tenth of it."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, not UTF-8, or as `parse_object`.
    """
    with file.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
    return parse_object(content.decode())


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: as `parse_json`; or it is something else.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"holds no object but {type(value).__name__}")
    return value


def parse_json(text: str) -> Any:
    """The JSON value that a text is.

    Raises:
        ValueError: it is not JSON, nested too deeply, or has half of a surrogate pair in it.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no character") from None
    return value


def path_within(name: Any) -> str:
    """A relative path that leads to something below the folder it belongs to.

    Raises:
        ValueError: it leads elsewhere, or is no path.
    """
    parts = PurePath(name).parts if isinstance(name, str) else ()
    is_bad = not parts or PurePath(name).is_absolute() or ".." in parts or "\0" in name
    if is_bad or any(len(part.encode()) > 255 for part in parts):  # no file system has longer names
        raise ValueError(f"{str(name)[:200]!r} is not a path within its folder")
    return name


def name_within(name: Any) -> str:
    """The name of something that lies in a folder itself.

    Raises:
        ValueError: it leads elsewhere, or is no name.
    """
    if path_within(name) != PurePath(name).name:
        raise ValueError(f"{name!r} is not the name of something in its folder")
    return name
