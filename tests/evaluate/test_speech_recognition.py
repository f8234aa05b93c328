"""Recognisers from a folder: both kinds are run, clips of any rate and length are heard, a wrong folder is named.

The models are random but for their last layer, which hears one letter in everything.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.audio import Decoded
from engine.errors import ModelError
from engine.evaluate.speech_recognition import SpeechRecogniser
from tests.evaluate import judges

CPU = torch.device("cpu")


def noise(seconds: float, rate: int = 24_000) -> Decoded:
    wave = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    return Decoded("noise", wave.astype(np.float32)[:, None], rate)


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    return judges.ctc(tmp_path_factory.mktemp("ctc") / "model", says="B")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return judges.whisper(tmp_path_factory.mktemp("whisper") / "model", says="b")


def heard_samples(recogniser: SpeechRecogniser, clip: Decoded) -> list[int]:
    """Samples in each call of the model for a clip."""
    recogniser.transcribe(noise(0.2))
    lengths: list[int] = []
    model = recogniser._pipeline.model
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: lengths.append(inputs["input_values"].shape[-1]), with_kwargs=True
    )
    recogniser.transcribe(clip)
    hook.remove()
    return lengths


def test_ctc_spells(ctc):
    recogniser = SpeechRecogniser(ctc, CPU)
    assert recogniser.problems() == []
    assert recogniser.transcribe(noise(1)) == "B"  # equal frames are one letter
    assert recogniser.transcribe(noise(0.05)) == ""


def test_clips_are_heard_at_the_rate_of_the_model(ctc):
    recogniser = SpeechRecogniser(ctc, CPU)
    assert heard_samples(recogniser, noise(1.5, 24_000)) == heard_samples(recogniser, noise(1.5, 44_100)) == [24_000]


def test_ctc_hears_long_clips_in_windows_of_30_seconds(ctc):
    lengths = heard_samples(SpeechRecogniser(ctc, CPU), noise(65, judges.RATE))
    # Each begins 20 s after the one before it: 0 to 30, 20 to 50, 40 to 65.
    assert [round(length / judges.RATE) for length in lengths] == [30, 30, 25]


def test_whisper_writes(whisper):
    recogniser = SpeechRecogniser(whisper, CPU)
    assert recogniser.problems() == []
    short, long = recogniser.transcribe(noise(2)), recogniser.transcribe(noise(65))
    assert set(short) == set(long) == {"b"}  # and no special token, no timestamp
    assert len(long) > len(short)  # the second and the third window are heard, too


def test_the_folder_of_another_model_is_named(tmp_path):
    voices = judges.voices(tmp_path / "voices")
    (line,) = SpeechRecogniser(voices, CPU).problems()
    assert str(voices) in line and "WavLMForXVector" in line and "→" in line
    (line,) = SpeechRecogniser(tmp_path / "nothing", CPU).problems()
    assert "config.json cannot be read: No such file" in line
    (tmp_path / "config.json").write_text('{"architectures": [3, {}]}')
    lines = SpeechRecogniser(tmp_path, CPU).problems()
    assert len(lines) == 2 and "preprocessor_config.json" in lines[1]


@pytest.mark.parametrize("left_out", ["preprocessor_config.json", "tokenizer"])
def test_a_folder_with_weights_only_is_not_enough(tmp_path, left_out):
    folder = judges.ctc(tmp_path / "model")
    for file in folder.iterdir():
        if file.name.startswith(("tokenizer", "vocab") if left_out == "tokenizer" else left_out):
            file.unlink()
    (line,) = SpeechRecogniser(folder, CPU).problems()
    assert left_out in line and "copy all files" in line


def test_missing_weights_are_an_error_and_not_random(tmp_path):
    folder = judges.ctc(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "lm_head" not in name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lm_head.weight"):
        SpeechRecogniser(folder, CPU).transcribe(noise(1))


def test_code_in_the_folder_is_not_run(tmp_path):
    folder = judges.ctc(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCTC": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot be loaded"):
        SpeechRecogniser(folder, CPU).transcribe(noise(1))
    assert not (tmp_path / "ran").exists()
