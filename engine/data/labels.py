"""Audio streams, the delay pattern, labels, and the merge of text tokens with audio frames.

Equal to the original collator (boson_multimodal/data_collator/higgs_audio_collator.py) element by element; the
golden fixtures prove it. For a clip of T frames and C codebooks::

    stream [T + C + 1, C]:  codebook k holds BOS for columns 0..k, its T codes, then EOS to the end
    labels [T + C + 1, C]:  the same, but BOS and all EOS except the first of each codebook are ignored

Each codebook thus learns to stop by itself, one step after the codebook before it; nothing else ends generation.
Labels are not shifted: the label at a position is the token of that position (the model predicts it one earlier).

With Whisper conditioning a clip that is heard (`<|AUDIO|>`, never a spoken `<|AUDIO_OUT|>`) is its Whisper positions
first and then its stream. They keep the placeholder's id, are text positions to the model, and have no labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.mels import embeddings
from engine.data.prompts import IGNORED, Prompt, SpecialTokens


@dataclass(frozen=True)
class StreamIds:
    """Shape of an audio stream (config.num_codebooks, audio_stream_bos_id, audio_stream_eos_id)."""

    codebooks: int = 8
    bos: int = 1024
    eos: int = 1025


def delayed_stream(codes: np.ndarray, stream: StreamIds) -> np.ndarray:
    """Codes [C, T] as the model reads them: int16 [T + C + 1, C]."""
    return _delay(codes, left=stream.bos, eos=stream.eos, right=stream.eos)


def delayed_labels(codes: np.ndarray, stream: StreamIds) -> np.ndarray:
    """Targets of a trained clip, codes [C, T]: int16 [T + C + 1, C] with C * (T + 1) labelled entries."""
    return _delay(codes, left=IGNORED, eos=stream.eos, right=IGNORED)


def _delay(codes: np.ndarray, left: int, eos: int, right: int) -> np.ndarray:
    codebooks, frames = codes.shape
    out = np.full((frames + codebooks + 1, codebooks), right, np.int16)
    for k, book in enumerate(codes):  # slices, not index arrays: this runs for every clip of every step
        end = k + 1 + frames
        out[: k + 1, k] = left
        out[k + 1 : end, k] = book
        out[end, k] = eos
    return out


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation as the model is trained on it; L positions, A of them audio frames.

    Attributes:
        input_ids: int32 [L]; every audio position carries the audio token id, every Whisper position that of
            `<|AUDIO|>`.
        labels: int32 [L]; text targets, not shifted, IGNORED elsewhere.
        audio_ids: int16 [A, C]; delayed streams of all clips, in position order.
        audio_labels: int16 [A, C]; audio targets, not shifted.
        row: row of the data file.
        mels: float16 [rows, n_mels]; what Whisper hears of each clip with Whisper positions, in position order.
        mel_starts: first Whisper position of each.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    audio_ids: np.ndarray
    audio_labels: np.ndarray
    row: int = 0
    mels: tuple[np.ndarray, ...] = ()
    mel_starts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def text_targets(self) -> int:
        return int((self.labels[1:] != IGNORED).sum())

    @property
    def audio_targets(self) -> np.ndarray:
        """Targets of each codebook, int64 [C]."""
        return (self.audio_labels != IGNORED).sum(0)


def merge(
    prompt: Prompt,
    codes: list[np.ndarray],
    special: SpecialTokens,
    stream: StreamIds,
    row: int = 0,
    mels: Sequence[np.ndarray | None] | None = None,
) -> Sample:
    """Replaces each placeholder by the Whisper positions, if any, and the frames of its clip.

    Args:
        codes: for each clip of the prompt, codec codes [C, T].
        mels: for each clip what Whisper hears of it (engine.data.mels), None for one without; None for none at all.

    Raises:
        ValueError: the number of clips, spectrograms and placeholders differ; a spoken clip has a spectrogram.
    """
    ids, labels = prompt.input_ids, prompt.labels
    placeholder = (ids == special.audio_in) | (ids == special.audio_out)
    mels = [None] * len(codes) if mels is None else mels
    if placeholder.sum() != len(codes):
        raise ValueError(f"{placeholder.sum()} audio placeholders, but codes of {len(codes)} clips")
    if len(mels) != len(codes):
        raise ValueError(f"codes of {len(codes)} clips, but mels of {len(mels)}")
    heard = np.array([0 if m is None else embeddings(len(m)) for m in mels], np.int64)
    if (heard.astype(bool) & (ids[placeholder] == special.audio_out)).any():
        raise ValueError("a spoken clip has a spectrogram: only <|AUDIO|> is heard through Whisper")
    streams = [delayed_stream(c, stream) for c in codes]
    targets = [
        delayed_labels(c, stream) if trained else np.full_like(s, IGNORED)
        for c, s, trained in zip(codes, streams, prompt.trained, strict=True)
    ]
    repeats = np.ones(len(ids), np.int64)
    repeats[placeholder] = heard + [len(s) for s in streams]
    starts = (np.cumsum(repeats) - repeats)[placeholder]
    input_ids = np.repeat(np.where(placeholder, special.audio_out, ids), repeats).astype(np.int32)
    for start, count in zip(starts, heard, strict=True):
        input_ids[start : start + count] = special.audio_in
    empty = np.zeros((0, stream.codebooks), np.int16)
    return Sample(
        input_ids=input_ids,
        labels=np.repeat(np.where(placeholder, IGNORED, labels), repeats).astype(np.int32),
        audio_ids=np.concatenate([empty, *streams]),
        audio_labels=np.concatenate([empty, *targets]),
        row=row,
        mels=tuple(m for m, count in zip(mels, heard, strict=True) if count),
        mel_starts=tuple(int(start) for start, count in zip(starts, heard, strict=True) if count),
    )


def codes_of_stream(frames: np.ndarray, stream: StreamIds) -> np.ndarray:
    """The codes [C, T] inside a generated, delayed stream [n, C] (with its leading BOS frame, or without).

    A codebook's first EOS ends all: later codebooks end as many columns later as they are delayed. What an untrained
    model may put where no code belongs (BOS or EOS before the end) is clipped to the largest code.
    """
    frames = frames[1:] if len(frames) and (frames[0] == stream.bos).all() else frames
    columns, codebooks = frames.shape
    ended = np.flatnonzero(frames[:, 0] == stream.eos)
    length = min(int(ended[0]) if len(ended) else columns, columns - codebooks + 1)
    codes = [frames[k : k + length, k] for k in range(codebooks)]
    return np.stack(codes).clip(0, stream.bos - 1).astype(np.int16)
