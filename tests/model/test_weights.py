"""Model folders of both formats: what is read, and what is refused with the reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.model.initial import InitialWeights, build_on_meta
from engine.model.keys import adapter_name, base_name, native_name
from engine.model.weights import WeightFiles


@pytest.fixture
def original(golden_model, tmp_path):
    return shutil.copytree(golden_model, tmp_path / "original")


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def check(folder):
    files = WeightFiles(folder)
    InitialWeights(files, seed=0).check(build_on_meta(files.config))
    return files


def test_the_original_format_is_complete_and_bit_exact(original):
    files = check(original)
    stored = load_file(original / "model.safetensors")
    assert files.format == "original" and len(files.shapes) == len(stored) == 33
    for key, tensor in stored.items():
        assert torch.equal(files.read(native_name(key)), tensor)


def test_rows_are_read_across_split_tensors(original):
    """freeze_embed_until_idx of the original trains the lower part of an embedding or head as a tensor of its own."""
    whole = load_file(original / "model.safetensors")["embed_tokens.weight"]

    def split(tensors):
        del tensors["embed_tokens.weight"]
        tensors["embed_tokens.embedding_trainable.weight"] = whole[1000:].clone()
        tensors["embed_tokens.embedding_frozen.weight"] = whole[:1000].clone()

    edit_weights(original, split)
    files = check(original)
    assert torch.equal(files.read("model.embed_tokens.weight"), whole)
    assert torch.equal(files.read("model.embed_tokens.weight", 990, 1010), whole[990:1010])
    assert files.read("model.embed_tokens.weight", 5, 5).shape == (0, whole.shape[1])


@pytest.mark.parametrize(
    "change",
    [
        {"audio_dual_ffn_layers": [0]}, {"use_delay_pattern": False}, {"use_audio_out_self_attention": True},
        {"audio_embed_avg": True}, {"use_audio_out_embed_projector": True}, {"audio_decoder_proj_num_layers": 2},
        {"audio_adapter_type": "stack"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_variants_that_the_native_model_cannot_hold_are_refused(original, change):
    edit_config(original, **change)
    with pytest.raises(ModelError, match=f"needs .*{next(iter(change))}"):
        WeightFiles(original)


def test_a_missing_text_head_is_explained(original):
    edit_weights(original, lambda tensors: tensors.pop("audio_decoder_proj.text_lm_head.weight"))
    with pytest.raises(ModelError, match="text_lm_head.weight is missing.*saved without its text head"):
        check(original)


def test_missing_unexpected_and_misshapen_are_all_listed(original):
    def damage(tensors):
        del tensors["norm.weight"]
        tensors["extra.weight"] = torch.zeros(2)
        tensors["embed_tokens.weight"] = torch.zeros(7, 64)

    edit_weights(original, damage)
    with pytest.raises(ModelError) as error:
        check(original)
    for text in ("model.norm.weight is missing", "extra.weight is not part", "embed_tokens.weight has shape (7, 64)"):
        assert text in str(error.value)


def test_a_native_config_with_the_class_default_codebook_size_is_refused(demo, tmp_path):
    folder = shutil.copytree(demo.model_path, tmp_path / "native")
    edit_config(folder, codebook_size=1024)
    with pytest.raises(ModelError, match="set 1026"):
        WeightFiles(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: edit_config(folder, model_type="llama"), "model_type is 'llama'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678 nonsense"), "not a readable safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
    ],
)
def test_folders_that_are_no_model(original, damage, message):
    damage(original)
    with pytest.raises(ModelError, match=message):
        WeightFiles(original)


@pytest.mark.parametrize(
    "parameter, base, adapter",
    [
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight", None),
        ("base_model.model.audio_lm_head.original_module.weight", "audio_lm_head.weight", None),
        ("base_model.model.audio_lm_head.modules_to_save.default.weight", "audio_lm_head.weight",
         "base_model.model.audio_lm_head.weight"),
        ("base_model.model.model.norm.weight", "model.norm.weight", None),
    ],
)  # fmt: skip
def test_names_behind_wrappers(parameter, base, adapter):
    assert base_name(parameter) == base
    if adapter:
        assert adapter_name(parameter) == adapter


def test_adapters_start_alike_whatever_their_shards(golden_model):
    weights = InitialWeights(WeightFiles(golden_model), seed=3)
    name, shape = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", torch.Size([4, 64])
    whole = weights.read(name, shape)
    assert torch.equal(torch.cat([weights.read(name, shape, 0, 3), weights.read(name, shape, 3, 4)]), whole)
    assert whole.abs().max() <= 1 / 8 and whole.std() > 0.05
    assert not weights.read(name.replace("lora_A", "lora_B"), torch.Size([64, 4])).any()
