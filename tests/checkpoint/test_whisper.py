"""The Whisper conditioning in checkpoints and in what leaves: resumed bit for bit, beside a model that transformers
loads as ever, and loaded back by the engine with the same bits.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.config import Settings
from engine.data.labels import Sample
from engine.data.mels import embeddings
from engine.data.packing import pack
from engine.data.prompts import IGNORED
from engine.errors import ModelError
from engine.export.consolidate import consolidate
from engine.export.merge import merge
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.initial import InitialWeights
from engine.model.weights import WeightFiles
from engine.model.whisper_source import FOLDER, of_folder, resolve
from engine.runtime.distributed import World
from tests.model.whisper_tiny import HEARD, random_mels, save_whisper, tiny_whisper
from tests.processes import run
from tests.tiny import AUDIO, CODEBOOKS, tiny_model

ALONE = World(0, 0, 1, torch.device("cpu"))
FULL = ["fsdp-whisper", "zero2-whisper-tower", "zero3-whisper-tower"]
LORA = ["fsdp-whisper-lora", "zero2-whisper-lora", "zero3-whisper-lora"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the base (model, whisper) and each case's checkpoint-2, written by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_model().save_pretrained(folder / "model")
    save_whisper(folder / "whisper")
    worker = ["-m", "tests.checkpoint.whisper_worker", str(folder / "model"), str(folder)]
    run([*worker, *FULL, *LORA, "fsdp-whisper-bf16"], world_size=2)  # asserts that a resume repeats the straight run
    return folder


def plain_transformers(folder: Path) -> None:
    _, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def engine(model: Path, **settings) -> HiggsEngine:
    fields = {"backend": "none", "model_path": str(model)} | settings
    return HiggsEngine(Settings(**fields).with_resolved(1, has_gpu=False), ALONE, WeightFiles(model), rounds=1)


@pytest.mark.parametrize("case", FULL)
def test_a_full_run_leaves_a_model_with_its_conditioning_beside(case, runs, tmp_path):
    consolidate(runs / case / "checkpoint-2", tmp_path / "out")
    plain_transformers(tmp_path / "out")
    kept = load_file(tmp_path / "out" / FOLDER / "model.safetensors")
    before = tiny_whisper().model.encoder.state_dict()
    for name, tensor in before.items():
        trained = "tower" in case and name != "embed_positions.weight"
        assert torch.equal(kept[f"encoder.{name}"], tensor) is not trained, name
    new = InitialWeights(WeightFiles(runs / "model"), Settings().seed, of_folder(runs / "whisper", 48))
    assert not torch.equal(kept["projection.weight"], new.read("whisper.projection.weight", torch.Size([48, 32])))
    loaded = engine(tmp_path / "out")
    assert f"whisper_conditioning: auto → {FOLDER}/ of this checkpoint" in loaded.summary
    state = loaded.backend.model.state_dict()
    assert all(torch.equal(state[f"whisper.{name}"], tensor) for name, tensor in kept.items())
    assert len(kept) == sum(name.startswith("whisper.") for name in state)


def test_backends_leave_the_same(runs, tmp_path):
    for case in FULL[1:]:
        consolidate(runs / case / "checkpoint-2", tmp_path / case)
    one, other = (load_file(tmp_path / case / FOLDER / "model.safetensors") for case in FULL[1:])
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-5)


def test_a_bf16_run_leaves_bf16(runs, tmp_path):
    consolidate(runs / "fsdp-whisper-bf16" / "checkpoint-2", tmp_path / "out")
    kept = load_file(tmp_path / "out" / FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    before = tiny_whisper().model.encoder.state_dict()
    assert all(torch.equal(kept[f"encoder.{name}"], tensor.bfloat16()) for name, tensor in before.items())


@pytest.mark.parametrize("case", LORA)
def test_adapters_carry_the_conditioning_and_merge_copies_it_on(case, runs, tmp_path):
    checkpoint = runs / case / "checkpoint-2"
    consolidate(checkpoint, tmp_path / "adapter")
    assert not any("whisper" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merge(runs / "model", tmp_path / "adapter", tmp_path / "merged")
    merge(runs / "model", checkpoint, tmp_path / "direct")
    plain_transformers(tmp_path / "merged")
    source, _ = resolve("auto", WeightFiles(tmp_path / "merged"))
    before = tiny_whisper().model.encoder.state_dict()
    assert all(torch.equal(source.read(f"whisper.encoder.{name}"), tensor) for name, tensor in before.items())
    kept = [load_file(tmp_path / name / FOLDER / "model.safetensors") for name in ("adapter", "merged", "direct")]
    assert all(torch.equal(kept[0][name], other[name]) for other in kept[1:] for name in kept[0])
    new = InitialWeights(WeightFiles(runs / "model"), Settings().seed, of_folder(runs / "whisper", 48))
    first = new.read("whisper.projection.weight", torch.Size([48, 32]))
    assert not torch.equal(kept[0]["projection.weight"], first), "the projection was not trained"


def test_an_adapter_needs_the_encoder_that_its_run_had(runs, tmp_path):
    encoder = runs / "whisper"
    encoder.rename(runs / "moved away")
    try:
        with pytest.raises(ModelError, match=f"{encoder}: no config.json there → give the folder of a Whisper"):
            consolidate(runs / LORA[0] / "checkpoint-2", tmp_path / "out")
    finally:
        (runs / "moved away").rename(encoder)
    assert not list(tmp_path.iterdir())


def test_files_can_be_read_by_whoever_may_read_the_others(runs, tmp_path):
    consolidate(runs / FULL[0] / "checkpoint-2", tmp_path / "out")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out" / FOLDER).iterdir()}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode & 0o777}


def test_it_trains_on_from_what_was_left_and_tells_recordings_apart(runs, tmp_path):
    """Two samples alike but for what is heard, and the word to say: 2 ln 2 is the least that a deaf model can reach."""
    consolidate(runs / FULL[0] / "checkpoint-2", tmp_path / "out")
    training = engine(tmp_path / "out", train_modules=["whisper.projection", "self_attn", "mlp", "text_lm_head"])
    before = training.backend.model.whisper.projection.weight.detach().clone()
    samples = [told_by_ear(clip, word) for clip, word in ((0, 20), (1, 30))]
    targets = Targets(2, (0,) * CODEBOOKS)
    losses = [training.train_step([pack(samples, AUDIO)], targets, 5e-3).sums[0].item() for _ in range(100)]
    assert losses[0] > 2 * np.log(2) and losses[-1] < 0.2
    assert not torch.equal(training.backend.model.whisper.projection.weight, before)


def told_by_ear(clip: int, word: int) -> Sample:
    mels = random_mels(np.random.default_rng(clip), 60)
    ids = np.array([5, *[HEARD] * embeddings(len(mels)), 6, 7, word], np.int32)
    labels = np.full(len(ids), IGNORED, np.int32)
    labels[-1] = word
    nothing = np.zeros((0, CODEBOOKS), np.int16)
    return Sample(ids, labels, nothing, nothing, mels=(mels,), mel_starts=(1,))


def test_off_leaves_the_model_as_it_ever_was(runs):
    names = set(tiny_model().state_dict())
    for setting in ("off", "auto"):
        assert set(engine(runs / "model", whisper_conditioning=setting).backend.model.state_dict()) == names
    assert not any("whisper" in line for line in engine(runs / "model", whisper_conditioning="off").summary)
