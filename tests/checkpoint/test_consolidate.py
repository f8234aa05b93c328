"""Weights that leave: from the checkpoints of every backend, and from adapters merged into a base of either format."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.checkpoint import model_folder
from engine.checkpoint.consolidate import consolidate
from engine.checkpoint.merge import merge
from engine.cli import main
from engine.errors import CheckpointError, ModelError
from engine.model.initial import InitialWeights, build_on_meta, fill, rebuild_buffers
from engine.model.weights import WeightFiles
from tests.checkpoint.test_resume import command
from tests.processes import run

FULL = {"zero0": ["--ds_config", "zero0"], "zero1": ["--ds_config", "zero1"], "zero3": ["--ds_config", "zero3"],
        "fsdp": ["--backend", "fsdp"]}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(demo, tmp_path_factory):
    """name -> checkpoint-2 of the same short run through each backend, two processes each."""
    folder = tmp_path_factory.mktemp("runs")
    runs = FULL | {
        "zero2-bf16": ["--ds_config", "zero2", "--bf16"],
        "fsdp-lora": ["--backend", "fsdp", "--use_lora"],
        "zero3-lora": ["--ds_config", "zero3", "--use_lora"],
    }
    for name, extra in runs.items():
        run(command(demo, folder / name, *extra, "--max_steps", "2", "--lora_dropout", "0"), world_size=2)
    return {name: folder / name / "checkpoint-2" for name in runs}


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("case", FULL)
def test_every_backend_gives_the_same_weights(case, checkpoints, demo, tmp_path):
    consolidate(checkpoints["fsdp"], tmp_path / "fsdp")
    assert main(["consolidate", str(checkpoints[case]), "--out", str(tmp_path / "out")]) == 0
    load(tmp_path / "out")
    got, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "fsdp"))
    before = load_file(demo.model_path / "model.safetensors")
    assert got.keys() == wanted.keys() == before.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=2e-5)
        assert not torch.equal(got[name], before[name]), f"{name} was not trained"
    for side_file in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "out" / side_file).is_file()


def test_the_run_leaves_what_consolidate_gives(checkpoints, tmp_path):
    consolidate(checkpoints["zero3"], tmp_path / "out")
    left = load_file(checkpoints["zero3"].parent / "model" / "model.safetensors")
    assert all(
        torch.equal(left[name], tensor) for name, tensor in load_file(tmp_path / "out/model.safetensors").items()
    )


def test_files_can_be_read_by_whoever_may_read_the_others(checkpoints, tmp_path):
    consolidate(checkpoints["fsdp"], tmp_path / "out")
    consolidate(checkpoints["fsdp-lora"], tmp_path / "adapter")
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    for folder in (tmp_path / "out", tmp_path / "adapter"):
        assert all(file.stat().st_mode & 0o777 == plain.stat().st_mode & 0o777 for file in folder.iterdir())


def test_a_read_only_base_gives_files_that_can_be_written(demo, tmp_path):
    base = shutil.copytree(demo.model_path, tmp_path / "base")
    for file in base.iterdir():
        file.chmod(0o444)
    side = tmp_path / "side"
    side.mkdir()
    model_folder.copy_side_files(WeightFiles(base), side)
    assert all(file.stat().st_mode & 0o200 for file in side.iterdir())


def test_adapters_are_written_in_the_dtype_asked_for(checkpoints, tmp_path):
    for asked, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        consolidate(checkpoints["fsdp-lora"], tmp_path / asked, dtype=asked)
        tensors = load_file(tmp_path / asked / "adapter_model.safetensors")
        assert tensors and all(tensor.dtype == dtype for tensor in tensors.values())


def test_merging_a_full_run_is_refused_before_any_work(checkpoints, demo, tmp_path):
    with pytest.raises(ModelError, match="a full run has no adapter"):
        merge(demo.model_path, checkpoints["fsdp"], tmp_path / "merged")


def test_dtype_rounds_once(checkpoints, tmp_path):
    consolidate(checkpoints["fsdp"], tmp_path / "exact")
    consolidate(checkpoints["fsdp"], tmp_path / "half", dtype="bfloat16")
    exact, half = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "half"))
    assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)
    assert load(tmp_path / "half").dtype == torch.bfloat16


def test_a_bf16_run_leaves_bf16_weights_of_its_fp32_masters(checkpoints, tmp_path):
    left = load_file(checkpoints["zero2-bf16"].parent / "model" / "model.safetensors")
    consolidate(checkpoints["zero2-bf16"], tmp_path / "masters", dtype="float32")
    masters = load_file(tmp_path / "masters" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in left.values())
    assert all(torch.equal(left[name], masters[name].bfloat16()) for name in left)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values()), "the masters are no finer than bf16"


def test_shards(checkpoints, tmp_path, monkeypatch):
    consolidate(checkpoints["fsdp"], tmp_path / "single")
    monkeypatch.setattr(model_folder, "MAX_SHARD_BYTES", 3_000_000)
    consolidate(checkpoints["fsdp"], tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    single, sharded = load(tmp_path / "single").state_dict(), load(tmp_path / "sharded").state_dict()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    next((tmp_path / "sharded").glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="model-0000"):
        WeightFiles(tmp_path / "sharded")


def test_a_damaged_checkpoint_is_refused(checkpoints, tmp_path):
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints["fsdp"], copy)
    shard = next((copy / "tensors").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=shard.name):
        consolidate(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["fsdp-lora", "zero3-lora"])
def test_adapters_of_a_checkpoint_merge(case, checkpoints, demo, tmp_path):
    """From the checkpoint itself and from what the run left: the same merged model, equal to base + adapter in PEFT."""
    from peft import PeftModel

    merge(demo.model_path, checkpoints[case], tmp_path / "a")
    merge(demo.model_path, checkpoints[case].parent / "lora_adapters", tmp_path / "b")
    a, b = load(tmp_path / "a").state_dict(), load(tmp_path / "b").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    adapted = PeftModel.from_pretrained(load(demo.model_path), checkpoints[case].parent / "lora_adapters").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        base, with_adapter = load(demo.model_path).eval()(ids).logits, adapted(ids).logits
        merged = load(tmp_path / "a").eval()(ids).logits
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-5)
    assert (merged - base).abs().max() > 1e-4


def native(folder):
    files = WeightFiles(folder)
    model = build_on_meta(files.config)
    fill(model, InitialWeights(files, 0), torch.device("cpu"), torch.float32)
    rebuild_buffers(model, torch.device("cpu"))
    return model


def adapter(folder, model, scale: float) -> Path:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "audio_mlp.up_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(scale)
    wrapped.save_pretrained(folder)
    return folder


def test_merge_into_a_base_in_the_original_format(golden_model, tmp_path):
    folder = adapter(tmp_path / "adapter", native(golden_model), scale=0.1)
    merge(golden_model, folder, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    before = native(golden_model).state_dict()
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "audio_mlp.up_proj")
    }
    assert merged.generation_config.eos_token_id == 1009 and merged.generation_config.ras_win_len == 7


def test_merges_that_would_change_nothing_or_do_not_fit_are_refused(golden_model, demo, tmp_path, capsys):
    idle = adapter(tmp_path / "idle", native(golden_model), scale=0.0)
    arguments = ["--lora_adapter_path", str(idle), "--output_path", str(tmp_path / "out")]
    assert main(["merge", "--base_model_path", str(golden_model), *arguments]) == 2
    assert "changes nothing" in capsys.readouterr().err
    assert main(["merge", "--base_model_path", str(demo.model_path), *arguments]) == 2
    assert "does not fit" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert main(["merge", "--base_model_path", str(golden_model), *arguments]) == 2
    assert "not empty" in capsys.readouterr().err
