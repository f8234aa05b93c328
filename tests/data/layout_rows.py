"""Rows that tests of layouts share: of the seed's shape, dialogues, and rows that tag their speakers."""

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Message, Text
from engine.data.layouts import Layout

REQUEST = "Please generate speech for given text in reference audio's voice: "
REFERENCE, SECOND, TARGET, ANSWER = (Audio(Recording(f"{name}.wav")) for name in ("reference", "second", "t", "answer"))
COLON = "Meet me at 10:30 today: bring water"
ROOM = "Audio is recorded from a quiet room."


def seed_row(*texts, misc=None, start_index=None, system="Generate speech in the provided voice."):
    """A conversation of the seed's shape: the texts around the reference, then target text and target audio."""
    content = [Text(text) for text in texts]
    content.insert(1, REFERENCE)
    messages = (
        Message("system", (Text(system),)),
        Message("user", tuple(content)),
        Message("assistant", (Text("what is said"), TARGET)),
    )
    return Conversation(messages[not system :], start_index=start_index, misc=misc or {})


def dialogue(*rounds, references=(), start_index=None, misc=None):
    """Rounds of text and clip; references (transcript or None, clip) in the first user message."""
    messages = []
    for text, audio in rounds:
        messages += [user(text), Message("assistant", (audio,))]
    content = [item for text, clip in references for item in ([Text(text)] if text else []) + [clip]]
    first = Message("user", (*content, *messages[0].content))
    return Conversation((first, *messages[1:]), start_index, misc=misc or {})


def user(*content) -> Message:
    return Message("user", tuple(Text(item) if isinstance(item, str) else item for item in content))


def answer(clip: Audio) -> Message:
    return Message("assistant", (clip,))


ROW = seed_row("Hello there.", REQUEST + COLON)
TWO_VOICES = dialogue(
    ("[SPEAKER0] Hi. [SPEAKER1] Hello.", TARGET), references=(("I am one.", REFERENCE), ("I am two.", SECOND))
)
TAGGED = dialogue(("[SPEAKER0] Hi.\n[SPEAKER1] Hello.", TARGET))
PLAIN = dialogue(("Good day.", TARGET))


def turns(sample, name="auto", **settings) -> list[Message]:
    return list(Layout(name, **settings).apply(sample).messages)
