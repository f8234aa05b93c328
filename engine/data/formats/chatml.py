"""ChatML as the original data format defines it: read, check row by row, resolve audio paths.

A file holds one sample or a list of samples::

    {"messages": [{"role": "user", "content": "Hello."},
                  {"role": "assistant", "content": [{"type": "audio", "audio_url": "hello.wav"}]}],
     "start_index": null, "speaker": null, "misc": {}}

`content` is a string, one content item, or a list of both. The same things are refused that the original
schema refuses (boson_multimodal/data_types.py): unknown keys in a message or item, a start_index that is no
integer. Relative `audio_url`s belong to the folder of the data file. Nothing is repaired or skipped.
"""

import base64
import binascii
import difflib
import json
from pathlib import Path
from typing import Any

from engine.data.audio import Recording
from engine.data.conversation import ROLES, Audio, Conversation, Message, Text
from engine.errors import DataError

MESSAGE_KEYS = ("role", "content", "recipient")
TEXT_KEYS = ("type", "text")
AUDIO_KEYS = ("type", "audio_url", "raw_audio", "duration", "offset", "row_id")


def read_chatml(path: str | Path) -> list[Conversation]:
    """All samples of a ChatML JSON file, in file order; `row` counts from 0.

    Raises:
        DataError: the file is missing, is not JSON (line and column are named), holds no sample, or has rows
            that break the format (all of them are listed).
    """
    path = Path(path)
    rows = _load_json(path)
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path}: a ChatML file holds one sample (an object) or a list of samples, not {_kind(rows)}.")
    if not rows:
        raise DataError(f"{path}: the list of samples is empty → nothing to train on.")
    samples, problems = [], []
    for number, row in enumerate(rows):
        parser = _RowParser(number, path.parent)
        sample = parser.sample(row)
        problems += parser.problems
        samples.append(sample)
    if problems:
        raise DataError(f"{path}: {len(problems)} mistake(s) in the data:", problems)
    return samples


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such data file → check train_data_file / eval_data_file.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}) → save the file as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class _RowParser:
    """Checks one row and collects everything that is wrong with it."""

    def __init__(self, number: int, folder: Path):
        self.row, self.folder = number, folder
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(f"row {self.row}: {text}")

    def typed(self, value: Any, kinds: tuple[type, ...], where: str, wanted: str) -> Any:
        """`value` if it is of one of the kinds or null; a boolean never counts as a number."""
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
            return value
        self.problem(f"{where} is {_kind(value)} → must be {wanted} or null")
        return None

    def known_keys(self, item: dict, allowed: tuple[str, ...], where: str) -> None:
        for key in item:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.3)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
                self.problem(f"{where} has an unknown key {key!r} → {hint}")

    def sample(self, row: Any) -> Conversation | None:
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
            self.problem("no list of messages → a sample is an object with a non-empty list 'messages'")
            return None
        messages = tuple(self.message(m, f"message {i}") for i, m in enumerate(row["messages"]))
        return Conversation(
            messages=messages,
            start_index=self.typed(row.get("start_index"), (int,), "start_index", "an integer"),
            speaker=self.typed(row.get("speaker"), (str,), "speaker", "a string"),
            misc=self.typed(row.get("misc"), (dict,), "misc", "an object") or {},
            row=self.row,
        )

    def message(self, message: Any, where: str) -> Message:
        if not isinstance(message, dict):
            self.problem(f"{where} is {_kind(message)} → must be an object with role and content")
            return Message("user", ())
        self.known_keys(message, MESSAGE_KEYS, where)
        role = message.get("role")
        if role not in ROLES:
            self.problem(f"{where}: role {role!r} → must be system, user or assistant")
        recipient = self.typed(message.get("recipient"), (str,), f"{where}: recipient", "a string")
        if recipient and role != "assistant":
            self.problem(f"{where}: only an assistant message can have a recipient")
        content = message.get("content")
        items = content if isinstance(content, list) else [content]
        parsed = [self.item(item, f"{where}, item {i}") for i, item in enumerate(items)]
        return Message(str(role), tuple(item for item in parsed if item is not None), recipient)

    def item(self, item: Any, where: str) -> Text | Audio | None:
        if isinstance(item, str):
            return Text(item)
        if not isinstance(item, dict):
            self.problem(f"{where}: content is {_kind(item)} → must be text, an item, or a list of them")
            return None
        kind = item.get("type", "audio" if "audio_url" in item else "text" if "text" in item else None)
        if kind == "text":
            self.known_keys(item, TEXT_KEYS, where)
            if not isinstance(item.get("text"), str):
                self.problem(f"{where}: a text item needs a string 'text'")
                return None
            return Text(item["text"])
        if kind == "audio":
            self.known_keys(item, AUDIO_KEYS, where)
            return self.audio(item, where)
        self.problem(f"{where}: type {kind!r} → must be text or audio")
        return None

    def audio(self, item: dict, where: str) -> Audio | None:
        numbers = {}
        for key in ("offset", "duration"):
            numbers[key] = self.typed(item.get(key), (int, float), f"{where}: {key}", "a number of seconds")
        url = self.typed(item.get("audio_url"), (str,), f"{where}: audio_url", "a path") or ""
        raw = self.typed(item.get("raw_audio"), (str,), f"{where}: raw_audio", "base64 text") or ""
        if url:
            return Audio(Recording(path=str(self.folder / url), **numbers))
        if not raw:
            self.problem(f"{where}: neither audio_url nor raw_audio → name the recording")
            return None
        try:
            return Audio(Recording(data=base64.b64decode(raw, validate=True), **numbers))
        except binascii.Error as error:
            self.problem(f"{where}: raw_audio is not base64 ({error})")
            return None
