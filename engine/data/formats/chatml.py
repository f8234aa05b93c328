"""ChatML as the original data format defines it, in JSON or JSONL, with codes beside paths and base64::

    {"messages": [{"role": "user", "content": "Hello."},
                  {"role": "assistant", "content": [{"type": "audio", "audio_url": "hello.wav"}]}],
     "start_index": null, "speaker": null, "misc": {}}

`content` is a string, one content item, or a list of both. The same things are refused that the original
schema refuses (boson_multimodal/data_types.py): unknown keys in a message or item, a start_index that is no
integer. Relative `audio_url`s belong to the folder of the data file. Nothing is repaired or skipped.

Every conversation can be written as ChatML without loss, so this is what other formats are converted to.
"""

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.data.audio import Recording
from engine.data.conversation import ROLES, Audio, Conversation, Message, Row, Text
from engine.data.formats import json_rows
from engine.data.formats.format import Format
from engine.data.formats.json_rows import kind
from engine.data.formats.recording_files import path_from
from engine.data.formats.row_check import RowCheck

MESSAGE_KEYS = ("role", "content", "recipient")
TEXT_KEYS = ("type", "text")
CODE_KEYS = ("audio_tokens", "audio_codes")
AUDIO_KEYS = ("type", "audio_url", "raw_audio", "duration", "offset", "row_id", *CODE_KEYS)


def read(path: Path) -> Iterator[Row]:
    """The rows of a JSON or JSONL file; see `json_rows.read_rows` for what they may be wrapped in."""
    for number, row in enumerate(json_rows.read_rows(path)):
        yield read_row(number, row, path.parent)


def read_row(number: int, row: Any, folder: Path) -> Row:
    """One row; relative paths belong to `folder`. A `raw_audio` may also be bytes."""
    check = _ChatMLCheck(folder)
    return check.row(number, check.conversation(row, number))


def write(conversations: Iterable[Conversation], path: Path) -> None:
    json_rows.write_rows((to_row(conversation, path.parent) for conversation in conversations), path)


def to_row(conversation: Conversation, folder: Path) -> dict:
    """The row that reads as this conversation, from a file in `folder`."""
    return {
        "messages": [_message(message, folder) for message in conversation.messages],
        "start_index": conversation.start_index,
        "speaker": conversation.speaker,
        "misc": conversation.misc,
    }


def detects(path: Path) -> bool:
    row = json_rows.first_row(path)
    return isinstance(row, dict) and "messages" in row and not has_placeholders(row)


def has_placeholders(row: dict) -> bool:
    """Whether audio stands beside the messages, as ms-swift has it, and not in them."""
    messages = row["messages"] if isinstance(row["messages"], list) else []
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return "audios" in row or any(isinstance(text, str) and "<audio>" in text for text in contents)


FORMAT = Format(
    name="chatml",
    summary='JSON list or JSONL of {"messages": [{"role", "content": [text and audio items]}], …}',
    detects=detects,
    read=read,
    write=write,
    lacks=lambda conversation: None,
    suffixes=(".json", ".jsonl"),
)


class _ChatMLCheck(RowCheck):
    """A row on its way to a conversation."""

    def conversation(self, row: Any, number: int) -> Conversation | None:
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
            self.problem("no list of messages → a sample is an object with a non-empty list 'messages'")
            return None
        if "audios" in row:
            self.problem("has 'audios' beside its messages, as ms-swift's data has → read it with --format ms_swift")
        return Conversation(
            messages=tuple(self.message(m, f"message {i}") for i, m in enumerate(row["messages"])),
            start_index=self.typed(row.get("start_index"), (int,), "start_index", "an integer"),
            speaker=self.string(row.get("speaker"), "speaker"),
            misc=self.typed(row.get("misc"), (dict,), "misc", "an object") or {},
            row=number,
        )

    def message(self, message: Any, where: str) -> Message:
        if not isinstance(message, dict):
            self.problem(f"{where} is {kind(message)} → must be an object with role and content")
            return Message("user", ())
        self.known_keys(message, MESSAGE_KEYS, where)
        role = message.get("role")
        if role not in ROLES:
            self.problem(f"{where}: role {role!r} → must be system, user or assistant")
        recipient = self.string(message.get("recipient"), f"{where}: recipient")
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
            self.problem(f"{where}: content is {kind(item)} → must be text, an item, or a list of them")
            return None
        is_audio = any(key in item for key in ("audio_url", *CODE_KEYS))
        item_type = item.get("type", "audio" if is_audio else "text" if "text" in item else None)
        if item_type == "text":
            self.known_keys(item, TEXT_KEYS, where)
            if not isinstance(item.get("text"), str):
                self.problem(f"{where}: a text item needs a string 'text'")
                return None
            return Text(item["text"])
        if item_type == "audio":
            self.known_keys(item, AUDIO_KEYS, where)
            recording = self.recording(item, where)
            return None if recording is None else Audio(recording)
        self.problem(f"{where}: type {item_type!r} → must be text or audio")
        return None

    def recording(self, item: dict, where: str) -> Recording | None:
        segment = {key: self.seconds(item.get(key), f"{where}: {key}") for key in ("offset", "duration")}
        url = self.string(item.get("audio_url"), f"{where}: audio_url", "a path")
        raw = self.typed(item.get("raw_audio"), (str, bytes), f"{where}: raw_audio", "base64 text")
        key = self.one_of(item, CODE_KEYS)
        if item.get(key) is not None:
            if url or raw:
                self.problem(f"{where} gives {key} beside audio_url or raw_audio → keep one")
            if segment["offset"] is not None:
                self.problem(f"{where} gives an offset into {key} → give the codes of the segment alone")
            return self.codes(item[key], f"{where}: {key}", segment["duration"])
        if url:
            return self.file(url, f"{where}: audio_url", **segment)
        if raw:
            return self.embedded(raw, f"{where}: raw_audio", **segment)
        self.problem(f"{where}: neither audio_url nor raw_audio → name the recording")
        return None


def _message(message: Message, folder: Path) -> dict:
    content = [
        {"type": "text", "text": item.text} if isinstance(item, Text) else _audio(item.recording, folder)
        for item in message.content
    ]
    recipient = {} if message.recipient is None else {"recipient": message.recipient}
    return {"role": message.role, "content": content, **recipient}


def _audio(recording: Recording, folder: Path) -> dict:
    if recording.path is not None:
        source = {"audio_url": path_from(folder, recording)}
    elif recording.data is not None:
        source = {"raw_audio": base64.b64encode(recording.data).decode()}
    else:
        source = {CODE_KEYS[0]: recording.code_array.tolist()}
    segment = {key: getattr(recording, key) for key in ("offset", "duration")}
    return {"type": "audio", **source, **{key: value for key, value in segment.items() if value is not None}}
