"""Voices are compared by the cosine of the model's own x-vectors, whatever the rate and the length of the clips."""

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMForXVector

from engine.data.audio import Decoded
from engine.data.demo_speech import SENTENCES, synthesize
from engine.evaluate.speaker import SpeakerModel
from tests.evaluate import judges

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return judges.voices(tmp_path_factory.mktemp("voices") / "model")


def speech(voice: str, rate: int = judges.RATE) -> Decoded:
    return Decoded(voice, synthesize(voice, SENTENCES[0]).astype(np.float32)[:, None], rate)


def test_a_clip_has_its_own_voice(folder):
    assert SpeakerModel(folder, CPU).similarity(speech("alto"), speech("alto")) == pytest.approx(1, abs=1e-5)


def test_the_cosine_is_that_of_the_models_own_vectors(folder):
    model, extractor = WavLMForXVector.from_pretrained(folder), Wav2Vec2FeatureExtractor.from_pretrained(folder)
    one, other = speech("alto"), speech("baritone")
    vectors = []
    for clip in (one, other):
        with torch.no_grad():
            inputs = extractor(clip.wave, sampling_rate=judges.RATE, return_tensors="pt")
            vectors.append(model(**inputs).embeddings[0].numpy())
    cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    speaker = SpeakerModel(folder, CPU)
    assert speaker.similarity(one, other) == pytest.approx(cosine, abs=1e-5)
    assert speaker.similarity(other, one) == pytest.approx(cosine, abs=1e-5)
    assert cosine < 0.9999  # or the test shows nothing


def test_clips_are_heard_at_the_rate_of_the_model_and_for_30_seconds(folder):
    speaker = SpeakerModel(folder, CPU)
    speaker.voice(speech("alto"))
    lengths = []
    model = speaker._loaded[0]
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    for seconds, rate in ((1, 24_000), (35, judges.RATE)):
        speaker.voice(Decoded("noise", np.full((seconds * rate, 1), 0.1, np.float32), rate))
    assert lengths == [judges.RATE, 30 * judges.RATE]


def test_less_than_half_a_second_has_no_voice(folder):
    short = Decoded("short", speech("alto").samples[: int(0.49 * judges.RATE)], judges.RATE)
    speaker = SpeakerModel(folder, CPU)
    assert speaker.similarity(short, speech("alto")) is speaker.similarity(speech("alto"), short) is None
    longer = Decoded("longer", speech("alto").samples[: int(0.51 * judges.RATE)], judges.RATE)
    assert speaker.similarity(longer, speech("alto")) is not None


def test_a_recogniser_knows_no_voices(tmp_path):
    (line,) = SpeakerModel(judges.ctc(tmp_path / "ctc"), CPU).problems()
    assert "Wav2Vec2ForCTC" in line and "x-vector" in line
