"""Packs samples into one row without padding, and computes every index the model needs, once, on the host.

The model keeps its hidden states in *modality order*: all text positions of the row first, then all audio
positions, so that each FFN, each norm and each embedding is one dense operation on a contiguous slice and no layer
has to look at a mask. Only attention works in *sequence order*; `to_sequence` and `to_modality` lead there and back.

Whisper positions are text positions; which row takes which of the encoder's outputs is known here too. Without them
the fields are empty.

Processes that share a row (`sequence_parallel_size`) have a piece of it each: as many places of the sequence as the
others, in modality order among themselves. Labels are those of the whole row, so nothing is lost where it is cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch

from engine.data.labels import Sample
from engine.data.mels import CHUNK_FRAMES, TAIL, chunks, pooled
from engine.data.prompts import IGNORED


@dataclass
class PackedBatch:
    """One packed row of T = text + audio positions, or a piece of it. Rows below are in modality order.

    Of a piece all but `sample_lengths` and `sample_ends` is its own: T positions, numbered from 0. These two say what
    attention has to know, and that sees the whole row.

    Attributes:
        text_ids: int64 [text].
        audio_ids: int64 [audio, C]; delayed codes.
        position_ids: int64 [T]; restart at each sample.
        to_sequence: int64 [T]; row that stands at each place of the sequence.
        to_modality: int64 [T]; the inverse: place in the sequence of each row.
        sample_lengths: tokens of each sample of the whole row, in sequence order (host).
        sample_ends: int32 [samples + 1]; cumulated lengths from 0.
        text_target_rows: int64 [text targets]; rows whose next token has a text label.
        text_targets: int64 [text targets].
        audio_target_rows: int64 [audio targets]; rows whose next frame has a label in some codebook.
        audio_targets: int64 [audio targets, C], IGNORED where a codebook has none.
        mels: float16 [chunks, frames, n_mels]; the 30 s chunks of all clips that are heard, filled up with zeros.
        mel_frames: int64 [chunks]; valid frames of each.
        whisper_index: int64 [Whisper positions]; each one's place among the pooled outputs of all chunks as one.
        whisper_rows: int64 [Whisper positions]; the row of each.
    """

    text_ids: torch.Tensor
    audio_ids: torch.Tensor
    position_ids: torch.Tensor
    to_sequence: torch.Tensor
    to_modality: torch.Tensor
    sample_lengths: tuple[int, ...]
    sample_ends: torch.Tensor
    text_target_rows: torch.Tensor
    text_targets: torch.Tensor
    audio_target_rows: torch.Tensor
    audio_targets: torch.Tensor
    mels: torch.Tensor
    mel_frames: torch.Tensor
    whisper_index: torch.Tensor
    whisper_rows: torch.Tensor

    @property
    def tokens(self) -> int:
        return len(self.position_ids)

    @property
    def longest(self) -> int:
        return max(self.sample_lengths)

    def to(self, device: torch.device | str) -> "PackedBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        return self._map(torch.Tensor.pin_memory)

    def __reduce__(self):
        """Goes to another process as one tensor: each that is sent costs a descriptor and a connection of its own."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        kinds = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        joined = torch.zeros(_places(kinds)[-1], dtype=torch.uint8)
        batch = _separated(joined, kinds, self.sample_lengths)
        for name, tensor in tensors.items():
            getattr(batch, name).copy_(tensor)
        return _separated, (joined, kinds, self.sample_lengths)

    def _map(self, function) -> "PackedBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackedBatch(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


def _separated(
    joined: torch.Tensor, kinds: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], sample_lengths: tuple[int, ...]
) -> PackedBatch:
    """The batch whose tensors (name, dtype, shape) lie one after the other in `joined`, uint8; none is copied."""
    places = _places(kinds)
    tensors = {
        name: joined[place : place + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for place, (name, dtype, shape) in zip(places, kinds, strict=False)
    }
    return PackedBatch(**tensors, sample_lengths=sample_lengths)


def _places(kinds: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> list[int]:
    """First byte of each tensor, at multiples of the largest item; then that behind all of them."""
    sizes = (-(-math.prod(shape) * dtype.itemsize // 8) * 8 for _, dtype, shape in kinds)
    return list(accumulate(sizes, initial=0))


def empty_sample(codebooks: int) -> Sample:
    """One untrained text position: what a process runs when the step has no micro-batch left for it."""
    nothing = np.zeros((0, codebooks), np.int16)
    return Sample(np.zeros(1, np.int32), np.full(1, IGNORED, np.int32), nothing, nothing)


def pack(samples: Sequence[Sample], audio_token_id: int, piece: tuple[int, int] = (0, 1)) -> PackedBatch:
    """Packs samples end to end.

    Args:
        audio_token_id: the id that audio positions carry in `input_ids`.
        piece: (number, of): which of so many equal pieces of the row to give. A row that they do not divide ends with
            untrained text positions, a sample of their own.
    """
    samples = [*samples, *_rest(samples, piece[1])]
    lengths = np.array([len(s) for s in samples])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    size = starts[-1] // piece[1]
    here = slice(piece[0] * size, (piece[0] + 1) * size)
    row_ids = np.concatenate([s.input_ids for s in samples])
    row_audio = row_ids == audio_token_id
    audio_labels = np.full((len(row_ids), samples[0].audio_labels.shape[1]), IGNORED, np.int16)
    audio_labels[row_audio] = np.concatenate([s.audio_labels for s in samples])
    first_frame, frames = row_audio[: here.start].sum(), row_audio[here].sum()

    ids, is_audio = row_ids[here], row_audio[here]
    position = (np.arange(starts[-1]) - np.repeat(starts[:-1], lengths))[here]
    to_modality = np.concatenate([np.flatnonzero(~is_audio), np.flatnonzero(is_audio)])
    to_sequence = np.empty_like(to_modality)
    to_sequence[to_modality] = np.arange(size)
    next_text = _next([s.labels for s in samples])[here]
    text_places = np.flatnonzero(next_text != IGNORED)
    next_audio = _next(np.split(audio_labels, starts[1:-1]))[here]
    audio_places = np.flatnonzero((next_audio != IGNORED).any(1))
    mels, mel_frames, whisper_index, whisper_places = _heard_in(here, *_pack_mels(samples, starts))

    def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    return PackedBatch(
        text_ids=tensor(ids[~is_audio]),
        audio_ids=tensor(np.concatenate([s.audio_ids for s in samples])[first_frame : first_frame + frames]),
        position_ids=tensor(position[to_modality]),
        to_sequence=tensor(to_sequence),
        to_modality=tensor(to_modality),
        sample_lengths=tuple(lengths.tolist()),
        sample_ends=tensor(starts, torch.int32),
        text_target_rows=tensor(to_sequence[text_places]),
        text_targets=tensor(next_text[text_places]),
        audio_target_rows=tensor(to_sequence[audio_places]),
        audio_targets=tensor(next_audio[audio_places]),
        mels=tensor(mels, torch.float16),
        mel_frames=tensor(mel_frames),
        whisper_index=tensor(whisper_index),
        whisper_rows=tensor(to_sequence[whisper_places]),
    )


def _rest(samples: Sequence[Sample], pieces: int) -> list[Sample]:
    """Untrained samples of one position that make the row a multiple of `pieces`: fewer than that."""
    missing = -sum(map(len, samples)) % pieces
    return [empty_sample(samples[0].audio_ids.shape[1])] * missing


def _pack_mels(samples: Sequence[Sample], starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """The chunks, their frames, and of each Whisper position its place among their outputs and in the sequence."""
    found, places = [], [np.zeros(0, np.int64)]
    for sample, start in zip(samples, starts[:-1], strict=True):
        for clip, place in zip(sample.mels, start + np.array(sample.mel_starts, np.int64), strict=True):
            for first, frames in chunks(len(clip)):
                if pooled(frames):
                    found.append((clip[first : first + min(frames + TAIL, CHUNK_FRAMES)], frames))
                    places.append(place + np.arange(pooled(frames)))
                    place += pooled(frames)
    if not found:
        return np.zeros((0, 0, 0), np.float16), *[np.zeros(0, np.int64)] * 3
    longest = max(len(rows) for rows, _ in found)
    mels = np.zeros((len(found), longest, found[0][0].shape[1]), np.float16)
    for chunk, (rows, _) in zip(mels, found, strict=True):
        chunk[: len(rows)] = rows
    index = [number * pooled(longest) + np.arange(pooled(frames)) for number, (_, frames) in enumerate(found)]
    return mels, np.array([frames for _, frames in found]), np.concatenate(index), np.concatenate(places)


def _heard_in(
    here: slice, mels: np.ndarray, mel_frames: np.ndarray, index: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What `_pack_mels` gave of a row, for the places `here` of it: only the chunks that are heard there."""
    mine = (here.start <= places) & (places < here.stop)
    if mine.all():
        return mels, mel_frames, index, places - here.start
    if not mine.any():
        return np.zeros((0, 0, 0), np.float16), *[np.zeros(0, np.int64)] * 3
    width = pooled(mels.shape[1])
    chunks_heard, number = np.unique(index[mine] // width, return_inverse=True)
    index = number * width + index[mine] % width
    return mels[chunks_heard], mel_frames[chunks_heard], index, places[mine] - here.start


def _next(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Label of the following position within each sample; the last position predicts nothing."""
    shifted = [np.concatenate([part[1:], np.full_like(part[:1], IGNORED)]) for part in labels]
    return np.concatenate(shifted)
