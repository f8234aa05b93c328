"""All scores of a clip, mistakes in both models told at once, and what many clips come to."""

import numpy as np
import pytest
import torch

from engine.data.audio import AudioError, Decoded
from engine.data.demo_speech import SENTENCES, synthesize
from engine.errors import ModelError
from engine.evaluate.scores import SCORES, Scorer, summary
from tests.evaluate import judges

CPU = torch.device("cpu")
KEYS = {
    "wer", "cer", "word_errors", "words", "character_errors", "characters", "transcript", "speaker_similarity",
    "spectral_distance_db", "pitch_low_hz", "pitch_median_hz", "pitch_high_hz", "silence_share", "clipped_share",
}  # fmt: skip


def speech(voice: str) -> Decoded:
    return Decoded(voice, synthesize(voice, SENTENCES[0])[:, None].astype(np.float32), 24_000)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    return Scorer(str(judges.ctc(folder / "ctc", says="B")), str(judges.voices(folder / "voices")), CPU)


def test_every_score_of_a_clip(scorer):
    scores = scorer.score(speech("alto"), "B, C?", speech("baritone"), speech("alto"))
    assert set(scores) == KEYS and None not in scores.values()
    assert (scores["transcript"], scores["word_errors"], scores["words"], scores["wer"]) == ("B", 1, 2, 0.5)
    assert scores["spectral_distance_db"] == 0  # to the target
    assert scores["speaker_similarity"] < 0.99999  # to the reference
    assert all(type(value) in (int, float, str) for value in scores.values())  # as JSON has it


def test_the_voice_is_the_targets_where_there_is_no_reference(scorer):
    assert scorer.score(speech("alto"), "B", None, speech("alto"))["speaker_similarity"] == pytest.approx(1, abs=1e-5)
    assert scorer.score(speech("alto"), "B")["speaker_similarity"] is None


def test_without_models_the_signal_is_left():
    scores = Scorer(None, None, CPU).score(speech("alto"), "B", speech("alto"))
    unknown = KEYS - {"pitch_low_hz", "pitch_median_hz", "pitch_high_hz", "silence_share", "clipped_share"}
    assert {name for name, value in scores.items() if value is None} == unknown


def test_a_clip_that_is_not_finite_is_an_error():
    samples = speech("alto").samples.copy()
    samples[100] = np.nan
    with pytest.raises(AudioError, match="broken.wav: not finite"):
        Scorer(None, None, CPU).score(Decoded("broken.wav", samples, 24_000), "B")


def test_wrong_folders_are_told_at_once_and_before_anything_is_scored(tmp_path):
    voices = str(judges.voices(tmp_path / "voices"))
    with pytest.raises(ModelError) as raised:
        Scorer(voices, str(tmp_path / "nothing"), CPU)
    assert len(raised.value.problems) == 2
    assert raised.value.problems[0].startswith("asr_model_path: ") and "WavLMForXVector" in raised.value.problems[0]
    assert raised.value.problems[1].startswith("speaker_model_path: ")


def test_rates_of_many_clips_are_errors_by_words():
    """1 of 1 and 1 of 9 are 2 of 10, not the mean of 1 and 1/9."""
    one = {"wer": 1.0, "word_errors": 1, "words": 1, "cer": 0.5, "character_errors": 1, "characters": 2}
    nine = {"wer": 1 / 9, "word_errors": 1, "words": 9, "cer": 0.0, "character_errors": 0, "characters": 38}
    total = summary([one, nine])
    assert (total["wer"], total["word_errors"], total["words"]) == (0.2, 2, 10)
    assert (total["cer"], total["character_errors"], total["characters"]) == (0.025, 1, 40)


def test_means_are_of_the_clips_that_have_the_number():
    rows = [{"speaker_similarity": 0.8, "pitch_median_hz": 100.0}, {"speaker_similarity": None}, {}]
    total = summary([*rows, {"speaker_similarity": 0.6}])
    assert total["speaker_similarity"] == pytest.approx(0.7)
    assert total["pitch_median_hz"] == 100
    assert total["wer"] is None and total["words"] is None


def test_no_clips_and_no_words_divide_by_nothing():
    assert set(summary([])) == {metric.name for metric in SCORES}
    assert summary([{"wer": None, "word_errors": 2, "words": 0}])["wer"] is None


def test_every_score_is_described_once():
    assert {metric.name for metric in SCORES} == KEYS - {"transcript"}
    assert all(metric.meaning and metric.group for metric in SCORES)
