"""Model and adapter folders: opened, or a ModelError that names the file; nothing of them is run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Settings
from engine.doctor import filesystem, software
from engine.errors import ModelError
from engine.model.adapter_files import open_adapter
from engine.model.adapter_folder import differences
from engine.model.weights import WeightFiles, load_config
from tests.checkpoint.small_checkpoints import small_model
from tests.fuzz.hostile import as_json, changed, damaged
from tests.fuzz.watched import inputs, little_memory, outcome

INDEX = "model.safetensors.index.json"
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": None,
    "use_dora": False, "use_rslora": False, "base_model_name_or_path": "model", "rank_pattern": {}, "bias": "none",
    "megatron_config": None, "megatron_core": "megatron.core", "auto_mapping": None, "init_lora_weights": True,
}  # fmt: skip
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model in two shards, an adapter beside it as tensors and as a pickle."""
    from safetensors.torch import save_file

    folder = small_model(tmp_path_factory.mktemp("models") / "model")
    file = folder / "model.safetensors"
    file.rename(folder / "one.safetensors")
    names = names_in(folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}))
    for name in ("adapter", "pickled"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({A: torch.ones(4, 8)}, folder / "adapter" / "adapter_model.safetensors")
    torch.save({A: torch.ones(4, 8)}, folder / "pickled" / "adapter_model.bin")
    with little_memory():
        for read in (
            lambda: open_model(folder),
            lambda: use_adapter(folder / "adapter"),
            lambda: use_adapter(folder / "pickled"),
        ):
            assert outcome(read) is None
        yield folder


def names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


def open_model(folder: Path) -> None:
    assert software.content(folder) and filesystem.stored_parameters(folder) != 0  # the doctor looks first
    files = WeightFiles(folder)
    files.fingerprint()
    assert all(isinstance(shape, tuple) for shape in files.shapes.values())
    files.check(files.shapes | {"model.norm.weight": (files.config.hidden_size,)})


def use_adapter(folder: Path) -> None:
    adapter = open_adapter(folder)
    for name in adapter.shapes:
        adapter.read(name, 0, 2)


def check(read, file: Path, content: bytes) -> None:
    """`read` with other content in a file, which is a new file then: an old one may be mapped."""
    kept = shutil.move(file, file.with_name("kept"))
    try:
        file.write_bytes(content)
        found = outcome(read)
        assert found is None or isinstance(found, list | ModelError), found
    finally:
        file.unlink()
        shutil.move(kept, file)


@inputs(200)
@given(st.data(), st.sampled_from(("config.json", INDEX)))
def test_descriptions_with_odd_values(model, data, name):
    raw = json.loads((model / name).read_text())
    check(lambda: open_model(model), model / name, as_json(data.draw(changed(raw))))


ORIGINAL = {
    "model_type": "higgs_audio", "audio_adapter_type": "dual_ffn", "audio_dual_ffn_layers": [0, 1],
    "use_delay_pattern": True, "pad_token_id": 0, "audio_num_codebooks": 8, "audio_codebook_size": 1024,
    "text_config": {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9,
                    "num_attention_heads": 2, "num_key_value_heads": 2, "rope_scaling": {"rope_type": "default"}},
}  # fmt: skip


@inputs(150)
@given(changed(ORIGINAL))
def test_original_descriptions_with_odd_values(model, tree):
    check(lambda: load_config(model) and None, model / "config.json", as_json(tree))


@inputs(150)
@given(st.data(), st.sampled_from(("config.json", INDEX, "one.safetensors")))
def test_damaged_files(model, data, name):
    valid = (model / name).read_bytes()
    end = data.draw(st.sampled_from((8, 200, 3000, None)))
    check(lambda: open_model(model), model / name, data.draw(damaged(valid, end=end)))


@inputs(250)
@given(st.data(), st.booleans())
def test_adapters_with_odd_values(model, data, whole):
    tree = data.draw(changed(ADAPTER))
    file = model / "adapter" / "adapter_config.json"
    settings = Settings(use_lora=True)
    read = (lambda: use_adapter(file.parent)) if whole else (lambda: list(differences(file.parent, settings)))
    check(read, file, as_json(tree))


@inputs(200)
@given(st.data(), st.sampled_from(("adapter/adapter_model.safetensors", "pickled/adapter_model.bin")))
def test_damaged_adapters(model, data, name):
    file = model / name
    check(lambda: use_adapter(file.parent), file, data.draw(damaged(file.read_bytes())))
