"""ms-swift's JSONL: text messages with `<audio>` where a recording belongs, and the recordings in order beside them::

    {"messages": [{"role": "user", "content": "Say it as here: <audio> Good morning."},
                  {"role": "assistant", "content": "<audio>"}],
     "audios": ["reference.wav", "target.wav"]}

Each `<audio>` becomes an audio item between the texts around it, which are kept to the letter. Relative paths belong to
the folder of the data file. `start_index` and `speaker` of the row are those of ChatML; what else the row has goes to
misc.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.data.audio import Recording
from engine.data.conversation import ROLES, Audio, Conversation, Message, Row, Text
from engine.data.formats import json_rows
from engine.data.formats.chatml import has_placeholders
from engine.data.formats.format import Format
from engine.data.formats.json_rows import kind
from engine.data.formats.recording_files import path_from
from engine.data.formats.row_check import RowCheck
from engine.data.formats.spoken import plain

PLACEHOLDER = "<audio>"
ROW_KEYS = ("messages", "audios", "start_index", "speaker")
MESSAGE_KEYS = ("role", "content")


def read(path: Path) -> Iterator[Row]:
    for number, row in enumerate(json_rows.read_rows(path)):
        check = _SwiftCheck(path.parent)
        yield check.row(number, check.conversation(row, number))


def write(conversations: Iterable[Conversation], path: Path) -> None:
    json_rows.write_rows((_row(conversation, path.parent) for conversation in conversations), path)


def lacks(conversation: Conversation) -> str | None:
    losses = []
    if any(message.recipient is not None for message in conversation.messages):
        losses.append("a recipient")
    if any(_split(_joined(message)) != _outline(message) for message in conversation.messages):
        losses.append("where one text ends and the next begins, or an <audio> that is meant as text")
    losses += [f"misc.{key}" for key in conversation.misc if key in ROW_KEYS]
    recordings = [plain(audio.recording) for audio in conversation.audios]
    if any(recording != Recording(path=recording.path) for recording in recordings if recording.path is not None):
        losses.append("a segment of a recording")
    if any(recording.path is None for recording in recordings):
        losses.append("embedded audio, or codes in place of audio")
    return ", ".join(losses) or None


def detects(path: Path) -> bool:
    row = json_rows.first_row(path)
    return isinstance(row, dict) and "messages" in row and has_placeholders(row)


FORMAT = Format(
    name="ms_swift",
    summary='JSONL of {"messages": [{"role", "content": "text with <audio>"}], "audios": [paths]}',
    detects=detects,
    read=read,
    write=write,
    lacks=lacks,
    suffixes=(".jsonl", ".json"),
)


class _SwiftCheck(RowCheck):
    def conversation(self, row: Any, number: int) -> Conversation | None:
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
            self.problem("no list of messages → a row is an object with a non-empty list 'messages'")
            return None
        recordings = self.recordings(row.get("audios"))
        contents = [self.content(message, f"message {i}") for i, message in enumerate(row["messages"])]
        wanted = sum(pieces.count(None) for _, pieces in contents)
        if recordings is not None and wanted != len(recordings):
            self.problem(f"{wanted} {PLACEHOLDER} in the messages, {len(recordings)} audios → give one path for each")
        start_index = self.typed(row.get("start_index"), (int,), "start_index", "an integer")
        speaker = self.string(row.get("speaker"), "speaker")
        if self.problems:
            return None
        following = iter(recordings)
        messages = tuple(
            Message(role, tuple(Audio(next(following)) if piece is None else Text(piece) for piece in pieces))
            for role, pieces in contents
        )
        misc = {key: value for key, value in row.items() if key not in ROW_KEYS}
        return Conversation(messages, start_index, speaker, misc, number)

    def recordings(self, audios: Any) -> list[Recording | None] | None:
        """The recordings in order, None for one that is no path; None if there is no list of them."""
        if audios is None:
            return []
        if not isinstance(audios, list):
            self.problem(f"audios is {kind(audios)} → must be a list of paths")
            return None
        found = []
        for number, name in enumerate(audios):
            if not name:
                self.problem(f"audio {number} is {kind(name)} without a path → name the recording")
            found.append(self.file(name, f"audio {number}"))
        return found

    def content(self, message: Any, where: str) -> tuple[str, list[str | None]]:
        """Role and pieces of a message, None for each audio."""
        if not isinstance(message, dict):
            self.problem(f"{where} is {kind(message)} → must be an object with role and content")
            return "user", []
        self.known_keys(message, MESSAGE_KEYS, where)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            self.problem(f"{where}: role {role!r} → must be system, user or assistant")
        if not isinstance(content, str):
            self.problem(f"{where}: content is {kind(content)} → must be text, with {PLACEHOLDER} for each recording")
            return "user", []
        return str(role), _split(content)


def _split(content: str) -> list[str | None]:
    """The texts of a content and None for each placeholder, in order; no text is empty."""
    pieces: list[str | None] = []
    for number, text in enumerate(content.split(PLACEHOLDER)):
        pieces += ([None] if number else []) + ([text] if text else [])
    return pieces


def _outline(message: Message) -> list[str | None]:
    return [item.text if isinstance(item, Text) else None for item in message.content]


def _joined(message: Message) -> str:
    return "".join(PLACEHOLDER if text is None else text for text in _outline(message))


def _row(conversation: Conversation, folder: Path) -> dict:
    given = {"start_index": conversation.start_index, "speaker": conversation.speaker}
    return {
        "messages": [{"role": message.role, "content": _joined(message)} for message in conversation.messages],
        "audios": [path_from(folder, audio.recording) for audio in conversation.audios],
        **{key: value for key, value in given.items() if value is not None},
        **conversation.misc,
    }
