"""Tokens, streams and labels against the outputs of the original code, element by element."""

import json

import numpy as np
import pytest

from tests.conftest import GOLDEN

NAMES = [path.stem for path in sorted((GOLDEN / "boson").glob("*.json"))]
AUDIO_IN, AUDIO_OUT = 1015, 1016


@pytest.mark.parametrize("name", NAMES)
def test_sample_equals_the_original(name, golden_samples):
    wanted = json.loads((GOLDEN / "boson" / f"{name}.json").read_text())["merged"]
    sample = golden_samples[name]
    ids = np.array(wanted["input_ids"])
    ids[ids == AUDIO_IN] = AUDIO_OUT  # every audio position may carry the audio token
    np.testing.assert_array_equal(sample.input_ids, ids)
    np.testing.assert_array_equal(sample.labels, wanted["labels"])
    is_audio = np.array(wanted["audio_in_mask"]) + np.array(wanted["audio_out_mask"]) > 0
    np.testing.assert_array_equal(sample.input_ids == AUDIO_OUT, is_audio)
    np.testing.assert_array_equal(sample.audio_ids, np.array(wanted["stream_ids"])[is_audio].reshape(-1, 8))
    np.testing.assert_array_equal(sample.audio_labels, np.array(wanted["stream_labels"])[is_audio].reshape(-1, 8))


@pytest.mark.parametrize("name", NAMES)
def test_target_counts_equal_the_original(name, golden_samples):
    wanted = json.loads((GOLDEN / "boson" / f"{name}.json").read_text())["losses"]
    assert golden_samples[name].text_targets == wanted["text_count"]
    assert golden_samples[name].audio_targets.tolist() == wanted["audio_count_per_codebook"]
