"""Where the encoder comes from: original checkpoints, Whisper folders, the engine's own; and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor

from engine.data.mels import MelExtractor
from engine.errors import ModelError
from engine.model import whisper_source
from engine.model.initial import InitialWeights, build_on_meta
from engine.model.safetensors_writer import Spec
from engine.model.weights import WeightFiles
from engine.model.whisper_source import resolve
from tests.model.test_weights import edit_config, edit_weights
from tests.model.whisper_tiny import N_MELS, save_whisper, tiny_whisper

WIDTH = 64
PARTS = {"whole": lambda w: w, "model": lambda w: w.model, "encoder": lambda w: w.model.encoder}


@pytest.fixture
def original(golden_model, tmp_path):
    return shutil.copytree(golden_model, tmp_path / "original")


@pytest.fixture
def with_tower(original):
    """An original checkpoint with an audio tower."""
    encoder = tiny_whisper().model.encoder.state_dict()
    torch.manual_seed(5)
    projection = {"weight": torch.randn(WIDTH, 32), "bias": torch.randn(WIDTH)}

    def add(tensors):
        tensors.update({f"audio_tower.{name}": tensor for name, tensor in encoder.items()})
        tensors.update({f"audio_encoder_proj.linear.{name}": tensor for name, tensor in projection.items()})

    edit_weights(original, add)
    tower = {"num_mel_bins": N_MELS, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4}
    tower |= {"encoder_ffn_dim": 48, "max_source_positions": 1500, "model_type": "higgs_audio_encoder"}
    edit_config(original, skip_audio_tower=False, encode_whisper_embed=True, audio_encoder_config=tower)
    return original


def test_the_tower_of_an_original_checkpoint(with_tower):
    files = WeightFiles(with_tower)
    source, line = resolve("auto", files)
    assert line == "whisper_conditioning: auto → the audio tower of this checkpoint"
    stored = load_file(with_tower / "model.safetensors")
    weights = InitialWeights(files, 0, source)
    for name, parameter in source.build_on_meta().named_parameters():
        original = f"audio_tower.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else None
        original = original or name.replace("projection", "audio_encoder_proj.linear")
        assert torch.equal(weights.read(f"whisper.{name}", parameter.shape), stored[original])
    InitialWeights(files, 0).check(build_on_meta(files.config))
    assert MelExtractor(source.preprocessor).n_mels == N_MELS


@pytest.mark.parametrize(
    "setting, changes, line",
    [
        ("off", {}, "whisper_conditioning: off, the audio tower of this checkpoint is left out"),
        ("auto", {"encode_whisper_embed": False}, "auto → off, this checkpoint was trained without its audio tower"),
        ("auto", {"skip_audio_tower": True}, "auto → off, this checkpoint has no audio tower"),
    ],
)
def test_a_tower_that_is_not_used(with_tower, setting, changes, line):
    edit_config(with_tower, **changes)
    source, why = resolve(setting, WeightFiles(with_tower))
    assert source is None and why.endswith(line)


def test_a_checkpoint_without_tower(original):
    assert resolve("off", WeightFiles(original)) == (None, None)
    assert resolve("auto", WeightFiles(original)) == (
        None, "whisper_conditioning: auto → off, this checkpoint has no audio tower",
    )  # fmt: skip


def test_a_promised_tower_that_is_missing(original):
    edit_config(original, skip_audio_tower=False, encode_whisper_embed=True)
    with pytest.raises(ModelError, match="audio_tower and audio_encoder_proj are not among the weights.*off"):
        resolve("auto", WeightFiles(original))
    assert resolve("off", WeightFiles(original))[0] is None


@pytest.mark.parametrize("part", PARTS)
def test_any_whisper_folder_gives_its_encoder_and_a_new_projection(part, golden_model, tmp_path):
    folder = save_whisper(tmp_path / "whisper", PARTS[part])
    files = WeightFiles(golden_model)
    source, line = resolve(str(folder), files)
    assert line == f"whisper_conditioning: {folder}, with a new projection"
    encoder = tiny_whisper().model.encoder.state_dict()
    assert source.shapes.keys() == {f"whisper.encoder.{name}" for name in encoder}
    assert all(torch.equal(source.read(f"whisper.encoder.{name}"), tensor) for name, tensor in encoder.items())


def test_a_new_projection_depends_on_the_seed_alone(golden_model, tmp_path):
    files = WeightFiles(golden_model)
    source, _ = resolve(str(save_whisper(tmp_path / "whisper")), files)
    name, shape = "whisper.projection.weight", torch.Size([WIDTH, 32])
    whole = InitialWeights(files, 3, source).read(name, shape)
    adapted = InitialWeights(files, 3, source)
    halves = [adapted.read(f"base_model.model.{name}", shape, *rows) for rows in ((0, 40), (40, 64))]
    assert torch.equal(torch.cat(halves), whole) and whole.std() > 0.05
    assert not torch.equal(InitialWeights(files, 4, source).read(name, shape), whole)
    assert not InitialWeights(files, 3, source).read("whisper.projection.bias", torch.Size([WIDTH])).any()


def edited(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(folder, *names):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "no config.json there → give the folder of a Whisper model"),
        (lambda f: edited(f, "config.json", model_type="wav2vec2"), "model_type is 'wav2vec2', not whisper"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "no usable feature extractor.*preprocessor_config.json"),
        (lambda f: WhisperFeatureExtractor(feature_size=80).save_pretrained(f), "mel bins: 80 instead of 16"),
        (lambda f: edited(f, "preprocessor_config.json", hop_length=80), "hop length: 80 instead of 160"),
        (lambda f: edited(f, "config.json", max_source_positions=750), "max_source_positions: 750 instead of 1500"),
        (lambda f: edited(f, "config.json", encoder_layers=1), "encoder.layers.1.fc1.weight has no place"),
        (lambda f: drop(f, "model.encoder.conv1.bias"), "encoder.conv1.bias is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_folders_that_are_no_whisper_model(golden_model, tmp_path, damage, message):
    folder = save_whisper(tmp_path / "whisper")
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){folder}.*{message}"):
        resolve(str(folder), WeightFiles(golden_model))


def test_a_projection_to_another_width_is_refused(golden_model, tmp_path):
    folder = save_whisper(tmp_path / "whisper")
    source = whisper_source.of_folder(folder, 48)
    kept = tmp_path / "kept"
    source.describe(kept)
    wide = {"whisper.projection.weight": torch.zeros(48, 32), "whisper.projection.bias": torch.zeros(48)}
    shapes = source.shapes | {name: tuple(tensor.shape) for name, tensor in wide.items()}
    specs = {name: Spec(shape, torch.float32) for name, shape in shapes.items()}
    whisper_source.write_weights(kept, specs, lambda name: wide[name] if name in wide else source.read(name))
    assert whisper_source.of_folder(kept, 48).has_projection
    with pytest.raises(ModelError, match=r"projection.weight has shape \(48, 32\), \(64, 32\) is needed"):
        resolve(str(kept), WeightFiles(golden_model))
