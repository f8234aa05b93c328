"""Audio checks: each fault is named where it is, and sound recordings stay without a word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.audio import Decoded
from engine.data.audio_checks import FACTS, AudioFacts, count_letters, measure, speech_rate_warning
from engine.data.demo_speech import SENTENCES, VOICES, synthesize

RATE = 24_000


def facts_of(wave: np.ndarray, rate: int = RATE) -> AudioFacts:
    samples = np.asarray(wave, np.float32).reshape(len(wave), -1)
    return measure(Decoded("a.wav", samples, rate))


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return synthesize("alto", SENTENCES[0])


@pytest.mark.parametrize("voice", sorted(VOICES))
def test_sound_speech_has_no_warnings(voice):
    for text in SENTENCES:
        wave = synthesize(voice, text)
        for loud in (1.0, 0.01, 1.999):  # 1.999 brings the peak to full scale, and clips nothing
            facts = facts_of(loud * wave)
            assert facts.warnings() == []
        assert speech_rate_warning(text, facts.speech_seconds) is None


def test_a_noisy_room_is_no_fault(speech):
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(speech))
    assert facts_of(speech + noise).warnings() == []


def test_the_facts_are_what_they_say(speech):
    wave = np.concatenate([silence(0.5), speech, silence(1.0)])
    facts = facts_of(np.stack([wave, wave], axis=1), 48_000)
    assert (facts.seconds, facts.sampling_rate, facts.channels) == (len(wave) / 48_000, 48_000, 2)
    assert facts.peak == np.abs(wave).max() and np.isclose(facts.rms, np.sqrt((wave**2).mean()), rtol=1e-5)
    alone = facts_of(speech)
    both = facts_of(wave)
    assert both.leading_silence == pytest.approx(alone.leading_silence + 0.5, abs=0.02)
    assert both.trailing_silence == pytest.approx(alone.trailing_silence + 1.0, abs=0.02)
    assert both.speech_seconds == pytest.approx(alone.speech_seconds, abs=0.03)
    assert both.active * both.seconds == pytest.approx(alone.active * alone.seconds, abs=0.05)


def clipped(wave):
    return np.clip(4 * wave, -1, 32_767 / 32_768)


def clipped_left(wave):
    return np.stack([clipped(wave), 0.1 * wave], axis=1)


def overshooting(wave):
    return 2.2 * wave


def off_centre(wave):
    return 0.5 * wave + 0.12


def cut_at_its_end(wave):
    return wave[: RATE * 3 // 4]


def cut_at_its_begin(wave):
    return wave[RATE // 4 :]


def followed_by_silence(wave):
    return np.concatenate([wave, silence(3.0)])


def preceded_by_noise_of_a_quiet_room(wave):
    room = 1e-3 * np.random.default_rng(0).standard_normal(3 * RATE)
    return np.concatenate([room, wave])


def mostly_silent(wave):
    word = wave[: RATE // 2]
    return np.concatenate([silence(1.5), word, silence(1.5), word, silence(1.5)])


@pytest.mark.parametrize(
    "damage, warning",
    [
        (clipped, "clipped: "),
        (clipped_left, "clipped: "),
        (overshooting, "clipped: "),
        (off_centre, "DC offset of 0.12"),
        (cut_at_its_end, "may be cut off: it ends at "),
        (cut_at_its_begin, "may be cut off: it begins at "),
        (followed_by_silence, "3.1 s of silence at its end"),
        (preceded_by_noise_of_a_quiet_room, "3.0 s of silence at its begin"),
        (mostly_silent, "mostly silent: 8"),
    ],
)
def test_each_fault_is_named_and_no_other(speech, damage, warning):
    warnings = facts_of(damage(speech)).warnings()
    assert len(warnings) == 1 and warnings[0].startswith(warning), warnings


@pytest.mark.parametrize("rate, narrow", [(8_000, True), (11_025, True), (16_000, False), (48_000, False)])
def test_a_narrow_band_is_told_by_the_rate(speech, rate, narrow):
    assert facts_of(speech, rate).warnings() == ([f"narrow band: sampled at {rate} Hz"] if narrow else [])


def test_the_clipped_share_is_a_count():
    wave = np.tile(np.float32([0.1, 1.0, 1.0, 1.0, -0.2, -1.0, 0.99, 0.3]), 1_000)
    assert facts_of(wave).clipped == pytest.approx(2 / 8)  # a flat top is equal to the sample before it
    assert "clipped: 25 % of its samples" in facts_of(wave).warnings()[0]


@given(st.integers(1, 700), st.integers(8_000, 48_000), st.integers(1, 3), st.integers(0, 2**32))
def test_any_recording_has_finite_facts_that_survive_storage(samples, rate, channels, seed):
    wave = np.random.default_rng(seed).uniform(-1, 1, (samples, channels)).astype(np.float32)
    facts = facts_of(wave, rate)
    stored = facts.to_array()
    assert stored.dtype == np.float32 and stored.shape == (FACTS,) and np.isfinite(stored).all()
    again = AudioFacts.from_array(stored)
    assert again.to_array().tobytes() == stored.tobytes() and again.warnings() == facts.warnings()
    assert 0 <= facts.leading_silence + facts.trailing_silence <= facts.seconds + 1e-9


@pytest.mark.parametrize(
    "text, letters",
    [("Hello, world!", 10), ("", 0), ("…?!", 0), ("1984", 16), ("天气", 6), ("かな", 4), ("한국", 6), ("Пять", 4)],
)
def test_letters_of_every_script(text, letters):
    assert count_letters(text) == letters


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("Twas the night before my birthday. Hooray! It's almost here!", 4.5),
        ("No.", 0.3),
        ("Uhh, this is going to take forever.", 6.0),
        ("对，这就是我，万人敬仰的太乙真人。", 5.0),
        ("对，这就是我，万人敬仰的太乙真人。", 2.0),
        ("今日はいい天気ですね。", 1.2),
        ("오늘 날씨가 정말 좋네요.", 1.4),
        ("Сегодня очень хорошая погода.", 1.6),
        ("आज मौसम बहुत अच्छा है।", 1.5),
        ("الطقس جميل جدا اليوم", 1.4),
    ],
)
def test_ordinary_speech_fits_its_text(text, seconds):
    assert speech_rate_warning(text, seconds) is None


@pytest.mark.parametrize(
    "text, seconds, warning",
    [
        ("A sentence that takes three seconds to be said aloud.", 1.0, "too much text for 1.0 s: 43 letters a second"),
        ("今天的天气真的很好，我们一起去看大海吧。", 1.0, "too much text for 1.0 s: 54 letters"),
        ("Hello.", 30.0, "too little text for 30.0 s: 0.2 letters"),
        ("你好。", 12.0, "too little text for 12.0 s: 0.5 letters"),
        ("...", 8.0, "too little text for 8.0 s: 0.0 letters"),
        ("Hello.", 0.0, "too much text for 0.0 s"),
    ],
)
def test_another_recordings_text_is_noticed(text, seconds, warning):
    assert speech_rate_warning(text, seconds).startswith(warning)
