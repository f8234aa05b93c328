"""Recordings: any audio that libsndfile reads (wav, flac, ogg, mp3, …) as a mono waveform, loudness untouched.

Whatever is wrong with a recording is an AudioError with one line that says what; nothing is replaced by
silence or cut to fit. Callers collect these lines by row, so that all bad recordings of a data set are known
after one pass. libsndfile itself reads a wav that was cut off in the middle without a word: that too is an
error here.

Invariants: equal `content_key` means equal waveform, at whatever path: the key is taken from the bytes, not
the name. `count_samples`, which reads the header only, is the exact length of what `read_mono` returns.
"""

import hashlib
import io
import math
import os
import re
import stat
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO

import numpy as np
import soundfile

SILENCE = 1e-4  # peak of -80 dBFS; a 16-bit recording of nothing but dither stays below it
END_TOLERANCE = 0.1  # s; how far a segment may reach beyond the end, for durations in data files are rounded
LONGEST = 3 * 3600  # s; of what is read at once, and of what a header may promise: a session, no training sample
_MOST_VALUES = 2**28  # samples x channels; 1 GiB as float32
_LARGEST_RESAMPLER = 2**22  # phases x taps; 44.1 to 24 kHz has 11,760, two coprime rates would take gigabytes
_CONVERT = "convert it to wav or flac, e.g. ffmpeg -i IN OUT.flac"
_SHORT_OF_HEADER = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 2**31 - 2**16  # bytes; what is written into a pipe claims this or more, for its size is not yet known


class AudioError(ValueError):
    """A recording that cannot be used; its message is one line."""


@dataclass(frozen=True)
class Recording:
    """Audio in a file (`path`), in memory (`data`, the bytes of such a file) or as `codes`, and which part of it.

    With an `offset` in seconds the recording is the `duration` seconds from there, to the end if there is no
    duration. A duration without offset only describes the recording, as data files commonly have it; the
    whole of it is meant.

    `codes` are the codec's, already made elsewhere: the bytes of little-endian int16 [codebooks, frames], to stay
    hashable; see `of_codes` and `code_array`.
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    offset: float | None = None
    duration: float | None = None
    codes: bytes | None = field(default=None, repr=False)
    codebooks: int = 0

    def __post_init__(self):
        if sum(source is not None for source in (self.path, self.data, self.codes)) != 1:
            raise ValueError("a recording has either a path, data or codes")
        if self.codes is not None and (self.codebooks < 1 or len(self.codes) % (2 * self.codebooks)):
            raise ValueError(f"{len(self.codes)} bytes are no int16 codes of {self.codebooks} codebooks")

    @classmethod
    def of_codes(cls, codes: np.ndarray) -> "Recording":
        """A recording that is known by its codes only, integers [codebooks, frames].

        Raises:
            ValueError: they have another shape, or int16 does not hold them.
        """
        kept = np.ascontiguousarray(codes, "<i2")
        if kept.ndim != 2 or not np.array_equal(kept, codes):
            raise ValueError(f"expected codes [codebooks, frames] that fit into int16, not {list(kept.shape)}")
        return cls(codes=kept.tobytes(), codebooks=len(kept))

    @property
    def code_array(self) -> np.ndarray | None:
        """int16 [codebooks, frames], or None if there is audio."""
        return None if self.codes is None else np.frombuffer(self.codes, "<i2").reshape(self.codebooks, -1)

    def __str__(self) -> str:
        if self.codes is not None:
            return f"codes of {len(self.codes) // 2 // self.codebooks} frames"
        name = self.path if self.path is not None else f"embedded audio of {len(self.data):,} bytes"
        return name if self.offset is None else f"{name} from {self.offset:g} s"

    def open(self) -> BinaryIO:
        """The encoded bytes as a stream.

        Raises:
            AudioError: there is no such file, it may not be read, or the recording has codes and no waveform.
        """
        if self.codes is not None:
            raise AudioError(f"{self}: has no waveform → give the audio file if its sound is needed")
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            stream = open(self.path, "rb", opener=_without_waiting)
        except FileNotFoundError:
            raise AudioError(f"{self.path}: no such file → correct the path") from None
        except ValueError:
            raise AudioError(f"{self.path!r}: not a file name → correct the path") from None
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            stream.close()
            raise AudioError(f"{self.path}: a pipe or a device, not a file → correct the path")
        return stream


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file for reading; a pipe, too, without waiting for somebody to write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@dataclass(frozen=True)
class Decoded:
    """What a recording holds, at its own rate.

    Attributes:
        name: of the recording, for messages.
        samples: float32 [samples, channels], full scale is 1.
        sampling_rate: Hz.
    """

    name: str
    samples: np.ndarray = field(repr=False)
    sampling_rate: int

    @property
    def channels(self) -> int:
        return self.samples.shape[1]

    @cached_property
    def wave(self) -> np.ndarray:
        """float32 [samples]: the mean of the channels."""
        return self.samples[:, 0] if self.channels == 1 else self.samples.mean(axis=1, dtype=np.float32)


def content_key(recording: Recording) -> str:
    """sha256 in hex over the encoded bytes and the segment, or over the codes.

    Raises:
        AudioError: the file cannot be read.
    """
    digest = hashlib.sha256()
    if recording.codes is not None:
        digest.update(recording.codes + f"|codes of {recording.codebooks}".encode())
        return digest.hexdigest()
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
        AudioError: the header cannot be read, or promises hours; the segment is outside the recording.
    """
    with recording.open() as stream, _decoder(recording, stream) as sound:
        first, frames = _segment(recording, sound)
        return math.ceil(frames * sampling_rate / sound.samplerate)


def decode(recording: Recording) -> Decoded:
    """The samples of a recording, or of its segment, as the file has them.

    Raises:
        AudioError: the file is missing, damaged, cut off or no audio; the segment is outside of it, or lasts hours;
            it is empty, silent (peak below -80 dBFS), or not finite; it is known by its codes only.
    """
    with recording.open() as stream, _decoder(recording, stream) as sound:
        first, frames = _segment(recording, sound)
        try:
            sound.seek(first)
            samples = sound.read(frames, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise _damaged(recording, error) from None
        samples = _all_promised(recording, sound, stream, samples, frames)
        decoded = Decoded(str(recording), samples, sound.samplerate)
    if not len(samples):
        raise AudioError(f"{recording}: empty, holds no samples → record it again, or take its row out")
    peak = float(max(decoded.wave.max(), -decoded.wave.min()))  # NaN and infinity go through min and max
    if not math.isfinite(peak):
        raise AudioError(f"{recording}: not finite, holds NaN or infinite samples → export it again")
    if peak < SILENCE:
        raise AudioError(f"{recording}: silent, its peak of {peak:.1e} is below {SILENCE:.0e} → take its row out")
    return decoded


def resample(decoded: Decoded, sampling_rate: int) -> np.ndarray:
    """The mono waveform at another rate, float32 [ceil(samples * sampling_rate / its rate)].

    Raises:
        AudioError: the two rates have too little in common.
    """
    rate = decoded.sampling_rate
    require_resampling(decoded, sampling_rate)
    if rate == sampling_rate:
        return decoded.wave
    # Here, for they take seconds to import, and neither a header nor a file of the right rate needs them.
    import torch
    import torchaudio

    return torchaudio.functional.resample(torch.from_numpy(decoded.wave), rate, sampling_rate).numpy()


def require_resampling(decoded: Decoded, sampling_rate: int) -> None:
    """Raises AudioError if the two rates have too little in common."""
    rate = decoded.sampling_rate
    common = math.gcd(rate, sampling_rate)
    if (rate // common) * (sampling_rate // common) > _LARGEST_RESAMPLER:
        raise AudioError(f"{decoded.name}: cannot be resampled from {rate} Hz → convert the file to {sampling_rate} Hz")


def read_mono(recording: Recording, sampling_rate: int) -> np.ndarray:
    """Decodes a recording: mean of its channels, resampled.

    Returns:
        float32 [samples] at `sampling_rate` Hz.

    Raises:
        AudioError: as `decode` and `resample` do.
    """
    return resample(decode(recording), sampling_rate)


def _decoder(recording: Recording, stream: BinaryIO) -> soundfile.SoundFile:
    try:
        sound = soundfile.SoundFile(stream)
    except soundfile.SoundFileError as error:
        raise _damaged(recording, error) from None
    if found := _SHORT_OF_HEADER.search(sound.extra_info):
        promised, present = map(int, found.groups())
        missing = sound.frames / sound.samplerate * (promised / max(1, present) - 1)
        if promised < _STREAMED and missing > END_TOLERANCE:
            raise AudioError(
                f"{recording}: cut off, {present:,} bytes of sound where its header promises {promised:,} → "
                "copy or export it again"
            )
    return sound


def _damaged(recording: Recording, error: Exception) -> AudioError:
    reason = getattr(error, "error_string", None) or str(error)
    return AudioError(f"{recording}: not audio, or damaged: {reason.rstrip('.')} → {_CONVERT}")


def _segment(recording: Recording, sound: soundfile.SoundFile) -> tuple[int, int]:
    """First frame and number of frames of the segment, in the file's own sampling rate."""
    first, frames = _part(recording, sound)
    if frames > LONGEST * sound.samplerate or frames * sound.channels > _MOST_VALUES:
        raise AudioError(
            f"{recording}: its header promises {frames:,} samples of {sound.channels} channel(s) at "
            f"{sound.samplerate:,} Hz, too many to read at once → cut it; {LONGEST // 3600} hours are the most"
        )
    return first, frames


def _part(recording: Recording, sound: soundfile.SoundFile) -> tuple[int, int]:
    if recording.offset is None:
        return 0, sound.frames
    rate, length = sound.samplerate, sound.frames / sound.samplerate
    end = length if recording.duration is None else recording.offset + recording.duration
    if not (0 <= recording.offset < length and recording.offset < end <= length + END_TOLERANCE):
        raise AudioError(
            f"{recording}: the segment to {end:g} s is outside the recording of {length:.3f} s → correct offset "
            "and duration"
        )
    first = min(round(recording.offset * rate), sound.frames - 1)
    return first, max(1, min(round(end * rate), sound.frames) - first)


def _all_promised(
    recording: Recording, sound: soundfile.SoundFile, stream: BinaryIO, samples: np.ndarray, frames: int
) -> np.ndarray:
    """The samples, if they are as many as the header says.

    An mp3 without a Xing header has its length estimated from its size: right to milliseconds at a constant bit
    rate, which are filled with zeros, and far off at a variable one.
    """
    missing, tolerance = frames - len(samples), END_TOLERANCE * sound.samplerate
    if missing and not (sound.format == "MP3" and missing <= tolerance):
        raise AudioError(
            f"{recording}: cut off or without its length, {len(samples):,} samples where its header promises "
            f"{frames:,} → copy it again, or {_CONVERT}"
        )
    if sound.format == "MP3" and recording.offset is None:
        at, next_frame, size = stream.tell(), stream.read(2), stream.seek(0, io.SEEK_END)
        is_frame = next_frame[:1] == b"\xff" and next_frame[1:] >= b"\xe0"  # and no title, "TAG" or "APETAGEX"
        if is_frame and (size - at) / max(1, at) * frames > 2 * tolerance:
            raise AudioError(f"{recording}: without its length, goes on after {frames:,} samples → {_CONVERT}")
    return np.pad(samples, ((0, missing), (0, 0))) if missing else samples
