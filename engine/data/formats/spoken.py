"""What the formats made for text to speech can hold: a text, its recording, references, a speaker.

`Spoken.of` is the inverse of `conversation.speech`: a conversation that holds more than these, such as a system message
or text in the assistant's turn, has no such form, and is not cut down to one.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Text, speech


@dataclass(frozen=True)
class Spoken:
    """The arguments of `speech` that made a conversation."""

    text: str
    recording: Recording
    references: tuple[tuple[str | None, Recording], ...]
    speaker: str | None
    misc: dict[str, Any]

    @classmethod
    def of(cls, conversation: Conversation) -> "Spoken | None":
        """None if `speech` could not have made it, whatever its arguments."""
        roles = [message.role for message in conversation.messages]
        if roles != ["user", "assistant"] or conversation.start_index not in (None, 0):
            return None
        user, assistant = conversation.messages
        references, transcript = [], None
        for item in user.content:
            if isinstance(item, Audio):
                references.append((transcript, item.recording))
            transcript = item.text if isinstance(item, Text) else None
        if transcript is None or not assistant.audios:
            return None
        spoken = cls(
            transcript, assistant.audios[0].recording, tuple(references), conversation.speaker, conversation.misc
        )
        return spoken if spoken.conversation().messages == conversation.messages else None

    def conversation(self, row: int = 0) -> Conversation:
        return speech(self.text, self.recording, self.references, self.speaker, self.misc, row)

    @property
    def recordings(self) -> list[Recording]:
        return [self.recording, *(recording for _, recording in self.references)]

    @property
    def has_empty_text(self) -> bool:
        transcripts = [transcript for transcript, _ in self.references if transcript is not None]
        return not all(text.strip() for text in (self.text, *transcripts))

    @property
    def own_misc(self) -> dict[str, Any]:
        """misc without the task type that `speech` gives by itself."""
        default = speech("", self.recording, self.references).misc["task_type"]
        return {key: value for key, value in self.misc.items() if (key, value) != ("task_type", default)}


def lost(
    conversation: Conversation,
    *,
    references: int | None,
    speaker: bool,
    fields: Collection[str] | None,
    reserved: Collection[str] = (),
    segments: bool = False,
    codes: bool = False,
) -> str | None:
    """What of a conversation a format loses, in a few words.

    Args:
        references: how many it can hold, None for any.
        speaker: whether it can hold one.
        fields: of misc that it can hold, None for any except those `reserved` for its own use.
        segments, codes: whether it can hold parts of recordings, and codes in place of audio.
    """
    spoken = Spoken.of(conversation)
    if spoken is None:
        return _more_than_speech(conversation)
    losses = []
    if references is not None and len(spoken.references) > references:
        losses.append(f"{len(spoken.references)} references" if references else "a reference")
    if spoken.speaker is not None and not speaker:
        losses.append("the speaker")
    lost_fields = [key for key in spoken.own_misc if key in reserved or not (fields is None or key in fields)]
    if not isinstance(spoken.misc.get("task_type"), str | None):
        lost_fields.append("task_type")
    losses += [f"misc.{key}" for key in dict.fromkeys(lost_fields)]
    if any(recording.data is not None for recording in spoken.recordings):
        losses.append("embedded audio")
    if not codes and any(recording.codes is not None for recording in spoken.recordings):
        losses.append("codes in place of audio")
    if not segments and any(recording.offset is not None for recording in spoken.recordings):
        losses.append("a segment of a recording")
    return ", ".join(losses) or None


def _more_than_speech(conversation: Conversation) -> str:
    messages = conversation.messages
    if any(message.role == "system" for message in messages):
        return "a system message"
    if conversation.start_index not in (None, 0):
        return "start_index"
    if any(message.recipient is not None for message in messages):
        return "a recipient"
    if [message.role for message in messages] != ["user", "assistant"]:
        return "turns other than one of the user and one of the assistant"
    if messages[1].texts:
        return "text in the assistant's turn"
    return "items other than references, a text to speak and its recording, in that order"


def plain(recording: Recording) -> Recording:
    """The recording without the length that a row gives of the whole of it."""
    return recording if recording.offset is not None else replace(recording, duration=None)
