"""Merged is base + adapter, for every variant and any trainer's adapter; a merge that is not never gets its name."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ModelError
from engine.export.merge import merge
from engine.export.merged import MergedWeights
from engine.model.initial import InitialWeights, build_on_meta, fill, rebuild_buffers
from engine.model.weights import WeightFiles
from tests.commands import command, done
from tests.export.small_adapters import load, logits, save_adapter
from tests.tiny import tiny_model

VARIANTS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rsDoRA and patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "saved whole": {
        "modules_to_save": ["audio_lm_head", "text_lm_head", "embed_tokens", "embed_audio_tokens.embed_audio_tokens"]
    },
    "heads and an embedding": {"target_modules": ["embed_tokens", "audio_lm_head", "text_lm_head", "q_proj"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*up_proj", "alpha_pattern": {"mlp.up_proj": 3}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", load(base))


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_merged_computes_what_base_and_adapter_do_in_peft(variant, base, tmp_path):
    folder = save_adapter(tmp_path / "adapter", load(base), **VARIANTS[variant])
    merge(base, folder, tmp_path / "merged")
    merged, side_by_side = logits(load(tmp_path / "merged")), logits(PeftModel.from_pretrained(load(base), folder))
    torch.testing.assert_close(merged, side_by_side, rtol=1e-4, atol=2e-6)
    assert (merged - logits(load(base))).abs().max() > 0.01


def test_it_is_rounded_once(base, adapter, tmp_path):
    merge(base, adapter, tmp_path / "exact", say=(said := []).append)
    merge(base, adapter, tmp_path / "half", "bfloat16")
    exact, half = tensors(tmp_path / "exact"), tensors(tmp_path / "half")
    assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)
    info = json.loads((tmp_path / "half" / "merge_info.json").read_text())
    assert info["dtype"] == "bfloat16" and info["changed_tensors"] == 20
    assert 1e-4 < info["verified"]["audio"]["relative"] < 2e-2
    assert any("changed: 20 of 20 weights" in line for line in said)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_is_found_and_leaves_nothing(dtype, base, tmp_path, monkeypatch):
    """Wrong by less than bf16 rounds off: what is compared closely is the merge before rounding."""
    folder = save_adapter(tmp_path / "adapter", load(base), by=0.01)
    right = MergedWeights._merged_layer
    monkeypatch.setattr(MergedWeights, "_merged_layer", lambda self, name: right(self, name) * (1 + 1e-3))
    with pytest.raises(CheckpointError, match="not what base and adapter compute"):
        merge(base, folder, tmp_path / "merged", dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize("dtype, by", [("float32", 1.01), ("bfloat16", 3)])
def test_files_that_differ_from_the_merge_are_found(dtype, by, base, adapter, tmp_path, monkeypatch):
    """The weights as written are what is compared, not those that were to be written."""
    right = WeightFiles.read
    spoilt = "model.layers.1.audio_mlp.up_proj.weight"

    def read(self, name, *rows):
        return right(self, name, *rows) * (by if name == spoilt and ".merged.incomplete" in str(self.folder) else 1)

    monkeypatch.setattr(WeightFiles, "read", read)
    with pytest.raises(CheckpointError, match="not what base and adapter compute"):
        merge(base, adapter, tmp_path / "merged", dtype)


def test_an_adapter_lost_in_the_rounding_is_refused(base, tmp_path):
    """All its weights are so near the base's that bf16 has no other number for them."""
    shutil.copytree(base, tmp_path / "base")
    ones = {name: torch.ones_like(tensor) for name, tensor in tensors(base).items()}
    save_file(ones, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    folder = save_adapter(tmp_path / "adapter", load(tmp_path / "base"), by=1e-4)
    with pytest.raises(ModelError, match="changes nothing in torch.bfloat16 → --dtype float32"):
        merge(tmp_path / "base", folder, tmp_path / "merged", "bfloat16")
    merge(tmp_path / "base", folder, tmp_path / "merged", "float32")


def test_an_adapter_in_a_pickle(base, adapter, tmp_path):
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    torch.save(load_file(adapter / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    merge(base, pickled, tmp_path / "a")
    merge(base, adapter, tmp_path / "b")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in b)
    torch.save({"code": print}, pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match="not a readable file of tensors"):
        merge(base, pickled, tmp_path / "c")


def native(folder):
    files = WeightFiles(folder)
    model = build_on_meta(files.config)
    fill(model, InitialWeights(files, 0), torch.device("cpu"), torch.float32)
    rebuild_buffers(model, torch.device("cpu"))
    return model


def test_base_and_adapter_of_the_original_code(golden_model, tmp_path):
    """Its model names the layers without `model.` before them, and so does an adapter that was trained on it."""
    folder = save_adapter(tmp_path / "adapter", native(golden_model), target_modules=["q_proj", "audio_mlp.up_proj"])
    stored = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.model.layers", "model.layers"): tensor for name, tensor in stored.items()}
    assert renamed.keys() != stored.keys()
    original = shutil.copytree(folder, tmp_path / "original")
    save_file(renamed, original / "adapter_model.safetensors")
    merge(golden_model, folder, tmp_path / "merged")
    merge(golden_model, original, tmp_path / "same")
    merged, before = tensors(tmp_path / "merged"), native(golden_model).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors(tmp_path / "same").items())
    assert {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])} == {
        f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "audio_mlp.up_proj")
    }
    assert load(tmp_path / "merged").generation_config.ras_win_len == 7


def test_the_command_compares_with_the_base(golden_model, tmp_path):
    folder = save_adapter(tmp_path / "adapter", native(golden_model), target_modules=["o_proj"])
    flags = {"base_model_path": golden_model, "lora_adapter_path": folder}
    said = done("merge", "--compare_models", "--no_save_tokenizer", **flags, output_path=tmp_path / "merged")
    assert "The sun rises in the east and sets in the west." in said and "most changed" in said
    assert "model.layers.0.self_attn.o_proj.weight" in said
    info = json.loads((tmp_path / "merged" / "merge_info.json").read_text())
    assert {"base_model", "lora_adapter", "merged_at", "model_type", "engine_version", "verified"} <= info.keys()
    assert info["compared"]["text_mean_difference"] > 0 and info["compared"]["audio_mean_difference"] > 0
    assert not list((tmp_path / "merged").glob("tokenizer*"))
    done("merge", **flags, output_path=tmp_path / "small", max_shard_size="50KB", dtype="bfloat16")
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2


def test_the_base_may_be_the_one_that_the_adapter_names(base, adapter, tmp_path):
    merge(None, adapter, tmp_path / "merged")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = moved / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    said = command("merge", lora_adapter_path=moved, output_path=tmp_path / "again")
    assert said.code == 2 and "is not a folder here → give --base_model_path" in said.errors


def test_merges_that_would_change_nothing_or_do_not_fit_are_refused(golden_model, base, tmp_path):
    idle = save_adapter(tmp_path / "idle", native(golden_model), by=0)
    flags = {"lora_adapter_path": idle, "output_path": tmp_path / "out"}
    assert "changes nothing" in command("merge", base_model_path=golden_model, **flags).errors
    assert "does not fit" in command("merge", base_model_path=base, **flags).errors
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert "not empty" in command("merge", base_model_path=golden_model, **flags).errors


@pytest.mark.parametrize(
    "config, why",
    [
        ({"init_lora_weights": "pissa"}, "which changed its base"),
        ({"lora_bias": True}, "cannot be merged"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_tokens_delta has no place"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_what_would_not_be_exact_is_refused(config, why, base, tmp_path):
    folder = save_adapter(tmp_path / "adapter", load(base), **config)
    with pytest.raises(ModelError, match=why):
        merge(base, folder, tmp_path / "merged")
