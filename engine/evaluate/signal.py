"""What the waveform of a clip tells without any model: spectrum against a target, pitch, silence, clipping.

**Spectral distance** is between long-term average spectra: power of the sounding frames in 32 bands, equally wide in
mel, from 80 Hz to 0.45 of the lower sampling rate; then the root mean square of the bands' differences in dB. Speech
is drawn anew each time, faster or slower and with other pauses, so a comparison frame by frame, even along the best
alignment, mostly measures how a sentence was read; averages hold still, and tell muffled, thin, noisy or too soft
from right. Loudness counts: a clip that is 6 dB louder and otherwise equal is 6 dB away. The two halves of a recording
are 2 to 5 dB apart, recordings of two people mostly 5 to 12.

**Pitch** is read where a frame resembles itself one period later (normalised cross-correlation, 60 to 600 Hz): the
5th, 50th and 95th percentile of these voiced frames. Whispering, noise and a single cough have none. The medians of
real voices are within 3 % of Praat's; torchaudio's detector has some of them an octave low.

**Silence and clipping** are those of engine/data/audio_checks.py, with which recordings are checked.
"""

import numpy as np

from engine.data import audio_checks
from engine.data.audio import Decoded, resample

BANDS = 32
LOWEST_BAND = 80.0
"""Hz; below is hum, and no voice."""
QUIETEST_BAND = 1e-8
"""Power of -80 dBFS: a band that holds less counts as this, for nobody hears the difference."""
SOUNDING = 10**-3.5
"""Share of the loudest frame's power above which a frame is sound: 35 dB less."""
SILENT = 10 ** (-50 / 20)
"""Peak of -50 dBFS: a clip that stays below is silence from begin to end."""
LOWEST_PITCH, HIGHEST_PITCH = 60.0, 600.0
"""Hz; from a deep man's voice to a child's shout."""
PITCH_RATE = 8_000
"""Hz of sampling, at which pitch is read: all that tells it is below 4 kHz."""
VOICED = 0.6
"""Likeness of a frame to itself one period later, 1 of a tone, above which it is voiced."""
FEWEST_VOICED = 10
"""Frames of 10 ms."""

_WINDOW = PITCH_RATE // 40  # 25 ms: a period and a half of the deepest voice
_LAGS = np.arange(int(PITCH_RATE / HIGHEST_PITCH) - 1, int(PITCH_RATE / LOWEST_PITCH) + 3)
_HOP = PITCH_RATE // 100
_FFT = 512  # holds the window and the longest lag
_BLOCK = 2_000  # frames at once: 8 MB, however long the clip
_AS_GOOD = 0.9  # of two periods as many frames fit, for a tone is also alike after two; the shorter one is meant


def measure(speech: Decoded, target: Decoded | None) -> dict[str, float | None]:
    """The scores of a clip that need no model; None where there is nothing to measure."""
    low, median, high = pitch_range(speech)
    return {
        "spectral_distance_db": None if target is None else spectral_distance(speech, target),
        "pitch_low_hz": low,
        "pitch_median_hz": median,
        "pitch_high_hz": high,
        **silence_and_clipping(speech),
    }


def silence_and_clipping(clip: Decoded) -> dict[str, float | None]:
    """`silence_share` of the time, and `clipped_share` of the samples."""
    if not len(clip.wave):
        return {"silence_share": None, "clipped_share": None}
    if np.abs(clip.wave).max() < SILENT:
        return {"silence_share": 1.0, "clipped_share": 0.0}
    facts = audio_checks.measure(clip)
    return {"silence_share": 1.0 - facts.active, "clipped_share": facts.clipped}


def spectral_distance(one: Decoded, other: Decoded) -> float | None:
    """dB between the average spectra of two clips, at the lower of their rates; None if one has no sound.

    Raises:
        AudioError: the two rates have too little in common.
    """
    rate = min(one.sampling_rate, other.sampling_rate)
    spectra = [average_spectrum(resample(clip, rate), rate) for clip in (one, other)]
    if spectra[0] is None or spectra[1] is None:
        return None
    return float(np.sqrt(np.mean((spectra[0] - spectra[1]) ** 2)))


def average_spectrum(wave: np.ndarray, rate: int) -> np.ndarray | None:
    """dBFS of each band over the frames that sound, [BANDS]; None of silence, and of less than one frame of 40 ms."""
    size = round(0.04 * rate)
    if len(wave) < size:
        return None
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[:: size // 2]
    loudness = np.einsum("ij,ij->i", frames, frames)
    if loudness.max() < SILENT**2 * size:
        return None
    window = np.hanning(size)
    spectra = np.abs(np.fft.rfft(frames[loudness >= SOUNDING * loudness.max()] * window)) ** 2
    power = spectra.mean(axis=0) * 2 / (size * np.sum(window**2))  # a sine of amplitude 1 has 1/2 in all
    edges = np.searchsorted(np.fft.rfftfreq(size, 1 / rate), band_edges(rate))
    bands = np.add.reduceat(power[: edges[-1]], edges[:-1])
    return 10 * np.log10(np.maximum(bands, QUIETEST_BAND))


def band_edges(rate: int) -> np.ndarray:
    """Hz where the bands begin, and where the last one ends, [BANDS + 1]."""
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (LOWEST_BAND, 0.45 * rate))
    return 700 * (10 ** (np.linspace(low, high, BANDS + 1) / 2595) - 1)


def pitch_range(clip: Decoded) -> tuple[float, float, float] | tuple[None, None, None]:
    """Hz that 5, 50 and 95 % of the voiced frames stay below; None of a clip with fewer than FEWEST_VOICED."""
    voiced = pitches(clip)
    if len(voiced) < FEWEST_VOICED:
        return None, None, None
    low, median, high = np.percentile(voiced, [5, 50, 95])
    return float(low), float(median), float(high)


def pitches(clip: Decoded) -> np.ndarray:
    """Hz of each voiced frame, one every 10 ms, in order.

    Raises:
        AudioError: the clip's rate and PITCH_RATE have too little in common.
    """
    if not len(clip.wave) or np.abs(clip.wave).max() < SILENT:
        return np.empty(0)
    wave = resample(clip, PITCH_RATE).astype(np.float64)
    span = _WINDOW + int(_LAGS[-1])
    if len(wave) < span:
        return np.empty(0)
    frames = np.lib.stride_tricks.sliding_window_view(wave - wave.mean(), span)[::_HOP]
    loudness = np.einsum("ij,ij->i", frames, frames)
    frames = frames[loudness >= SOUNDING * loudness.max()]
    return np.concatenate([_pitches(frames[i : i + _BLOCK]) for i in range(0, len(frames), _BLOCK)])


def _pitches(frames: np.ndarray) -> np.ndarray:
    """Hz of those of some frames [frames, samples] that are voiced."""
    head = np.fft.rfft(frames[:, :_WINDOW], _FFT)
    products = np.fft.irfft(head.conj() * np.fft.rfft(frames, _FFT), _FFT)[:, _LAGS]
    sums = np.cumsum(np.pad(frames**2, ((0, 0), (1, 0))), axis=1)
    energy = sums[:, _LAGS + _WINDOW] - sums[:, _LAGS]
    alike = products / np.sqrt(sums[:, _WINDOW, None] * energy + 1e-12)
    before, here, after = alike[:, :-2], alike[:, 1:-1], alike[:, 2:]
    peaks = np.where((here >= before) & (here > after), here, 0.0)
    best = peaks.max(axis=1, keepdims=True)
    voiced = np.flatnonzero(best[:, 0] > VOICED)
    first = np.argmax(peaks >= _AS_GOOD * best, axis=1)[voiced]
    left, top, right = (part[voiced, first] for part in (before, here, after))
    shift = 0.5 * (left - right) / (left - 2 * top + right)  # of the parabola through the peak and its neighbours
    return PITCH_RATE / (_LAGS[1 + first] + shift)
