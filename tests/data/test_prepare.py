"""From a data file to a store: all that is wrong comes in one message, recordings are encoded once, nothing is lost."""

import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.data.codec import Codec
from engine.data.dataset import Dataset, require_fit, write_dropped
from engine.data.demo_speech import SENTENCES, VOICES, synthesize
from engine.data.labels import StreamIds, delayed_labels
from engine.data.prepare import identity_of, prepare
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
        settings = Settings(**(paths | settings))
        config = config or HiggsAudioV2Config()
        self.said = []
        store = prepare(str(self.file), self.store, settings, self.tokenizer, config, WORLD, say=self.said.append)
        return Dataset([store]).within(settings.max_tokens_per_micro_batch, settings.drop_long_samples)

    @property
    def store(self) -> Path:
        return self.path / "store"

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
    for sample, expected in zip(data, (alto, child, child), strict=True):
        np.testing.assert_array_equal(sample.audio_labels[-len(expected) :], expected)
    assert (data[2].audio_labels[: len(alto)] == IGNORED).all(), "the reference is trained"
    assert [sample.row for sample in data] == [0, 1, 2]
    assert data.audio_frames.tolist() == [19, 19, 38] and data.audio_targets.tolist() == [11] * 3
    assert data.lengths.tolist() == [len(sample) for sample in data] and min(data.text_targets) > 0
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
    assert [problem.split(" → ")[0] for problem in problems[:-1]] == [
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
    assert problems[0].startswith("row 0: voice_cloning needs one reference, the row has 0 →")
    assert problems[1:] == [f"row 0: {folder.path / 'gone.wav'}: no such file → correct the path"]


def test_a_clip_that_the_layout_leaves_out_stops_nothing(folder):
    row = clone("Fine.", "alto.wav", "child.wav")
    row["messages"].insert(0, {"role": "system", "content": {"type": "audio", "audio_url": "gone.wav"}})
    assert folder.prepare([row]).audio_frames.tolist() == [38]
    assert problems_of(folder.prepare, [row], prompt_layout="as_written") == [
        f"row 0: {folder.path / 'gone.wav'}: no such file → correct the path"
    ]


@pytest.mark.parametrize("change, problem", [
    (dict(start_index=2), "start_index 2 leaves nothing to train → the last assistant message is number 1"),
    (dict(messages=[{"role": "assistant", "content": "Hi."}]), "no assistant message has audio → give the target"),
])  # fmt: skip
def test_a_row_that_trains_no_speech_is_refused(change, problem, folder):
    (only,) = problems_of(folder.prepare, [say("Fine.", "alto.wav"), say("Hi.", "child.wav") | change])
    assert only.startswith(f"row 1: {problem}")


def test_a_placeholder_in_a_text_is_refused(folder):
    (only,) = problems_of(folder.prepare, [say("Fine.", "alto.wav"), say("Say <|AUDIO|>.", "child.wav")])
    assert only.startswith("row 1: a text contains <|AUDIO|> or <|AUDIO_OUT|> →")


def test_samples_over_the_budget_are_listed_or_left_out(folder):
    folder.wav("long.wav", np.concatenate([synthesize("tenor", SENTENCES[0])[:SAMPLES]] * 4))
    rows = [say("Long.", "long.wav"), say("Short.", "alto.wav"), say("Long again.", "long.wav")]
    lengths = folder.prepare(rows, max_tokens_per_micro_batch=None).lengths.tolist()
    budget = dict(max_tokens_per_micro_batch=min(lengths))
    listed = [f"row {i}: {lengths[i]} tokens (2.0 s of audio)" for i in (0, 2)]
    with pytest.raises(DataError, match=f"2 of 3 samples .* → raise it to {max(lengths)} or more") as caught:
        folder.prepare(rows, **budget)
    assert caught.value.problems == listed and "set drop_long_samples" in str(caught.value)

    data = folder.prepare(rows, **budget, drop_long_samples=True)
    assert (data.lengths.tolist(), list(data.dropped), data[0].row) == ([min(lengths)], listed, 1)
    assert data.describe().endswith("; 2 too long and left out")
    said = []
    write_dropped(data, folder.path / "dropped.json", said.append)
    assert json.loads((folder.path / "dropped.json").read_text()) == listed
    assert said[0].startswith("left out as too long (2,") and [line.strip() for line in said[1:]] == listed

    with pytest.raises(DataError, match="no sample is left to train on; all are over 5 tokens"):
        folder.prepare(rows, max_tokens_per_micro_batch=5, drop_long_samples=True)


def test_bad_rows_up_to_the_share_that_is_allowed_are_left_out_and_named(folder):
    rows = [say("Gone.", "gone.wav"), say("Fine.", "alto.wav"), say("Fine too.", "child.wav")]
    with pytest.raises(DataError, match=r"1 of 3 row\(s\) cannot be used \(max_bad_fraction is 0.3\)"):
        folder.prepare(rows, max_bad_fraction=0.3)
    assert not folder.store.exists() and (folder.path / "store-report" / "report.html").is_file()
    data = folder.prepare(rows, max_bad_fraction=0.34)
    assert [sample.row for sample in data] == [1, 2]
    summary = json.loads((folder.store / "report.json").read_text())
    assert [row["row"] for row in summary["rejected_rows"]] == [0] and "gone.wav" in "\n".join(folder.said)


def test_a_reference_is_paired_with_another_clip_of_the_speaker(folder):
    shutil.copy(folder.path / "alto.wav", folder.path / "same.wav")
    folder.wav("alto2.wav", synthesize("alto", SENTENCES[1])[:SAMPLES])
    rows = [say(f"{name}.", f"{name}.wav", speaker="alto") for name in ("alto", "same", "alto2")]
    rows += [say("Child.", "child.wav", speaker="child")]
    for row in rows:
        row["misc"] = {"task_type": "single_speaker_smart_voice"}
    data = folder.prepare(rows, pair_references=True)
    contexts, targets = data.stores[0].first_clips()
    assert None not in contexts[:3] and contexts[3] is None
    assert all(context != target for context, target in zip(contexts, targets, strict=True)), "it hears the target"
    assert len({contexts[0], contexts[1]}) == 1, "there is one other recording for both copies"
    assert "no other clip of speaker 'child'" in "\n".join(folder.said)
    assert folder.prepare(rows, pair_references=True).fingerprint == data.fingerprint
    apart = folder.prepare(rows, pair_references=True, reference_dropout=0.99)
    assert apart.stores[0].first_clips()[0] == [None] * 4 and apart.lengths.sum() < data.lengths.sum()


def test_inline_codes_are_trained_as_they_are(folder):
    codes = np.random.default_rng(0).integers(0, 1024, (8, 12))
    row = say("Codes.", "")
    row["messages"][1]["content"] = {"type": "audio", "audio_tokens": codes.tolist()}
    (sample,) = folder.prepare([row])
    np.testing.assert_array_equal(sample.audio_labels, delayed_labels(codes, StreamIds()))
    row["messages"][1]["content"]["audio_tokens"] = codes[:4].tolist()
    (only,) = problems_of(folder.prepare, [row])
    assert only.startswith("row 0: codes of 12 frames: shape [4, 12] → the codec's are [8,")


def test_the_number_of_parts_changes_nothing_but_the_order(folder):
    rows = [say(f"Number {number}.", f"{name}.wav") for number in range(10) for name in ("alto", "child", "bass")]
    rows = [row for row in rows if (folder.path / row["messages"][1]["content"]["audio_url"]).exists()]
    whole, parts = folder.prepare(rows), folder.prepare(rows, store_shard_samples=4)
    assert len(parts.stores[0].parts) > 2 and sorted(parts.rows) == sorted(whole.rows)
    by_row = {sample.row: sample for sample in whole}
    for sample in parts:
        np.testing.assert_array_equal(sample.input_ids, by_row[sample.row].input_ids)
        np.testing.assert_array_equal(sample.audio_ids, by_row[sample.row].audio_ids)


def test_a_store_of_other_making_is_refused_with_the_difference(folder):
    store = folder.prepare([say("One.", "alto.wav")]).stores[0]
    settings = Settings(audio_tokenizer_path=str(folder.codec), scene="A busy street.")
    wanted = identity_of(settings, folder.tokenizer, None)
    with pytest.raises(DataError, match="does not fit this run →") as caught:
        require_fit(store, wanted, HiggsAudioV2Config())
    default = "'Audio is recorded from a quiet room.'"
    assert caught.value.problems == [f"scene: the store has {default}, this run 'A busy street.'"]
    same = identity_of(Settings(audio_tokenizer_path=None), folder.tokenizer, None)
    require_fit(store, same, HiggsAudioV2Config())  # without the codec at hand, its hash is not compared
    with pytest.raises(DataError, match=r"the store has \(8, 1024, 1025\), the model \(4,"):
        require_fit(store, same, HiggsAudioV2Config(num_codebooks=4))


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
    with pytest.raises(DataError, match="data.json.*: Not a directory → .* another codes_cache_dir"):
        folder.prepare([say("One.", "alto.wav")], codes_cache_dir=str(folder.file))
