"""Whisper conditioning on the command line: data, training, resume, the final model, and training on from that."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.data.store import Store
from tests.checkpoint.test_resume import trajectory
from tests.commands import command, done
from tests.model.whisper_tiny import N_MELS, save_whisper


@pytest.fixture(scope="module")
def settings(demo, tmp_path_factory) -> dict:
    """Of a run that lets the demo's references be heard."""
    folder = tmp_path_factory.mktemp("whisper")
    return dict(
        train_data_file=demo.data_file, model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path,
        whisper_conditioning=save_whisper(folder / "tiny"), prompt_layout="reference_in_system", backend="none",
        codes_cache_dir=folder / "codes", max_steps=3, save_steps=1, logging_steps=1, dataloader_num_workers=0,
        max_tokens_per_micro_batch=900, learning_rate=1e-3, warmup_steps=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """The output of an undisturbed run."""
    out = tmp_path_factory.mktemp("straight") / "out"
    said = done("train", **settings, output_dir=out)
    assert f"whisper_conditioning: {settings['whisper_conditioning']}, with a new projection" in said
    return out


def test_the_references_are_prepared_to_be_heard(settings, straight):
    store = Store(straight / "data" / "train-0")
    assert store.is_heard and store.header["identity"]["whisper"] and store.parts[0].mels.shape[1] == N_MELS
    assert len(store.parts[0].mel_ends) == len(store.parts[0].clip_ends)
    for number in range(len(store)):
        sample = store.sample(number)
        assert len(sample.mels) == 1 and sample.input_ids[sample.mel_starts[0]] == store.special.audio_in


def test_what_is_heard_makes_a_difference(settings, straight, tmp_path):
    done("train", **settings | {"whisper_conditioning": "off", "max_steps": 1}, output_dir=tmp_path)
    assert not Store(tmp_path / "data" / "train-0").is_heard
    deaf, heard = trajectory(tmp_path)[1], trajectory(straight)[1]
    assert deaf[:-1] != heard[:-1] and deaf[-1] < heard[-1], "Whisper positions are tokens too"


def test_a_resume_goes_on_exactly(settings, straight, tmp_path):
    shutil.copytree(straight / "checkpoint-1", tmp_path / "checkpoint-1")
    said = done("train", **settings, output_dir=tmp_path, resume="auto")
    assert "resumed checkpoint-1" in said
    wanted, found = trajectory(straight), trajectory(tmp_path)
    assert sorted(found) == [2, 3] and found == {step: wanted[step] for step in found}


def test_the_final_model_is_trained_on_with_its_own_conditioning(settings, straight, tmp_path):
    model = straight / "model"
    assert (model / "whisper_conditioning" / "model.safetensors").is_file()
    _, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(model, use_text_head=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = settings | dict(model_path=model, whisper_conditioning="auto", max_steps=1, learning_rate=1e-9)
    assert "whisper_conditioning: auto → whisper_conditioning/ of this" in done("train", **again, output_dir=tmp_path)
    assert trajectory(tmp_path)[1][0] < trajectory(straight)[1][0], "the same batch as at first, before any training"


def test_a_prepared_store_is_heard_only_by_the_whisper_it_was_made_for(settings, straight, tmp_path):
    names = ("train_data_file", "model_path", "audio_tokenizer_path", "codes_cache_dir", "prompt_layout")
    making = {name: settings[name] for name in (*names, "whisper_conditioning")}
    said = done("prepare", out=tmp_path / "store", **making)
    assert "with a new projection" in said
    run = settings | dict(train_data_file=tmp_path / "store", max_steps=1)
    done("train", **run, output_dir=tmp_path / "out")
    assert trajectory(tmp_path / "out")[1] == trajectory(straight)[1]
    code, _, errors = command("train", **run | {"whisper_conditioning": "off"}, output_dir=tmp_path / "off")
    assert code == 2 and "store: the store does not fit this run" in errors and "  - whisper: the store has '" in errors
    report = tmp_path / "report"
    done("validate", report=report, **making)
    foretold, made = (
        [json.loads(line)["tokens"] for line in (folder / "rows.jsonl").read_text().splitlines()]
        for folder in (report, tmp_path / "store")
    )
    assert foretold == made


def test_a_reference_known_by_its_codes_only_cannot_be_heard(settings, tmp_path):
    codes = {"type": "audio", "audio_codes": [[1, 2, 3]] * 8}
    target = {"type": "audio", "audio_codes": [[4, 5, 6]] * 8}
    row = {"messages": [{"role": "user", "content": [codes, "Hi."]}, {"role": "assistant", "content": target}]}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    names = ("model_path", "audio_tokenizer_path", "codes_cache_dir", "prompt_layout", "whisper_conditioning")
    making = {name: settings[name] for name in names} | {"train_data_file": tmp_path / "data.json"}
    assert command("validate", report=tmp_path / "report", **making).code == 2
    assert command("prepare", out=tmp_path / "store", **making).code == 2
    foretold, made = (json.loads((tmp_path / name / "rows.jsonl").read_text()) for name in ("report", "store-report"))
    words = "has no waveform → give the audio file if its sound is needed → whisper_conditioning needs the audio of"
    assert foretold == made and words in made["problems"][0]
    assert command("prepare", out=tmp_path / "store", **making | {"whisper_conditioning": "off"}).code == 0
