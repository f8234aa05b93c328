"""From a data file to samples: all that is wrong comes in one message, recordings are encoded once, nothing is lost."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.data.codec import Codec
from engine.data.dataset import Dataset, prepare, write_dropped
from engine.data.demo_speech import SENTENCES, VOICES, synthesize
from engine.data.labels import StreamIds, delayed_labels
from engine.data.prompts import IGNORED
from engine.errors import DataError, ModelError
from engine.model.weights import load_tokenizer
from engine.runtime.distributed import World
from tests.conftest import GOLDEN

WORLD = World(0, 0, 1, torch.device("cpu"))
SAMPLES = 9_600  # of a recording: 10 frames, 19 columns


@dataclass
class Folder:
    """A folder of recordings to write data files of."""

    path: Path
    codec: Path
    tokenizer: object

    def wav(self, name: str, wave: np.ndarray) -> str:
        soundfile.write(self.path / name, wave, 24_000, subtype="PCM_16")
        return name

    def prepare(self, rows, config: HiggsAudioV2Config | None = None, **settings) -> Dataset:
        self.file.write_text(json.dumps(rows))
        paths = dict(audio_tokenizer_path=str(self.codec), codes_cache_dir=str(self.path / "cache"))
        return prepare(
            str(self.file), Settings(**(paths | settings)), self.tokenizer, config or HiggsAudioV2Config(), WORLD
        )

    @property
    def file(self) -> Path:
        return self.path / "data.json"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer")


@pytest.fixture
def folder(tmp_path, demo, tokenizer):
    folder = Folder(tmp_path, demo.audio_tokenizer_path, tokenizer)
    for voice in sorted(VOICES)[:3]:
        folder.wav(f"{voice}.wav", synthesize(voice, SENTENCES[0])[:SAMPLES])
    return folder


@pytest.fixture
def encoded(monkeypatch):
    """Lengths of the waveforms that the codec has been given."""
    lengths, encode = [], Codec.encode

    def counting(self, waveforms):
        lengths.extend(map(len, waveforms))
        return encode(self, waveforms)

    monkeypatch.setattr(Codec, "encode", counting)
    return lengths


def say(text: str, audio: str, **keys) -> dict:
    """A row: asked for `text`, the assistant answers with the recording."""
    answer = {"role": "assistant", "content": {"type": "audio", "audio_url": audio}}
    return {"messages": [{"role": "user", "content": text}, answer], **keys}


def clone(text: str, reference: str, target: str) -> dict:
    row = say(text, target)
    row["messages"][0]["content"] = ["Reference.", {"type": "audio", "audio_url": reference}, text]
    return row


def problems_of(call, *args, **kwargs) -> list[str]:
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def test_samples_hold_the_codes_of_their_own_recordings(folder):
    rows = [say("One.", "alto.wav"), say("Two.", "child.wav"), clone("Three.", "alto.wav", "child.wav")]
    data = folder.prepare(rows)
    codec, stream = Codec.load(folder.codec), StreamIds()
    alto, child = (
        delayed_labels(codec.encode([soundfile.read(folder.path / f"{name}.wav", dtype="float32")[0]])[0], stream)
        for name in ("alto", "child")
    )
    for sample, expected in zip(data.samples, (alto, child, child), strict=True):
        np.testing.assert_array_equal(sample.audio_labels[-len(expected) :], expected)
    assert (data.samples[2].audio_labels[: len(alto)] == IGNORED).all(), "the reference is trained"
    assert [sample.row for sample in data.samples] == [0, 1, 2]
    assert data.audio_frames.tolist() == [19, 19, 38] and data.audio_targets.tolist() == [[11] * 8] * 3
    assert data.lengths == [len(sample) for sample in data.samples] and min(data.text_targets) > 0
    assert data.describe() == f"3 samples, {sum(data.lengths)} tokens, 0.1 min of audio (references included)"


def test_a_recording_of_many_rows_is_encoded_once(folder, encoded):
    rows = [say("One.", "alto.wav"), say("Two.", "alto.wav"), clone("Three.", "alto.wav", "child.wav")]
    content = (folder.path / "alto.wav").read_bytes()
    (folder.path / "copy.wav").write_bytes(content)
    embedded = say("Five.", "")
    embedded["messages"][1]["content"]["raw_audio"] = base64.b64encode(content).decode()
    rows += [say("Four.", "copy.wav"), embedded]
    first = folder.prepare(rows)
    assert encoded == [SAMPLES, SAMPLES], "alto and its copies are one recording, child another"
    again = folder.prepare(rows)
    assert len(encoded) == 2, "what the cache holds is encoded again"
    assert again.fingerprint == first.fingerprint


def test_every_bad_recording_is_named_with_its_rows(folder):
    (folder.path / "renamed.wav").write_text("This is no recording.")
    folder.wav("silent.wav", np.zeros(SAMPLES))
    folder.wav("empty.wav", np.zeros(0))
    problems = problems_of(folder.prepare, [
        say("Gone.", "gone.wav"),
        say("Fine.", "alto.wav"),
        say("Renamed.", "renamed.wav"),
        clone("Both.", "silent.wav", "gone.wav"),
        say("Empty.", "empty.wav"),
        say("Nothing to say it with.", "alto.wav") | {"messages": [{"role": "user", "content": "Hi."}]},
    ])  # fmt: skip
    path = folder.path
    assert problems[:-1] == [
        f"row 0: {path / 'gone.wav'}: no such file",
        f"row 2: {path / 'renamed.wav'}: not audio, or damaged: Format not recognised",
        f"row 3: {path / 'silent.wav'}: silent, its peak of 0.0e+00 is below 1e-04",
        f"row 3: {path / 'gone.wav'}: no such file",
        f"row 4: {path / 'empty.wav'}: empty, holds no samples",
    ]
    assert problems[-1].startswith("row 5: no assistant message, so there is nothing to train →")


def test_a_row_with_a_wrong_layout_still_has_its_recordings_checked(folder):
    rows = [say("Fine.", "gone.wav"), clone("Fine.", "alto.wav", "child.wav")]
    problems = problems_of(folder.prepare, rows, prompt_layout="voice_cloning")
    assert problems[0].startswith("row 0: prompt_layout voice_cloning needs")
    assert problems[1:] == [f"row 0: {folder.path / 'gone.wav'}: no such file"]


def test_a_clip_that_the_layout_leaves_out_stops_nothing(folder):
    row = clone("Fine.", "alto.wav", "child.wav")
    row["messages"].insert(0, {"role": "system", "content": {"type": "audio", "audio_url": "gone.wav"}})
    assert folder.prepare([row]).audio_frames.tolist() == [38]
    assert problems_of(folder.prepare, [row], prompt_layout="as_written") == [
        f"row 0: {folder.path / 'gone.wav'}: no such file"
    ]


@pytest.mark.parametrize("change, problem", [
    (dict(start_index=2), "start_index 2 leaves nothing to train → the last assistant message is number 1"),
    (dict(messages=[{"role": "assistant", "content": "Hi."}]), "no assistant message has audio → give the target"),
    (dict(messages=[{"role": "user", "content": "<|AUDIO|>"}, {"role": "assistant", "content": "Hi."}]),
     "a text contains <|AUDIO|> or <|AUDIO_OUT|> →"),
])  # fmt: skip
def test_a_row_that_trains_no_speech_is_refused(change, problem, folder):
    (only,) = problems_of(folder.prepare, [say("Fine.", "alto.wav"), say("Hi.", "child.wav") | change])
    assert only.startswith(f"row 1: {problem}")


def test_samples_over_the_budget_are_listed_or_left_out(folder):
    folder.wav("long.wav", np.concatenate([synthesize("tenor", SENTENCES[0])[:SAMPLES]] * 4))
    rows = [say("Long.", "long.wav"), say("Short.", "alto.wav"), say("Long again.", "long.wav")]
    lengths = folder.prepare(rows, max_tokens_per_micro_batch=None).lengths
    budget = dict(max_tokens_per_micro_batch=min(lengths))
    listed = [f"row {i}: {lengths[i]} tokens (2.0 s of audio)" for i in (0, 2)]
    with pytest.raises(DataError, match=f"2 of 3 samples .* → raise it to {max(lengths)} or more") as caught:
        folder.prepare(rows, **budget)
    assert caught.value.problems == listed and "set drop_long_samples" in str(caught.value)

    data = folder.prepare(rows, **budget, drop_long_samples=True)
    assert (data.lengths, data.dropped, data.samples[0].row) == ([min(lengths)], listed, 1)
    assert data.describe().endswith("; 2 too long and left out")
    said = []
    write_dropped(data, folder.path / "dropped.json", said.append)
    assert json.loads((folder.path / "dropped.json").read_text()) == listed
    assert said[0].startswith("left out as too long (2,") and [line.strip() for line in said[1:]] == listed

    with pytest.raises(DataError, match="no sample is left to train on; all are over 5 tokens"):
        folder.prepare(rows, max_tokens_per_micro_batch=5, drop_long_samples=True)


def test_the_fingerprint_is_of_all_that_is_trained(folder):
    rows = [clone("One.", "alto.wav", "child.wav"), say("Two.", "child.wav")]
    rows[1]["messages"].insert(1, {"role": "assistant", "content": "Here it is:"})
    variants = {
        "as it is": (rows, {}),
        "other text": ([rows[0], say("Too.", "child.wav")], {}),
        "other recording": ([rows[0], say("Two.", "alto.wav")], {}),
        "other start of training": ([rows[0], rows[1] | {"start_index": 2}], {}),
        "other order": (rows[::-1], {}),
        "fewer": (rows[:1], {}),
        "other layout": (rows, dict(prompt_layout="as_written")),
        "reference trained": (rows, dict(train_reference=True)),
    }
    prints = {name: folder.prepare(data, **settings).fingerprint for name, (data, settings) in variants.items()}
    assert len(set(prints.values())) == len(variants)
    renamed = folder.path / "renamed.wav"
    (folder.path / "child.wav").rename(renamed)
    moved = json.loads(json.dumps(rows).replace("child.wav", str(renamed)))
    assert folder.prepare(moved).fingerprint == prints["as it is"], "names are no data"


def test_a_codec_of_another_model_is_refused(folder):
    config = HiggsAudioV2Config(num_codebooks=4)
    with pytest.raises(ModelError, match="the codec has 8 codebooks, the model 4 → take the codec"):
        folder.prepare([say("One.", "alto.wav")], config)


def test_a_cache_folder_that_cannot_be_written_is_named(folder):
    with pytest.raises(DataError, match="codes_cache_dir .*data.json: .* → choose another folder"):
        folder.prepare([say("One.", "alto.wav")], codes_cache_dir=str(folder.file))
