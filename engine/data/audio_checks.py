"""What may be wrong with a recording that can be read: clipped, off centre, cut off, mostly silent, or another text.

Invariant: a warning is a line of words made from numbers (`AudioFacts`), never stored itself. The numbers are
measured once, when a recording is encoded, and kept beside its codes; limits can change without a second reading.

Limits are set to stay quiet on sound recordings: levels are relative to the recording's own speech, so that
neither a soft voice nor a noisy room looks like a fault. Measuring costs half of decoding a wav, a tenth of an mp3.
"""

import math
from dataclasses import astuple, dataclass, fields

import numpy as np

from engine.data.audio import Decoded

CLIPPED_SHARE = 1e-4  # 2 samples of a second at 24 kHz; a peak that merely touches full scale stays below it
FULL_SCALE = 0.99  # 8-bit sound ends at 127/128
DC_OFFSET = 0.02  # of full scale; converters stay below 0.005, and 0.02 costs no headroom yet
EDGE_LEVEL = -18.0  # dB under speech; the last sound of a word fades by more than this before it ends
EDGE_ABOVE_PAUSES = 12.0  # dB; a recording whose pauses are as loud as its end is noisy, not cut off
EDGE_SILENCE = 2.0  # s; a longer silence at an end is learnt as part of speaking
ACTIVE_LEVEL = -35.0  # dB under speech; soft consonants reach 30
ACTIVE_SHARE = 0.3  # read speech has 0.6 to 0.9
NARROW_BAND = 16_000  # Hz of sampling; below, the codec's upper half of 12 kHz is empty and learnt so

_FRAME = 0.01  # s; of one level
_EDGE = 3  # frames at each end
_LOUD = 30  # frames, 0.3 s, that are louder than the speech level: a click is shorter
_FLOOR = 1e-12  # power of -120 dBFS, for the logarithm of digital silence


@dataclass(frozen=True)
class AudioFacts:
    """A recording in numbers; levels in dB are relative to its speech level.

    Attributes:
        seconds: length.
        sampling_rate: Hz.
        channels: number of channels.
        peak, rms: of the mono waveform; full scale is 1.
        clipped: share of samples that stand at full scale beside an equal one, or beyond it.
        dc: mean of the mono waveform.
        leading_silence, trailing_silence: seconds before and after the first and last sound.
        active: share of the time that is sound.
        begin_level, end_level: dB of the first and last 30 ms.
        pause_level: dB that a tenth of the time stays below.
    """

    seconds: float
    sampling_rate: float
    channels: float
    peak: float
    rms: float
    clipped: float
    dc: float
    leading_silence: float
    trailing_silence: float
    active: float
    begin_level: float
    end_level: float
    pause_level: float

    def to_array(self) -> np.ndarray:
        """float32 [len(fields)]."""
        return np.array(astuple(self), np.float32)

    @classmethod
    def from_array(cls, values: np.ndarray) -> "AudioFacts":
        """The inverse of `to_array`."""
        return cls(*(float(value) for value in values))

    def gain(self, loudness: float) -> np.float32:
        """What the waveform is multiplied by to bring its RMS to `loudness` dBFS without clipping its peak."""
        return np.float32(min(10 ** (loudness / 20) / self.rms, FULL_SCALE / self.peak))

    @property
    def speech_seconds(self) -> float:
        """Seconds without the silence at both ends."""
        return self.seconds - self.leading_silence - self.trailing_silence

    def warnings(self) -> list[str]:
        """One line for each thing that may be wrong."""
        lines = []
        if self.clipped > CLIPPED_SHARE:
            lines.append(f"clipped: {_percent(self.clipped)} of its samples stand at full scale")
        if abs(self.dc) > DC_OFFSET:
            lines.append(f"DC offset of {self.dc:.2f}")
        if self._is_cut(self.begin_level, self.leading_silence):
            lines.append(f"may be cut off: it begins at {round(self.begin_level)} dB of its level, without a pause")
        if self._is_cut(self.end_level, self.trailing_silence):
            lines.append(f"may be cut off: it ends at {round(self.end_level)} dB of its level, without a pause")
        if self.active < ACTIVE_SHARE:
            lines.append(f"mostly silent: {_percent(1 - self.active)} of its time")
        for end, silence in (("begin", self.leading_silence), ("end", self.trailing_silence)):
            if silence > EDGE_SILENCE:
                lines.append(f"{silence:.1f} s of silence at its {end}")
        if self.sampling_rate < NARROW_BAND:
            lines.append(f"narrow band: sampled at {self.sampling_rate:.0f} Hz")
        return lines

    def _is_cut(self, level: float, silence: float) -> bool:
        return silence < _FRAME / 2 and level > EDGE_LEVEL and level > self.pause_level + EDGE_ABOVE_PAUSES


FACTS = len(fields(AudioFacts))
"""Length of `AudioFacts.to_array`."""


def measure(decoded: Decoded) -> AudioFacts:
    """The facts of a decoded recording, which is neither empty nor silent."""
    wave, rate = decoded.wave, decoded.sampling_rate
    dc, power = float(wave.mean(dtype=np.float64)), float(np.dot(wave, wave)) / len(wave)
    peak = float(max(wave.max(), -wave.min()))
    levels = _levels(wave, rate, dc)
    sounding = np.flatnonzero(levels > ACTIVE_LEVEL)  # never empty: the speech level itself is 0 dB
    seconds, frame = len(wave) / rate, min(_FRAME, len(wave) / rate)
    return AudioFacts(
        seconds=seconds,
        sampling_rate=rate,
        channels=decoded.channels,
        peak=peak,
        rms=math.sqrt(power),
        clipped=_clipped_share(decoded.samples),
        dc=dc,
        leading_silence=sounding[0] * frame,
        trailing_silence=(len(levels) - 1 - sounding[-1]) * frame,
        active=len(sounding) / len(levels),
        begin_level=_mean_level(levels[:_EDGE]),
        end_level=_mean_level(levels[-_EDGE:]),
        pause_level=float(np.percentile(levels, 10)),
    )


def _levels(wave: np.ndarray, rate: int, dc: float) -> np.ndarray:
    """Level of each 10 ms in dB under the speech level; what is left over at the end belongs to the last of them.

    The speech level is what the loudest 0.3 s exceed (a tenth of a shorter recording's time), so that it is the
    same for a phrase in a long silence as for the phrase alone.
    """
    length = min(len(wave), max(1, round(rate * _FRAME)))
    count = len(wave) // length
    # The last frame is taken from the end backwards: a recording's end counts even if it is no whole frame.
    frames = wave[: count * length].reshape(count, length)
    power = np.einsum("ij,ij->i", frames, frames) / length
    tail = wave[-length:]
    power[-1] = np.dot(tail, tail) / length
    levels = 10 * np.log10(np.maximum(power - dc * dc, 0) + _FLOOR)
    loud = max(1, min(_LOUD, count // 10))
    return levels - np.partition(levels, count - loud)[count - loud]


def _mean_level(levels: np.ndarray) -> float:
    return 10 * math.log10(float(np.mean(10 ** (levels / 10))))


def _clipped_share(samples: np.ndarray) -> float:
    """Over all samples of all channels.

    A flat top is at full scale and equal to the sample before it, which a sound wave that only reaches full scale
    is not; lossy formats round the tops off, beyond full scale.
    """
    if max(samples.max(), -samples.min()) < FULL_SCALE:
        return 0.0
    high = np.abs(samples)
    flat = (high[1:] >= FULL_SCALE) & (samples[1:] == samples[:-1])
    return float(np.count_nonzero(flat) + np.count_nonzero(high > 1)) / samples.size


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


FASTEST = 30.0
"""Letters a second: brisk speech, 180 words of 5 letters a minute, is 15, and a commentator's 25."""
SLOWEST = 3.0
"""Letters a second, of a slow and solemn speaker with pauses."""
UNHURRIED = 3.0
"""Seconds that a recording may hold beside its text: breath, laughter, silence at both ends."""

_LETTERS = (  # (first, last, letters): what one character takes to say, in letters of an alphabet
    (0x0030, 0x0039, 4.0),  # digits: "seven" is 5, "six" 3
    (0x1100, 0x11FF, 1.0),  # jamo, the letters of hangul
    (0x1200, 0x137F, 2.0),  # Ethiopic: consonant and vowel
    (0x3040, 0x30FF, 2.0),  # kana: consonant and vowel; "ka" is か
    (0x31F0, 0x31FF, 2.0),  # small kana
    (0x3400, 0x4DBF, 3.0),  # Han: a syllable; in Mandarin 4 to 5 a second, as alphabets have 12 to 15 letters
    (0x4E00, 0x9FFF, 3.0),
    (0xAC00, 0xD7A3, 3.0),  # hangul: a syllable of 2 or 3 jamo
    (0xF900, 0xFAFF, 3.0),
    (0xFF66, 0xFF9F, 2.0),  # half-width kana
    (0x20000, 0x3FFFF, 3.0),
)


def count_letters(text: str) -> float:
    """What a text takes to say, in letters of an alphabet; spaces and punctuation take nothing."""
    return sum(_letters(character) for character in text)


def speech_rate_warning(text: str, seconds: float) -> str | None:
    """A line if so much text cannot be said in so many seconds, or so little would not take that long.

    Letters, not words, are compared, for they hold across languages: an alphabet's speakers say 8 to 15 letters
    a second, and characters that write a syllable count as the letters it would take. Both limits are beyond what
    people do, since this is to find texts that belong to another recording and recordings that were cut, not
    hasty or slow speakers.

    Args:
        seconds: of the recording; `AudioFacts.speech_seconds` where there are facts.
    """
    letters = count_letters(text)
    rate = letters / max(seconds, 1e-3)
    if rate > FASTEST and letters > FASTEST / 10:
        return f"too much text for {seconds:.1f} s: {rate:.0f} letters a second; is it cut off, or another's text?"
    if letters < (seconds - UNHURRIED) * SLOWEST:
        return f"too little text for {seconds:.1f} s: {rate:.1f} letters a second; is something not written?"
    return None


def _letters(character: str) -> float:
    if "a" <= character <= "z" or "A" <= character <= "Z":
        return 1.0
    code = ord(character)
    for first, last, letters in _LETTERS:
        if first <= code <= last:
            return letters
    return 1.0 if character.isalpha() else 0.0
