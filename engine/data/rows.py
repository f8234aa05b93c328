"""From rows as read to conversations as trained, and everything that can be wrong with them.

`laid_out` needs no audio: it pairs, drops and lays out. `RowCheck` then judges a row by what was measured on its
recordings. `prepare` and `validate` share both, so what one reports is what the other does.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from engine.config import Settings
from engine.data.audio import Recording
from engine.data.audio_checks import AudioFacts, speech_rate_warning
from engine.data.conversation import Conversation, Row
from engine.data.layouts import Layout, LayoutError, read_speech
from engine.data.references import References, keeps_reference
from engine.data.report import RowReport


@dataclass(frozen=True)
class LaidOut:
    """A row on its way to a sample.

    Attributes:
        number: of the row.
        written: as read, with its reference if it was paired with one; None if it could not be read.
        trained: in the turns of the layout; None if there are problems.
        written_text: the text to speak before normalisation, where that changed it.
    """

    number: int
    written: Conversation | None
    trained: Conversation | None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    written_text: str | None = None

    @property
    def recordings(self) -> list[Recording]:
        """What has to be read for this row: also of a row with problems, so that all of them are told at once."""
        sample = self.trained or self.written
        return list(dict.fromkeys(audio.recording for audio in sample.audios)) if sample else []


def laid_out(
    rows: Iterable[Row], layout: Layout, references: References | None, reference_dropout: float, seed: int
) -> Iterator[LaidOut]:
    """Each row in the turns of the layout, paired with a reference if asked."""
    for row in rows:
        sample = row.conversation
        if sample is None or row.problems:
            yield LaidOut(row.number, None, None, row.problems)
            continue
        paired, warning = references.pair(sample) if references else (sample, None)
        warnings = (warning,) if warning else ()
        keeps = not reference_dropout or keeps_reference(reference_dropout, seed, row.number)
        try:
            trained = layout.apply(paired, with_references=keeps)
        except LayoutError as error:
            yield LaidOut(row.number, paired, None, (str(error),), warnings)
            continue
        problems = tuple(_nothing_to_train(paired, trained))
        yield LaidOut(row.number, paired, None if problems else trained, problems, warnings, _changed(paired, trained))


def _nothing_to_train(written: Conversation, trained: Conversation) -> Iterator[str]:
    assistants = [i for i, message in enumerate(written.messages) if message.role == "assistant"]
    if not assistants:
        yield "no assistant message, so there is nothing to train → add the answer"
        return
    start = trained.start_index or 0
    if not any(i >= start for i, message in enumerate(trained.messages) if message.role == "assistant"):
        yield (
            f"start_index {written.start_index} leaves nothing to train → the last assistant message is number "
            f"{assistants[-1]}"
        )
    if not any(message.audios for message in written.messages if message.role == "assistant"):
        yield "no assistant message has audio → give the target recording as an audio item"


def spoken_text(sample: Conversation) -> str:
    """What the last turn with audio is asked to say."""
    asked = ""
    for message in sample.messages:
        if message.role == "user" and message.texts:
            asked = message.texts[-1]
    return asked


def _changed(written: Conversation, trained: Conversation) -> str | None:
    if trained is written:
        return None
    text = read_speech(written, "as read").rounds[-1][0]
    return None if text == spoken_text(trained) else text


@dataclass(frozen=True)
class Heard:
    """What is known of a recording: its content key, and what was measured or what is wrong with it.

    Attributes:
        seconds: None if it cannot be read.
        facts: None too if it came as codes.
    """

    key: str | None
    seconds: float | None = None
    facts: AudioFacts | None = None
    problem: str | None = None


class RowCheck:
    """Judges rows in their order; remembers the content of targets, to find those that come twice."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._first_row: dict[bytes, int] = {}

    def __call__(self, row: LaidOut, heard: Mapping[Recording, Heard]) -> RowReport:
        known = [(recording, heard[recording]) for recording in row.recordings]
        problems = [*row.problems, *(about.problem for _, about in known if about.problem)]
        warnings = list(row.warnings)
        problems += self._limits(known)
        if row.trained is None:
            return RowReport(row.number, tuple(problems), tuple(warnings), row.written and row.written.speaker)
        for recording, about in known:
            if about.facts is not None:
                warnings += [f"{recording}: {line}" for line in about.facts.warnings()]
        warnings += _speech_rates(row.trained, heard)
        references, targets = _references_and_targets(row)
        problems += self._copies(references, targets, heard)
        if not problems and not (warnings and self.settings.reject_suspicious):
            warnings += self._repeated(row.number, targets, heard)
        if self.settings.reject_suspicious:
            problems += [f"{line} (rejected by reject_suspicious)" for line in warnings]
        return RowReport(
            row=row.number,
            problems=tuple(problems),
            warnings=tuple(warnings),
            speaker=row.trained.speaker,
            text=spoken_text(row.trained),
            written_text=row.written_text,
            seconds=_total(targets, heard),
            reference_seconds=_total(references, heard),
        )

    def _limits(self, known: list[tuple[Recording, Heard]]) -> Iterator[str]:
        low, high = self.settings.min_seconds, self.settings.max_seconds
        for recording, about in known:
            if about.seconds is None:
                continue
            seconds = round(about.seconds, 3)  # the cache keeps them as fp32, in which 0.7 is less than 0.7
            if low is not None and seconds < low:
                yield f"{recording}: {seconds:.2f} s are less than min_seconds = {low:g}"
            if high is not None and seconds > high:
                yield f"{recording}: {seconds:.2f} s are more than max_seconds = {high:g}"

    def _copies(self, references: list[Recording], targets: list[Recording], heard: Mapping) -> Iterator[str]:
        keys = {heard[target].key for target in targets} - {None}
        for reference in references:
            if heard[reference].key in keys:
                yield (
                    f"{reference}: the reference is the target itself, which would teach to copy it → give another "
                    "recording of the speaker, or none and pair_references"
                )

    def _repeated(self, number: int, targets: list[Recording], heard: Mapping) -> Iterator[str]:
        for target in targets:
            key = bytes.fromhex(heard[target].key)[:16]
            first = self._first_row.setdefault(key, number)
            if first != number:
                yield f"{target}: the same recording as the target of row {first}"


def _references_and_targets(row: LaidOut) -> tuple[list[Recording], list[Recording]]:
    """Distinct recordings of the sample that are context, and those that speak its texts.

    The row as written tells them apart: a layout may train references too, but many rows share one.
    """
    answers = (m for m in row.written.messages[row.written.start_index or 0 :] if m.role == "assistant")
    spoken = [audio.recording for message in answers for audio in message.audios]
    others = Counter(audio.recording for audio in row.trained.audios)
    others.subtract(spoken)
    return list(+others), list(dict.fromkeys(spoken))


def _speech_rates(sample: Conversation, heard: Mapping[Recording, Heard]) -> Iterator[str]:
    """Warnings for turns whose audio is too long or too short for the text before it."""
    for asked, answer in zip(sample.messages, sample.messages[1:], strict=False):
        if asked.role == "user" and answer.role == "assistant" and asked.texts and len(answer.audios) == 1:
            about = heard[answer.audios[0].recording]
            if about.facts is not None:
                line = speech_rate_warning(asked.texts[-1], about.facts.speech_seconds)
                if line:
                    yield f"{answer.audios[0].recording}: {line}"


def _total(recordings: list[Recording], heard: Mapping[Recording, Heard]) -> float | None:
    seconds = [heard[recording].seconds for recording in recordings]
    return sum(seconds) if seconds and None not in seconds else None
