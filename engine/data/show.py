"""One sample in readable form: its turns, tokens, delay grids and labels, as training will see them.

Printed from the arrays of the sample itself, not made a second time, so what is shown is what is trained.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.data.conversation import Audio, Conversation, Message
from engine.data.labels import Sample, StreamIds
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.data.text_diff import changes, origin

GRID_COLUMNS = 12
"""Columns shown at either end of a clip; codes in between look like those beside them."""


@dataclass(frozen=True)
class Span:
    """A run of positions with one special meaning.

    Attributes:
        clip: its index in `Prompt.audios`.
        codes: audio positions; else Whisper positions, which come before them.
        frame: row of `Sample.audio_ids` that belongs to the first audio position.
    """

    clip: int
    codes: bool
    start: int
    stop: int
    frame: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


def show(
    written: Conversation,
    trained: Conversation,
    prompt: Prompt,
    sample: Sample,
    tokenizer,
    stream: StreamIds,
    width: int = 100,
    frames_per_second: float = 25.0,
) -> str:
    """A sample as text of at most `width` columns (80 or more).

    Args:
        written: the conversation as it was read.
        trained: the same after layout and normalisation, of which `prompt` and `sample` were made.
        frames_per_second: of the codec.

    Raises:
        ValueError: the clips of the prompt are not those of the sample.
    """
    spans = _spans(prompt, sample, SpecialTokens.of(tokenizer))
    delay = stream.codebooks + 1
    seconds = {prompt.audios[s.clip]: (len(s) - delay) / frames_per_second for s in spans if s.codes}
    speaker = f", speaker {written.speaker}" if written.speaker is not None else ""
    blocks = [
        [f"Row {sample.row}{speaker}"],
        _turns(written, trained, seconds, width),
        ["TOKENS", *_tokens(prompt, sample, spans, tokenizer, delay)],
        _grids(prompt, sample, spans, stream, width),
        ["TOTALS", *_totals(sample, spans)],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _spans(prompt: Prompt, sample: Sample, special: SpecialTokens) -> list[Span]:
    ids = sample.input_ids
    marked = np.where((ids == special.audio_in) | (ids == special.audio_out), ids, -1)
    borders = [0, *(np.flatnonzero(np.diff(marked)) + 1).tolist(), len(ids)]
    spans, clip, frame = [], 0, 0
    for start, stop in zip(borders, borders[1:], strict=False):
        if marked[start] == special.audio_out:
            spans.append(Span(clip, True, start, stop, frame))
            clip, frame = clip + 1, frame + stop - start
        elif marked[start] == special.audio_in:
            spans.append(Span(clip, False, start, stop))
    if clip != len(prompt.audios) or frame != len(sample.audio_ids):
        raise ValueError(f"the prompt has {len(prompt.audios)} clips, the sample {clip}: they are of different rows")
    return spans


def _turns(written: Conversation, trained: Conversation, seconds: dict[Audio, float], width: int) -> list[str]:
    if written.messages == trained.messages:
        return ["TURNS, trained as they are written", *_messages(trained, seconds, width, {}, marks=True)]
    texts = [text for message in written.messages if message.role != "system" for text in message.texts]
    texts += [value for value in written.misc.values() if isinstance(value, str)]
    spoken = [text for message in trained.messages if message.role != "system" for text in message.texts]
    origins = {text: found for text in spoken if (found := origin(text, texts)) is not None}
    return [
        "TURNS as written",
        *_messages(written, seconds, width, {}, marks=False),
        "",
        "TURNS as trained",
        *_messages(trained, seconds, width, origins, marks=True),
    ]


def _messages(
    conversation: Conversation, seconds: dict[Audio, float], width: int, origins: dict[str, str], marks: bool
) -> Iterator[str]:
    first_trained = conversation.start_index or 0
    for turn, message in enumerate(conversation.messages):
        mark = ""
        if marks:
            mark = "trained  " if message.role == "assistant" and turn >= first_trained else "context  "
        head = f"{turn:>3} {message.role:<10}{mark}"
        for line in _contents(message, seconds, width - len(head), origins):
            yield (head + line).rstrip()
            head = " " * len(head)


def _contents(message: Message, seconds: dict[Audio, float], room: int, origins: dict[str, str]) -> Iterator[str]:
    if message.recipient:
        yield from _wrapped(f"to {_quoted(message.recipient)}", room)
    if not message.content:
        yield "(empty)"
    for item in message.content:
        if isinstance(item, Audio):
            yield from _wrapped(_clip(item, seconds), room)
            continue
        yield from _wrapped(_quoted(item.text), room)
        for old, new in changes(origins[item.text], item.text) if item.text in origins else ():
            yield from _wrapped(f"  changed: {_quoted(old)} → {_quoted(new)}", room)


def _clip(audio: Audio, seconds: dict[Audio, float]) -> str:
    recording = audio.recording
    text = f"clip {recording}"
    if recording.offset is not None and recording.duration is not None:
        text += f" for {recording.duration:g} s"
    return text + (f", {seconds[audio]:.2f} s" if audio in seconds else ", not used")


def _tokens(prompt: Prompt, sample: Sample, spans: list[Span], tokenizer, delay: int) -> Iterator[str]:
    """A line for each text token and for each run of audio or Whisper positions."""
    yield f"  {'position':>11} {'id':>7}  {'label':<9}piece"
    special = {span.start: span for span in spans}
    position = 0
    while position < len(sample):
        if span := special.get(position):
            place = f"{span.start}…{span.stop - 1}"
            if span.codes:
                label = "trained" if prompt.trained[span.clip] else "-"
                what = f"audio frames of clip {span.clip} ({len(span)} = {len(span) - delay} frames + {delay})"
            else:
                label, what = "-", f"whisper x{len(span)}, clip {span.clip}"
            yield f"  {place:>11} {'':>7}  {label:<9}{what}"
            position = span.stop
            continue
        token, label = int(sample.input_ids[position]), int(sample.labels[position])
        mark = "-" if label == IGNORED else "trained" if label == token else str(label)
        yield f"  {position:>11} {token:>7}  {mark:<9}{_piece(tokenizer, token)}"
        position += 1


def _piece(tokenizer, token: int) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    # A byte-level tokenizer may spread a character over several tokens, none of which is text alone.
    return _quoted(text) if "\ufffd" not in text else "part of a character"


def _grids(prompt: Prompt, sample: Sample, spans: list[Span], stream: StreamIds, width: int) -> list[str]:
    lines = []
    columns = min(GRID_COLUMNS, (width - 8) // 7)
    for span in (span for span in spans if span.codes):
        ids, labels = (a[span.frame : span.frame + len(span)] for a in (sample.audio_ids, sample.audio_labels))
        state = "trained" if prompt.trained[span.clip] else "context, nothing of it trained"
        lines += ["", *_wrapped(f"clip {span.clip}: {prompt.audios[span.clip].recording}; {state}", width)]
        if len(span) <= 2 * columns:
            parts = [range(first, min(first + columns, len(span))) for first in range(0, len(span), columns)]
        else:
            parts = [range(columns), range(len(span) - columns, len(span))]
        for part in parts:
            lines += _grid(ids, labels, part, span.start, stream)
    return ["DELAY GRIDS   B begins, E ends, (…) has no label", *lines] if lines else []


def _grid(ids: np.ndarray, labels: np.ndarray, columns: range, start: int, stream: StreamIds) -> Iterator[str]:
    """Codebooks down, columns across."""
    names = {stream.bos: "B", stream.eos: "E"}
    first, last = columns[0], columns[-1]
    yield f"  columns {first}…{last} at positions {start + first}…{start + last}"
    yield "        " + "".join(f"{column:>5}  " for column in columns).rstrip()
    for codebook in range(stream.codebooks):
        cells = []
        for column in columns:
            code, label = int(ids[column, codebook]), int(labels[column, codebook])
            name = names.get(code, str(code))
            cells.append(f"({name})".rjust(7) if label == IGNORED else f"{name} ".rjust(7))
        yield f"  cb {codebook:<2} " + "".join(cells).rstrip()


def _totals(sample: Sample, spans: list[Span]) -> Iterator[str]:
    audio = sum(len(span) for span in spans if span.codes)
    whisper = sum(len(span) for span in spans if not span.codes)
    kinds = f"{len(sample) - audio - whisper} text, {audio} audio" + (f", {whisper} whisper" if whisper else "")
    yield f"  tokens         {len(sample):,} ({kinds})"
    yield f"  text targets   {sample.text_targets:,}"
    by_codebook = sample.audio_targets.tolist()
    yield f"  audio targets  {sum(by_codebook):,}; by codebook {' '.join(map(str, by_codebook))}"


def _quoted(text: str) -> str:
    """In quotes, with line breaks and other control characters written out."""
    return json.dumps(text, ensure_ascii=False)


def _wrapped(text: str, room: int) -> Iterator[str]:
    """Lines of at most `room` columns, broken at spaces, within a word only if it alone is too long."""
    line = ""
    for word in re.findall(r"\s*\S+", text):
        if line and _columns(line + word) > room:
            yield line
            line, word = "", word.lstrip()
        for character in word:
            if _columns(line + character) > room:
                yield line
                line = ""
            line += character
    yield line


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
