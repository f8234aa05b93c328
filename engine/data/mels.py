"""Log-mel spectrograms of reference recordings, as Whisper's encoder reads them, and the arithmetic of its positions.

Whisper works on chunks of 30 s: 3000 frames of 10 ms, which the encoder turns into 750 positions of 40 ms. A shorter
chunk is padded with silence before the spectrogram, and its positions after the end of the recording are not used.
What stands after the end is still seen by the positions just before it, through the window of the spectrogram and
through two convolutions, whose last valid output reaches TAIL frames past the end. So a clip of F frames is kept as
F + TAIL rows; the positions are then those of the full 3000 frames, exactly, at the cost of the clip's own length.

Computed when data are prepared or by the loader's workers, never within a step.
"""

import hashlib
import json
import math
from collections.abc import Iterator

import numpy as np
from transformers import WhisperFeatureExtractor

SAMPLING_RATE = 16_000
"""Hz of the waveforms."""

HOP = 160
"""Samples from one mel frame to the next."""

CHUNK_FRAMES = 3000
"""Mel frames that the encoder sees at once, 30 s."""

TAIL = 2
"""Rows kept after the last frame of a clip. In a chunk that is full they are zeros, which nothing reads."""


def mel_rows(samples: int) -> int:
    """Rows of the spectrogram of a waveform of so many samples at 16 kHz."""
    return math.ceil(samples / HOP) + TAIL


def convolved(frames):
    """Positions after the encoder's convolutions of a chunk of so many frames; an int or a tensor of them."""
    return (frames - 1) // 2 + 1


def pooled(frames):
    """Positions that a chunk of so many frames gives, after convolutions and pooling; an int or a tensor of them."""
    return convolved(frames) // 2


def chunks(rows: int) -> Iterator[tuple[int, int]]:
    """First row and number of frames of each 30 s chunk of a spectrogram of so many rows."""
    for start in range(0, rows - TAIL, CHUNK_FRAMES):
        yield start, min(CHUNK_FRAMES, rows - TAIL - start)


def embeddings(rows: int) -> int:
    """Whisper positions of a clip whose spectrogram has so many rows, all chunks together: 25 a second.

    A recording of less than 30 ms has none.
    """
    return sum(pooled(frames) for _, frames in chunks(rows))


class MelExtractor:
    """Waveform -> log-mels, by transformers' own feature extractor.

    Args:
        preprocessor: content of a Whisper folder's preprocessor_config.json (WhisperSource.preprocessor).

    Attributes:
        n_mels: width of the spectrograms.
        identity: a hash of all that decides their values, for the headers of stores.
    """

    def __init__(self, preprocessor: dict):
        self._extractor = WhisperFeatureExtractor.from_dict(preprocessor)
        self.n_mels = self._extractor.feature_size
        decisive = {name: getattr(self._extractor, name) for name in ("feature_size", "n_fft", "padding_value")}
        text = json.dumps([decisive, SAMPLING_RATE, HOP, CHUNK_FRAMES, TAIL], sort_keys=True)
        self.identity = hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        """Log-mels of a recording, each chunk normalised by its own maximum, as Whisper was trained.

        Args:
            waveform: float32 [samples], mono at 16 kHz, at least one sample (engine.data.audio.read_mono).

        Returns:
            float16 [mel_rows(samples), n_mels].
        """
        mels = np.zeros((mel_rows(len(waveform)), self.n_mels), np.float16)
        for start, frames in chunks(len(mels)):
            samples = waveform[start * HOP : (start + CHUNK_FRAMES) * HOP]
            values = self._extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features[0].T
            kept = min(frames + TAIL, CHUNK_FRAMES)
            mels[start : start + kept] = values[:kept]
        return mels
