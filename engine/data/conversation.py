"""What every data format is read into: conversations of text and audio, row by row.

The same fields as the original's Conversation (boson_multimodal/data_types.py), so that everything users have fits,
and every format can be written as ChatML without loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.data.audio import Recording

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Audio:
    recording: Recording


@dataclass(frozen=True)
class Message:
    role: str
    content: tuple[Text | Audio, ...]
    recipient: str | None = None

    @property
    def texts(self) -> list[str]:
        return [item.text for item in self.content if isinstance(item, Text)]

    @property
    def audios(self) -> list[Audio]:
        return [item for item in self.content if isinstance(item, Audio)]


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        start_index: messages before it are context and are not trained; None or 0: all assistant messages are.
        speaker: of the target; what splits and `pair_references` go by.
        misc: anything else. Read by layouts: `ref_transcript`, `target_transcript`, `scene`, `task_type`.
        row: of the data file, from 0.
    """

    messages: tuple[Message, ...]
    start_index: int | None = None
    speaker: str | None = None
    misc: dict[str, Any] = field(default_factory=dict)
    row: int = 0

    @property
    def audios(self) -> list[Audio]:
        return [audio for message in self.messages for audio in message.audios]


@dataclass(frozen=True)
class Row:
    """A row of a data file as read: a conversation, or what is wrong with it.

    Attributes:
        number: of the data file, from 0; the same as `conversation.row`.
        conversation: None if there are problems.
        problems: each a line with its remedy, without the row's number (the reader of the report adds it).
    """

    number: int
    conversation: Conversation | None
    problems: tuple[str, ...] = ()


def speech(
    text: str,
    recording: Recording,
    references: Sequence[tuple[str | None, Recording]] = (),
    speaker: str | None = None,
    misc: dict[str, Any] | None = None,
    row: int = 0,
) -> Conversation:
    """The conversation of a row that is no conversation yet: a text, who speaks it, and in whose voice.

    Args:
        text: to speak.
        recording: of the text.
        references: transcript, None if it is not known, and recording of each.
        misc: kept; `task_type` is added to it unless it has one.
    """
    content: list[Text | Audio] = []
    for transcript, reference in references:
        content += [Audio(reference)] if transcript is None else [Text(transcript), Audio(reference)]
    misc = dict(misc or {})
    if misc.get("task_type") is None:
        misc["task_type"] = ("single_speaker", "voice_cloning", "multi_speaker")[min(len(references), 2)]
    return Conversation(
        messages=(Message("user", (*content, Text(text))), Message("assistant", (Audio(recording),))),
        speaker=speaker,
        misc=misc,
        row=row,
    )
