"""What a model is asked to say, in the very tokens of training: everything before the last clip that is trained.

A prompt is cut out of a sample (engine/data/labels.py), of a prepared store or of a row laid out as training lays it
out. So it ends in `<|audio_out_bos|>`, after whatever the layout puts before the clip, a text of the same turn
included. Whisper positions are left out: transformers' model has no place for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from transformers import HiggsAudioV2Config

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Message
from engine.data.dataset import Dataset
from engine.data.labels import Sample, StreamIds, codes_of_stream, merge
from engine.data.layouts import Layout
from engine.data.prompts import IGNORED, PromptTokenizer
from engine.data.rows import spoken_text

UNKNOWN = Recording.of_codes(np.zeros((1, 1), np.int16))
"""Stands where a row has no recording of what is to be said."""

Sound = Recording | np.ndarray
"""A recording, or codes int16 [C, T]."""


@dataclass(frozen=True)
class SpeechPrompt:
    """A prompt as `generate` takes it.

    Attributes:
        name: where it is from, for people.
        text: to say.
        input_ids: int32 [L]; every audio position carries the audio token id.
        audio_ids: int16 [A, C]; delayed streams of what is heard before.
        reference: the last clip that is heard before; target: the text as it was spoken. None if there is none.
    """

    name: str
    text: str
    input_ids: np.ndarray
    audio_ids: np.ndarray
    reference: Sound | None = None
    target: Sound | None = None


def stream_of(config: HiggsAudioV2Config) -> StreamIds:
    """The shape of a model's streams."""
    return StreamIds(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)


def with_answer(row: Conversation) -> Conversation:
    """The row, with a place for the answer's clip if it has none."""
    if row.messages and row.messages[-1].role == "assistant" and row.messages[-1].audios:
        return row
    return replace(row, messages=(*row.messages, Message("assistant", (Audio(UNKNOWN),))))


def of_row(
    row: Conversation,
    name: str,
    layout: Layout,
    tokenize: PromptTokenizer,
    stream: StreamIds,
    codes: Callable[[Recording], np.ndarray],
) -> SpeechPrompt:
    """The prompt for the last clip of a row.

    Args:
        codes: of a recording that is heard before it, int16 [C, T].

    Raises:
        LayoutError: the row does not fit the layout.
    """
    laid_out = layout.apply(with_answer(row))
    *heard, last = (audio.recording for audio in laid_out.audios)
    nothing = np.zeros((stream.codebooks, 1), np.int16)
    spoken = replace(laid_out, start_index=len(laid_out.messages) - 1)
    sample = merge(tokenize(spoken), [*map(codes, heard), nothing], tokenize.special, stream)
    prompt = of_sample(sample, name, tokenize, stream)
    reference, target = heard[-1] if heard else None, None if last is UNKNOWN else last
    return replace(prompt, text=spoken_text(laid_out), reference=reference, target=target)


def of_sample(sample: Sample, name: str, tokenize: PromptTokenizer, stream: StreamIds) -> SpeechPrompt:
    """The prompt for the last trained clip of a sample.

    Raises:
        ValueError: no clip of it is trained.
    """
    special = tokenize.special
    is_audio = sample.input_ids == special.audio_out
    starts = np.flatnonzero(is_audio & ~np.r_[False, is_audio[:-1]])  # a clip stands between tokens that are none
    frame = np.cumsum(is_audio)
    ends = np.flatnonzero(is_audio & ~np.r_[is_audio[1:], False])
    clips = [(start, slice(frame[start] - 1, frame[end])) for start, end in zip(starts, ends, strict=True)]
    trained = [i for i, (_, frames) in enumerate(clips) if (sample.audio_labels[frames] != IGNORED).any()]
    if not trained:
        raise ValueError(f"{name}: no clip of it is trained")
    cut, frames = clips[trained[-1]]
    before = sample.input_ids[:cut]
    heard = clips[trained[-1] - 1][1] if trained[-1] else None
    return SpeechPrompt(
        name=name,
        text=_last_words(before, tokenize),
        input_ids=before[before != special.audio_in],  # Whisper's positions
        audio_ids=sample.audio_ids[: frames.start],
        reference=None if heard is None else codes_of_stream(sample.audio_ids[heard], stream),
        target=codes_of_stream(sample.audio_ids[frames], stream),
    )


def _last_words(tokens: np.ndarray, tokenize: PromptTokenizer) -> str:
    """What the last user turn says after its last clip; without any special token."""
    tokenizer = tokenize.tokenizer
    header = tokenizer.encode("<|start_header_id|>user<|end_header_id|>\n\n", add_special_tokens=False)
    tokens = tokens.tolist()
    places = [i for i in range(len(tokens)) if tokens[i : i + len(header)] == header]
    turn = tokens[places[-1] + len(header) :] if places else tokens
    special = set(tokenizer.added_tokens_decoder)
    pieces: list[list[int]] = [[]]
    for token in turn:
        if token == tokenizer.convert_tokens_to_ids("<|eot_id|>"):
            break
        pieces[-1].append(token) if token not in special else pieces.append([])
    texts = [tokenizer.decode(piece).strip() for piece in pieces]
    return next((text for text in reversed(texts) if text), "")


def spread(data: Dataset, count: int) -> list[int]:
    """The first `count` samples with a target, of as many speakers and recordings as there are.

    A sample of each speaker before a second one of any; no target twice, as far as there are others.
    """
    speakers, targets = _speakers_and_targets(data)
    turn_of: dict[object, int] = {}
    order = []
    seen = set()
    for index in np.flatnonzero(data.audio_targets > 0).tolist():
        speaker, target = speakers[index], targets[index]
        again = target in seen
        seen.add(target)
        turn = turn_of[speaker] = turn_of.get(speaker, -1) + 1
        order.append((again, turn, index))
    return [index for *_, index in sorted(order)[:count]]


def _speakers_and_targets(data: Dataset) -> tuple[list, list]:
    """Of each sample what tells its speaker (all that name none count as one), and the key of its target."""
    speakers, targets = [], []
    for number, store in enumerate(data.stores):
        names = store.speakers()
        speakers += [names[i] if i >= 0 else None for i in store.records["speaker"].tolist()]
        targets += [key or (number, row) for row, key in enumerate(store.first_clips()[1])]
    return [speakers[i] for i in data.chosen], [targets[i] for i in data.chosen]
