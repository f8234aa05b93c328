"""What every data format is read into: conversations of text and audio, row by row.

The same fields as the original's Conversation (boson_multimodal/data_types.py), so that everything users have fits,
and every format can be written as ChatML without loss.
"""

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
