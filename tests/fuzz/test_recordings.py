"""Recordings: samples, or an AudioError of one line; a header that promises too much gets no memory for it."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from engine.data.audio import AudioError, Recording, count_samples, decode, read_mono
from engine.data.audio_checks import AudioFacts, measure
from tests.fuzz.hostile import NUMBERS, damaged
from tests.fuzz.watched import inputs, little_memory, outcome

KINDS = {
    "wav": ("WAV", "PCM_16"), "float": ("WAV", "FLOAT"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III"), "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"),
    "w64": ("W64", "PCM_16"), "rf64": ("RF64", "PCM_16"),
}  # fmt: skip
SECONDS = st.sampled_from([number for number in NUMBERS if abs(number) <= 1e9])  # what rows may ask for


def encoded(format: str, subtype: str) -> bytes:
    stream = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(7200) / 9)
    soundfile.write(stream, wave, 24_000, format=format, subtype=subtype)
    return stream.getvalue()


@pytest.fixture(scope="module")
def sounds():
    with little_memory():
        sounds = {name: encoded(*kind) for name, kind in KINDS.items()}
        assert all(use(Recording(data=sound)) == "sound" for sound in sounds.values())
        yield sounds


def use(recording: Recording) -> str:
    try:
        count = count_samples(recording, 24_000)
        wave = read_mono(recording, 24_000)
        assert len(wave) == count and wave.dtype == np.float32
        assert isinstance(measure(decode(recording)), AudioFacts)
        return "sound"
    except AudioError as error:
        return str(error)


@inputs(400)
@given(st.data(), st.sampled_from(sorted(KINDS)))
def test_damaged_recordings(sounds, data, kind):
    end = data.draw(st.sampled_from((60, 200, None)))
    content = data.draw(damaged(sounds[kind], end=end))
    said = outcome(lambda: use(Recording(data=content)))
    assert said == "sound" or "→" in said and "\n" not in said


@inputs(60)
@given(SECONDS, st.none() | SECONDS)
def test_odd_segments(sounds, offset, duration):
    said = outcome(lambda: use(Recording(data=sounds["wav"], offset=offset, duration=duration)))
    assert said == "sound" or "→" in said and "\n" not in said
