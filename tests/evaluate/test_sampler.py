"""Samples while training: heard of the weights of now, on every backend, and training never notices."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from engine.data.codec import Codec
from engine.data.dataset import Dataset
from engine.data.prompts import PromptTokenizer
from engine.data.store import Store
from engine.evaluate.generate import generation_config, speak
from engine.evaluate.model_files import find
from engine.evaluate.prompts import of_sample, spread, stream_of
from engine.model.weights import load_tokenizer
from tests.commands import done
from tests.processes import run

SAMPLED = {"sample_every": 1, "sample_count": 2, "sample_seconds": 0.2}


@pytest.fixture(scope="module")
def store(demo, tmp_path_factory) -> Path:
    """The demo's recordings, prepared: training then needs no codec."""
    folder = tmp_path_factory.mktemp("samples")
    done(
        "prepare", train_data_file=demo.data_file, model_path=demo.model_path, out=folder / "store",
        audio_tokenizer_path=demo.audio_tokenizer_path, codes_cache_dir=folder / "codes",
    )  # fmt: skip
    return folder / "store"


def job(demo, store: Path, out: Path, **more) -> dict:
    """Settings of two short steps with every random thing that training has."""
    return {
        "model_path": str(demo.model_path), "audio_tokenizer_path": str(demo.audio_tokenizer_path),
        "train_data_file": [str(store)], "output_dir": str(out), "codes_cache_dir": str(out.parent / "codes"),
        "max_steps": 2, "logging_steps": 1, "warmup_steps": 0, "learning_rate": 1e-3, "save_steps": 100,
        "dataloader_num_workers": 0, "per_device_train_batch_size": 2, "report_to": [],
    } | more  # fmt: skip


LORA = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.3}


def losses(out: Path) -> list:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "codebook_losses", "eval_loss")
    return [[line.get(name) for name in names] for line in lines]


def samples(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples" / "samples.jsonl").read_text().splitlines()]


EACH = [(1, 0), (1, 1), (2, 0), (2, 1)]
"""Step and prompt of the lines of such a run."""


def places(lines: list[dict]) -> list[tuple[int, int]]:
    return [(line["step"], line["prompt"]) for line in lines]


def require_whole(out: Path) -> None:
    """Both prompts spoken at each step, with files for what is said to be there, and what was heard before."""
    lines = samples(out)
    assert places(lines) == EACH
    for line in lines:
        assert line["error"] is None and line["file"] == f"samples/step-{line['step']:06d}/{line['prompt']:02d}.wav"
        wave, rate = soundfile.read(out / line["file"])
        assert len(wave) == line["frames"] * 960 and line["seconds"] == pytest.approx(len(wave) / rate)
        assert line["frames"] <= 5 and (line["stopped"] or line["frames"] == 5)
        assert line["real_time_factor"] == pytest.approx(line["generation_seconds"] / line["seconds"], rel=0.05)
        target = soundfile.info(out / line["target"])
        assert line["target_seconds"] == pytest.approx(target.frames / target.samplerate, abs=1e-3)
        assert soundfile.info(out / line["reference"]).frames and line["scores"]["spectral_distance_db"] > 0


def train(settings: dict) -> str:
    switches = {name: str(value).lower() if isinstance(value, bool) else value for name, value in settings.items()}
    return done("train", **(switches | {"report_to": settings["report_to"] or "none"}))


def test_training_does_not_notice_and_goes_on_after_a_resume(demo, store, tmp_path):
    plain = job(demo, store, tmp_path / "plain", backend="none", **LORA)
    heard = job(demo, store, tmp_path / "heard", backend="none", **LORA, **SAMPLED)
    train(plain)
    said = train(heard)
    assert losses(tmp_path / "heard") == losses(tmp_path / "plain")
    require_whole(tmp_path / "heard")
    first = samples(tmp_path / "heard")
    assert "samples: " in said and said.count("stopped, ") == 2 and "; samples/step-000001" in said
    texts = [line["text"] for line in first[:2]]
    assert len(set(texts)) == 2 and all(text.strip() for text in texts)
    # the same prompts and draws at both steps, but other weights
    waves = [(tmp_path / "heard" / line["file"]).read_bytes() for line in first]
    assert waves[:2] != waves[2:] and texts == [line["text"] for line in first[2:]]
    # goes on after a line that a killed run has left, and has no time for its round
    with (tmp_path / "heard/samples/samples.jsonl").open("a") as file:
        file.write(json.dumps(first[0] | {"step": 3}) + "\n")
    said = train(heard | {"max_steps": 3, "resume": "auto", "sample_budget_s": 1e-3})
    lines = samples(tmp_path / "heard")
    assert lines[:4] == first and places(lines[4:]) == [(3, 0), (3, 1)]
    assert all(line["file"] is None and "sample_budget_s" in line["error"] for line in lines[4:])
    assert "note: sample(s) 0, 1 of step 3: " in said
    # what the run left speaks by itself: base, adapter, codec and layout are those of the run
    for number, folder in enumerate((tmp_path / "heard", tmp_path / "heard/checkpoint-3")):
        done("generate", model_path=folder, text="Hello.", max_seconds=0.2, out=tmp_path / f"{number}.wav")
    assert (tmp_path / "0.wav").read_bytes() == (tmp_path / "1.wav").read_bytes()


def test_sharded_weights_are_gathered_and_a_failure_leaves_training_alone(demo, store, tmp_path):
    """On two processes: FSDP with adapters, ZeRO 3 in full; ZeRO 2, where each process speaks, loses its codec."""
    # an evaluation leaves these weights whole, which neither gathering nor saving may stumble over
    whole = {"fsdp_reshard_after_forward": False, "validation_split": 0.2, "eval_steps": 1}
    fsdp, zero3 = {"backend": "fsdp", **LORA, **whole}, {"backend": "deepspeed", "ds_config": "zero3"}
    shutil.copytree(demo.audio_tokenizer_path, tmp_path / "codec")
    (tmp_path / "lost.py").write_text(LOST)
    lost = {"audio_tokenizer_path": str(tmp_path / "codec"), "callbacks": [f"{tmp_path}/lost.py:Lost"]}
    cases = {
        "fsdp": fsdp,
        "fsdp-heard": fsdp | SAMPLED,
        "zero3": zero3,
        "zero3-heard": zero3 | SAMPLED,
        "zero2-lost": {"backend": "deepspeed", **SAMPLED, **lost},
    }
    jobs = [job(demo, store, tmp_path / name, **more) for name, more in cases.items()]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    _, outputs = run(["-m", "tests.evaluate.sampler_worker", str(tmp_path / "jobs.json")], 2)
    for name in ("fsdp", "zero3"):
        assert losses(tmp_path / f"{name}-heard") == losses(tmp_path / name)
        require_whole(tmp_path / f"{name}-heard")
    lines = samples(tmp_path / "zero2-lost")
    assert places(lines) == EACH
    assert all("there are no weights" in line["error"] and line["file"] is None and line["text"] for line in lines)
    assert f"note: sample(s) 0, 1 of step 2: {lines[0]['error']}" in outputs[0]
    assert [line[0] for line in losses(tmp_path / "zero2-lost")] == [1, 2]
    assert "samples: " not in outputs[1]
    # ZeRO 3's gathered copy says what the model that it hands over says, on one process
    require_same_speech(demo, store, tmp_path / "zero3-heard")


LOST = """
from pathlib import Path
from engine.callbacks import Callback

class Lost(Callback):
    def on_start(self, run, step):
        for file in Path(run.settings.audio_tokenizer_path).glob("*.safetensors"):
            file.unlink(missing_ok=True)
"""


def require_same_speech(demo, store: Path, out: Path) -> None:
    found = find(out)
    model = found.load(torch.device("cpu"), torch.float32)
    data, codec = Dataset([Store(store)]), Codec.load(demo.audio_tokenizer_path)
    tokenize = PromptTokenizer(load_tokenizer(found.side_files))
    for i, index in enumerate(spread(data, 2)):
        prompt = of_sample(data[index], "", tokenize, stream_of(model.config))
        spoken = speak(model, prompt, generation_config(Path(demo.model_path), model.config, 1.0), 5, 42 + i)
        wave, _ = soundfile.read(out / "samples" / "step-000002" / f"{i:02d}.wav", dtype="float32")
        np.testing.assert_allclose(wave, codec.decode(spoken.codes), atol=1e-4)
