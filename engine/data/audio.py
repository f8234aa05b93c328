"""Recordings: any audio that libsndfile reads (wav, flac, ogg, mp3, …) as a mono waveform at one rate.

Whatever is wrong with a recording is an AudioError with one line that says what; nothing is replaced by
silence or cut to fit. Callers collect these lines by row, so that all bad recordings of a data set are known
after one pass.

Invariant: equal `content_key` means equal waveform, at whatever path: the key is taken from the bytes, not
the name.
"""

import hashlib
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

SILENCE = 1e-4  # peak of -80 dBFS; a 16-bit recording of nothing but dither stays below it
END_TOLERANCE = 0.1  # s; how far a segment may reach beyond the end, for durations in data files are rounded
_LARGEST_RESAMPLER = 2**22  # phases x taps; 44.1 to 24 kHz has 11,760, two coprime rates would take gigabytes


class AudioError(ValueError):
    """A recording that cannot be used; its message is one line."""


@dataclass(frozen=True)
class Recording:
    """Audio in a file (`path`) or in memory (`data`, the bytes of such a file), and which part of it.

    With an `offset` in seconds the recording is the `duration` seconds from there, to the end if there is no
    duration. A duration without offset only describes the recording, as data files commonly have it; the
    whole of it is meant.
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    offset: float | None = None
    duration: float | None = None

    def __post_init__(self):
        if (self.path is None) == (self.data is None):
            raise ValueError("a recording has either a path or data")

    def __str__(self) -> str:
        name = self.path if self.path is not None else f"embedded audio of {len(self.data):,} bytes"
        return name if self.offset is None else f"{name} from {self.offset:g} s"

    @property
    def num_bytes(self) -> int:
        """Size of the file or data, 0 if there is no such file."""
        if self.data is not None:
            return len(self.data)
        try:
            return Path(self.path).stat().st_size
        except OSError:
            return 0

    def open(self) -> BinaryIO:
        """The encoded bytes as a stream.

        Raises:
            AudioError: there is no such file, or it may not be read.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            return Path(self.path).open("rb")
        except FileNotFoundError:
            raise AudioError(f"{self.path}: no such file") from None
        except ValueError:
            raise AudioError(f"{self.path!r}: not a file name") from None
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read: {error.strerror}") from None


def content_key(recording: Recording) -> str:
    """sha256 in hex over the encoded bytes and the segment.

    Raises:
        AudioError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with recording.open() as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if recording.offset is not None:
        duration = None if recording.duration is None else float(recording.duration)
        digest.update(f"|{float(recording.offset)!r}+{duration!r}".encode())
    return digest.hexdigest()


def count_samples(recording: Recording, sampling_rate: int) -> int:
    """Length of `read_mono`'s result, from the file's header alone.

    Raises:
        AudioError: the header cannot be read, or the segment is outside the recording.
    """
    with recording.open() as stream, _decoder(recording, stream) as sound:
        first, frames = _segment(recording, sound)
        return math.ceil(frames * sampling_rate / sound.samplerate)


def read_mono(recording: Recording, sampling_rate: int) -> np.ndarray:
    """Decodes a recording: mean of its channels, resampled.

    Returns:
        float32 [samples] at `sampling_rate` Hz.

    Raises:
        AudioError: the file is missing, damaged or no audio; the segment is outside of it; it is empty,
            silent (peak below -80 dBFS), or not finite; its sampling rate has too little in common with
            `sampling_rate`.
    """
    with recording.open() as stream, _decoder(recording, stream) as sound:
        rate = sound.samplerate
        first, frames = _segment(recording, sound)
        try:
            sound.seek(first)
            channels = sound.read(frames, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise _damaged(recording, error) from None
    wave = channels.mean(axis=1, dtype=np.float32)
    if not len(wave):
        raise AudioError(f"{recording}: empty, holds no samples")
    if not np.isfinite(wave).all():
        raise AudioError(f"{recording}: not finite, holds NaN or infinite samples")
    peak = float(np.abs(wave).max())
    if peak < SILENCE:
        raise AudioError(f"{recording}: silent, its peak of {peak:.1e} is below {SILENCE:.0e}")
    return _resample(recording, wave, rate, sampling_rate)


def _decoder(recording: Recording, stream: BinaryIO) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(stream)
    except soundfile.SoundFileError as error:
        raise _damaged(recording, error) from None


def _damaged(recording: Recording, error: Exception) -> AudioError:
    reason = getattr(error, "error_string", None) or str(error)
    return AudioError(f"{recording}: not audio, or damaged: {reason.rstrip('.')}")


def _segment(recording: Recording, sound: soundfile.SoundFile) -> tuple[int, int]:
    """First frame and number of frames of the segment, in the file's own sampling rate."""
    if recording.offset is None:
        return 0, sound.frames
    rate, length = sound.samplerate, sound.frames / sound.samplerate
    end = length if recording.duration is None else recording.offset + recording.duration
    if not (0 <= recording.offset < length and recording.offset < end <= length + END_TOLERANCE):
        raise AudioError(f"{recording}: the segment to {end:g} s is outside the recording of {length:.3f} s")
    first = min(round(recording.offset * rate), sound.frames - 1)
    return first, max(1, min(round(end * rate), sound.frames) - first)


def _resample(recording: Recording, wave: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    if rate == sampling_rate:
        return wave
    common = math.gcd(rate, sampling_rate)
    if (rate // common) * (sampling_rate // common) > _LARGEST_RESAMPLER:
        raise AudioError(f"{recording}: cannot be resampled from {rate} Hz; convert the file to {sampling_rate} Hz")
    # Here, for they take seconds to import, and neither a header nor a file of the right rate needs them.
    import torch
    import torchaudio

    return torchaudio.functional.resample(torch.from_numpy(wave), rate, sampling_rate).numpy()
