"""Synthetic speech for the demo: text becomes a waveform in which voice and characters can be told apart.

Every character is a segment of 60 to 80 ms (a syllable of 180 ms outside ASCII) with formants and a share of
noise of its own: vowels ring, consonants hiss, spaces and punctuation are silent. A voice is a pitch, a
formant scale and a breathiness. Source and filter in one: harmonics of a gliding pitch, each as loud as the
formants are at its frequency.

Invariant: a pure function of (voice, text), whatever the state of any random generator. A second of speech
takes about 20 ms to make.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

SAMPLING_RATE = 24_000
PEAK = 0.5

SENTENCES = (
    "The river bends towards the sea.",
    "Seven lamps were lit at dusk.",
    "She reads aloud.",
    "Rain fell softly on the roof.",
    "A fox waits near the old mill.",
    "Bring me the blue map, please.",
    "We heard music from behind the green hill.",
    "The train leaves in an hour.",
    "His garden is full of herbs and old roses.",
    "Cold wind came from the north.",
    "Open the window.",
    "They built a boat.",
    "Nobody knew the song by name.",
    "The baker sings while he works.",
    "Two birds share one branch of the apple tree.",
    "Our letters were late.",
    "Is the kettle boiling already?",
    "Snow covers the quiet fields.",
    "He counted forty silver coins twice.",
    "今天的天气真的很好。",
    "The clock stopped at noon.",
    "Light moves faster than sound.",
    "我们一起去看大海吧。",
    "Keep the receipt for the shoes.",
)

_FRAMES_PER_SECOND = 200  # control rate: formants and loudness are laid down in frames of 5 ms
_HOP = SAMPLING_RATE // _FRAMES_PER_SECOND
_HARMONICS = 28
_BANDWIDTHS = np.array([90.0, 130.0, 220.0])  # Hz, of the three formants
_VOWELS = {  # formants in Hz of an adult male voice, after Peterson and Barney (1952)
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "y": (390, 1990, 2550),
}
_UNVOICED = "cfhkpqstx"


@dataclass(frozen=True)
class Voice:
    """pitch in Hz; formants as a factor on an adult male's; breath as the share of noise in voiced sounds."""

    pitch: float
    formants: float
    breath: float


VOICES = {
    "alto": Voice(pitch=196.0, formants=1.14, breath=0.04),
    "baritone": Voice(pitch=104.0, formants=0.96, breath=0.02),
    "child": Voice(pitch=270.0, formants=1.30, breath=0.08),
    "tenor": Voice(pitch=142.0, formants=1.03, breath=0.15),
}


def synthesize(voice: str, text: str) -> np.ndarray:
    """Speaks `text` in one of VOICES.

    Returns:
        float32 [samples] at 24 kHz, mono, peak 0.5; all zeros if `text` has no letter or digit.

    Raises:
        KeyError: `voice` is none of VOICES.
    """
    timbre = VOICES[voice]
    frames, formants, voiced, noisy = _score(text.lower(), timbre)
    rng = np.random.default_rng(_digest(f"{voice}\n{text}"))

    # Pitch falls over the utterance, wavers slowly, and never stands at the same place in two utterances.
    time = np.linspace(0.0, 1.0, frames)
    melody = 1.12 - 0.26 * time + 0.05 * np.sin(2 * np.pi * (time * frames / 90 + rng.random()))
    pitch = timbre.pitch * melody

    number = np.arange(1, _HARMONICS + 1)[:, None]
    distance = (number[..., None] * pitch[None, :, None] - formants[None]) / _BANDWIDTHS
    loudness = (1.0 / (1.0 + distance**2)).sum(-1) / np.sqrt(number) * voiced

    phase = np.cumsum(_to_samples(pitch)) * (2 * np.pi / SAMPLING_RATE)
    tone = np.zeros(frames * _HOP)
    for harmonic, gain in enumerate(loudness, start=1):
        tone += _to_samples(gain) * np.sin(harmonic * phase)

    # Noise about 3 kHz wide, moved to the consonant's own band.
    hiss = np.convolve(rng.standard_normal(len(tone)), np.full(8, 0.125), mode="same")
    band = np.cumsum(_to_samples(formants[:, 2] * 1.5)) * (2 * np.pi / SAMPLING_RATE)
    wave = tone + _to_samples(noisy + timbre.breath * voiced) * hiss * np.cos(band)

    peak = np.abs(wave).max(initial=0.0)
    return (wave * (PEAK / peak if peak > 0 else 0.0)).astype(np.float32)


def _score(text: str, voice: Voice) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The text in control frames: how many, formants in Hz [frames, 3], voiced and noisy loudness."""
    segments = [(0.05, (500.0, 1500.0, 2500.0), 0.0, 0.0)]
    segments += [_segment(character) for character in text] + [segments[0]]
    lengths = [max(1, round(seconds * _FRAMES_PER_SECOND)) for seconds, *_ in segments]
    formants = np.repeat(np.array([segment[1] for segment in segments]), lengths, axis=0) * voice.formants
    voiced = np.repeat([segment[2] for segment in segments], lengths)
    noisy = np.repeat([segment[3] for segment in segments], lengths)
    formants = np.stack([_smooth(track) for track in formants.T], axis=1)
    return sum(lengths), formants, _smooth(voiced), _smooth(noisy)


def _segment(character: str) -> tuple[float, tuple[float, float, float], float, float]:
    """Seconds, three formants in Hz, voiced and noisy loudness of one character."""
    if not character.isalnum():
        return (0.06 if character.isspace() else 0.1), (500.0, 1500.0, 2500.0), 0.0, 0.0
    if character in _VOWELS:
        return 0.08, _VOWELS[character], 1.0, 0.0
    one, two, three = (_digest(character) >> np.array([0, 8, 16])) & 255
    formants = (250.0 + 2.0 * one, 800.0 + 5.0 * two, 2200.0 + 4.0 * three)
    if not character.isascii():
        return 0.18, formants, 1.0, 0.1
    unvoiced = character in _UNVOICED
    return 0.06 + 0.01 * (one % 3) / 2, formants, (0.0 if unvoiced else 0.45), (0.5 if unvoiced else 0.12)


def _smooth(track: np.ndarray) -> np.ndarray:
    """Glides over 25 ms, as a tongue would, instead of the clicks that steps make."""
    window = np.hanning(7)[1:-1]
    return np.convolve(np.pad(track, 2, mode="edge"), window / window.sum(), mode="valid")


def _to_samples(track: np.ndarray) -> np.ndarray:
    """A control track [frames] as one value per sample [frames * hop]."""
    return np.interp(np.arange(len(track) * _HOP) / _HOP, np.arange(len(track)), track)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
