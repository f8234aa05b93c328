"""Log-mels against transformers' feature extractor, and the arithmetic of positions against the layers themselves."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import WhisperFeatureExtractor

from engine.data.mels import CHUNK_FRAMES, HOP, TAIL, MelExtractor, chunks, embeddings, mel_rows

CHUNK = CHUNK_FRAMES * HOP


def extractor(n_mels: int = 16) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=n_mels)


def noise(samples: int) -> np.ndarray:
    rng = np.random.default_rng(samples)
    return (rng.normal(0, 0.1, samples) * np.linspace(1, 0.01, samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 15_999, 16_000, CHUNK - HOP, CHUNK, CHUNK + 1, CHUNK + 40_123])
def test_each_chunk_is_what_transformers_gives(samples):
    wave = noise(samples)
    mels = MelExtractor(extractor().to_dict())(wave)
    assert mels.dtype == np.float16 and mels.shape == (mel_rows(samples), 16)
    whole = [
        extractor()(wave[at : at + CHUNK], sampling_rate=16_000, return_tensors="np", return_attention_mask=True)
        for at in range(0, samples, CHUNK)
    ]
    for (start, frames), wanted in zip(chunks(len(mels)), whole, strict=True):
        assert frames == wanted.attention_mask.sum()
        kept = min(frames + TAIL, CHUNK_FRAMES)
        values = wanted.input_features[0].T
        np.testing.assert_array_equal(mels[start : start + kept], values[:kept].astype(np.float16))
        silence = values[kept:]
        assert not len(silence) or np.ptp(silence) == 0, "past the tail there is more than silence"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 2 * CHUNK_FRAMES + 50))
def test_positions_are_those_that_the_layers_give(frames):
    conv1, conv2 = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, stride=2, padding=1)
    count = 0
    for start in range(0, frames, CHUNK_FRAMES):
        with torch.no_grad():
            x = conv2(conv1(torch.zeros(1, 1, min(CHUNK_FRAMES, frames - start))))
        count += nn.AvgPool1d(2, 2)(x).shape[-1] if x.shape[-1] > 1 else 0
    assert embeddings(frames + TAIL) == count


def test_twenty_five_positions_a_second():
    assert embeddings(mel_rows(16_000)) == 25
    assert embeddings(mel_rows(CHUNK)) == 750
    assert embeddings(mel_rows(320)) == 0 and embeddings(mel_rows(321)) == 1


def test_the_identity_is_that_of_the_values():
    one, other = MelExtractor(extractor(16).to_dict()), MelExtractor(extractor(20).to_dict())
    assert one.identity == MelExtractor(extractor(16).to_dict()).identity != other.identity


def test_workers_get_it_by_pickle():
    one = MelExtractor(extractor().to_dict())
    again = pickle.loads(pickle.dumps(one))
    assert again.identity == one.identity
    np.testing.assert_array_equal(again(noise(5000)), one(noise(5000)))
