"""What the waveform tells: tones, noises and pauses whose numbers are known beforehand."""

import numpy as np
import pytest

from engine.data.audio import Decoded
from engine.data.demo_speech import SENTENCES, VOICES, synthesize
from engine.evaluate.signal import (
    BANDS,
    average_spectrum,
    band_edges,
    measure,
    pitch_range,
    pitches,
    silence_and_clipping,
    spectral_distance,
)

RATE = 24_000


def clip(wave: np.ndarray, rate: int = RATE) -> Decoded:
    return Decoded("a clip", np.asarray(wave, np.float32)[:, None], rate)


def tone(hertz: float, seconds: float = 1.0, loud: float = 0.5, rate: int = RATE) -> np.ndarray:
    return loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def noise(seconds: float = 2.0, loud: float = 0.05, seed: int = 0) -> np.ndarray:
    return loud * np.random.default_rng(seed).standard_normal(round(seconds * RATE))


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE))


@pytest.mark.parametrize("hertz", [65, 110, 220, 440, 590])
@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_the_pitch_of_a_tone(hertz, rate):
    assert np.allclose(pitch_range(clip(tone(hertz, rate=rate), rate)), hertz, rtol=1e-3)


def test_the_pitch_of_overtones_without_their_fundamental():
    assert np.allclose(pitch_range(clip(sum(tone(200 * k, loud=0.1) for k in (2, 3, 4, 5)))), 200, rtol=1e-3)


def test_low_and_high_pitch_are_the_5th_and_95th_percentile():
    parts = [tone(100, 0.8), tone(200, 8), tone(400, 0.8)]  # the outer two have 8 % of the time each
    assert np.allclose(pitch_range(clip(np.concatenate(parts))), (100, 200, 400), rtol=0.01)
    parts = [tone(100, 0.3), tone(200, 8), tone(400, 0.3)]  # and here 3 %
    assert np.allclose(pitch_range(clip(np.concatenate(parts))), (200, 200, 200), rtol=0.01)


@pytest.mark.parametrize("voice", sorted(VOICES))
def test_the_pitch_of_a_voice(voice):
    _, median, _ = pitch_range(clip(synthesize(voice, SENTENCES[0])))
    assert abs(median / VOICES[voice].pitch - 1) < 0.03


def test_pauses_and_noise_are_not_voiced():
    paused = np.concatenate([silence(1), tone(150), silence(2)])
    assert 98 <= len(pitches(clip(paused))) <= 104  # 10 ms each, and those that reach into the tone
    assert pitch_range(clip(noise())) == pitch_range(clip(silence(1))) == (None, None, None)
    assert pitch_range(clip(tone(150, 0.1))) == (None, None, None)  # too few frames to speak of a range


def test_equal_clips_have_no_distance():
    speech = clip(synthesize("alto", SENTENCES[0]))
    assert spectral_distance(speech, speech) == 0


def test_twice_as_loud_is_6_dB_away():
    assert spectral_distance(clip(noise()), clip(2 * noise())) == pytest.approx(20 * np.log10(2), abs=1e-4)


def test_the_distance_of_muffled_noise():
    """20 dB less in the upper k of the bands: sqrt(k / 32) of 20 dB."""
    wave, k = noise(8), 10
    spectrum = np.fft.rfft(wave)
    spectrum[np.fft.rfftfreq(len(wave), 1 / RATE) >= band_edges(RATE)[BANDS - k]] *= 0.1
    muffled = clip(np.fft.irfft(spectrum))
    assert spectral_distance(clip(wave), muffled) == pytest.approx(20 * np.sqrt(k / BANDS), rel=0.02)


def test_a_tone_is_in_its_band_at_its_power():
    edges = band_edges(RATE)
    assert edges[0] == pytest.approx(80) and edges[-1] == pytest.approx(0.45 * RATE)
    spectrum = average_spectrum(tone(3_000, 2, loud=0.1), RATE)
    band = int(np.searchsorted(edges, 3_000)) - 1
    assert spectrum.argmax() == band
    assert spectrum[band] == pytest.approx(10 * np.log10(0.1**2 / 2), abs=0.05)
    assert np.all(spectrum[: band - 1] == -80)  # nothing there: the floor, not minus infinity


def test_pauses_and_length_do_not_count():
    wave = synthesize("tenor", SENTENCES[1])
    paused = np.concatenate([silence(1), wave, silence(0.5), wave, silence(2)])
    assert spectral_distance(clip(wave), clip(paused)) < 0.3


def test_clips_of_two_rates_are_compared_at_the_lower_one():
    low, high = clip(tone(1_000, 2, rate=16_000), 16_000), clip(tone(1_000, 2, rate=48_000), 48_000)
    assert spectral_distance(low, high) == spectral_distance(high, low) < 0.1


def test_what_has_no_sound_has_no_distance():
    assert spectral_distance(clip(silence(1)), clip(noise())) is None
    assert spectral_distance(clip(noise()), clip(noise()[:100])) is None


def test_half_of_the_time_is_silence():
    halves = np.concatenate([tone(220), silence(1)])
    assert silence_and_clipping(clip(halves)) == {"silence_share": pytest.approx(0.5, abs=0.01), "clipped_share": 0}
    assert silence_and_clipping(clip(halves * 0.01))["silence_share"] == pytest.approx(0.5, abs=0.01)
    assert silence_and_clipping(clip(tone(220)))["silence_share"] == 0
    assert silence_and_clipping(clip(tone(220, loud=0.003)))["silence_share"] == 1  # below -50 dBFS all along


def test_the_clipped_share_of_a_sine_of_twice_full_scale():
    """It is above full scale for two thirds of the time: arcsin(1/2) is a third of a quarter turn."""
    clipped = np.clip(tone(10, loud=2.0), -1, 1)
    assert silence_and_clipping(clip(clipped))["clipped_share"] == pytest.approx(2 / 3, abs=0.005)


def test_an_empty_clip_has_no_numbers():
    assert set(measure(clip(silence(0)), clip(noise())).values()) == {None}
