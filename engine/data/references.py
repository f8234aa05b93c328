"""References that the data does not have, and samples that are to do without: `pair_references`, `reference_dropout`.

Both are functions of the seed and the row alone, so that a data set is prepared twice in the same way.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

from engine.data.audio import AudioError, Recording
from engine.data.conversation import Audio, Conversation, Message, Row, Text
from engine.data.layouts import LayoutError, Speech, read_speech


class References:
    """The clips of each speaker, from which rows without reference get one.

    Args:
        rows: all rows of the data; those of one round, with a speaker, offer their target as a reference.
        content_key: equal for recordings of equal content; raises AudioError for what cannot be read.
        seed: another seed draws other references.
    """

    def __init__(self, rows: Iterable[Row], content_key: Callable[[Recording], str], seed: int):
        self.seed, self._content_key = seed, content_key
        self._clips: dict[str, list[tuple[int, str, Audio]]] = defaultdict(list)
        for row in rows:
            speech = _single_round(row.conversation)
            if speech is not None and row.conversation.speaker is not None:
                self._clips[row.conversation.speaker].append((row.number, *speech.rounds[0]))

    def pair(self, sample: Conversation) -> tuple[Conversation, str | None]:
        """The sample with a reference, unless it has one, and a warning if there is none to give it.

        The reference is another clip of the same speaker: of another row, of other content than the target, and one
        that can be read, lest a bad recording spoil other rows than its own.
        """
        speech = _single_round(sample)
        if speech is None or speech.references:
            return sample, None
        if sample.speaker is None:
            return sample, "stays without reference: the row names no speaker"
        text, target = speech.rounds[0]
        clips = self._clips[sample.speaker]
        start = int(draw(self.seed, "reference", sample.row) * len(clips))
        for step in range(len(clips)):
            number, reference_text, reference = clips[(start + step) % len(clips)]
            if number != sample.row and self._is_another(reference, target):
                content = (Text(reference_text), reference, Text(text))
                turns = (Message("user", content), Message("assistant", (target,)))
                found = {"task_type": "voice_cloning", "ref_transcript": reference_text, "reference_row": number}
                misc = sample.misc | found
                return replace(sample, messages=turns, start_index=2 * speech.context, misc=misc), None
        return sample, f"stays without reference: there is no other clip of speaker {sample.speaker!r}"

    def _is_another(self, reference: Audio, target: Audio) -> bool:
        key = self._key(reference)
        return key is not None and key != self._key(target)

    def _key(self, audio: Audio) -> str | None:
        try:
            return self._content_key(audio.recording)
        except AudioError:
            return None  # which is told of the row that it belongs to


def keeps_reference(share: float, seed: int, row: int) -> bool:
    """Whether a row is trained with its reference when `share` of all rows is not."""
    return draw(seed, "dropout", row) >= share


def draw(seed: int, purpose: str, row: int) -> float:
    """A number in [0, 1) that depends on its arguments only."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{row}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def _single_round(sample: Conversation | None) -> Speech | None:
    try:
        speech = read_speech(sample, "voice_cloning") if sample is not None else None
    except LayoutError:
        return None  # told when the row is laid out
    return speech if speech is not None and len(speech.rounds) == 1 else None
