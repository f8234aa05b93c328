"""What leaves a checkpoint, of every backend: the right weights, rounded once, with all that belongs beside them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.checkpoint.lifecycle import MODEL_FILES
from engine.checkpoint.manifest import read_manifest
from engine.cli import main
from engine.errors import CheckpointError, ModelError
from engine.export.consolidate import consolidate
from engine.export.merge import merge
from engine.export.model_folder import copy_side_files
from engine.model.keys import original_name
from engine.model.weights import WeightFiles
from tests.checkpoint.anywhere_worker import FIRST
from tests.checkpoint.test_resume import command as train_command
from tests.commands import command, done
from tests.processes import run
from tests.tiny import tiny_model

BACKENDS = ["fsdp", "zero0", "zero1", "zero3", "zero2-bf16"]
VERIFIED = "verified: 61 tensors, logits of 25 text and 21 audio positions equal"


@pytest.fixture(scope="module")
def runs(demo, tmp_path_factory):
    """Folders of two whole runs of one process, full and lora, with checkpoint-2 and what they left."""
    folder = tmp_path_factory.mktemp("runs")
    for name, extra in (("full", []), ("lora", ["--use_lora", "--lora_dropout", "0"])):
        words = train_command(demo, folder / name, "--backend", "none", "--max_steps", "2", *extra)[2:]
        done(*words)
    return folder


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """backend -> checkpoint of the smallest model, written by two processes; `base`: the model."""
    folder = tmp_path_factory.mktemp("spread")
    tiny_model().save_pretrained(folder / "base")
    run(["-m", "tests.checkpoint.anywhere_worker", str(folder / "base"), str(folder), *BACKENDS], world_size=2)
    return {name: folder / f"{name}@2" / f"checkpoint-{FIRST}" for name in BACKENDS} | {"base": folder / "base"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("backend", ["zero0", "zero1", "zero3"])
def test_every_backend_gives_the_same_weights(backend, spread, tmp_path):
    for name in ("fsdp", backend):
        consolidate(spread[name], tmp_path / name)
    load(tmp_path / backend)
    got, wanted, before = (weights(folder) for folder in (tmp_path / backend, tmp_path / "fsdp", spread["base"]))
    assert got.keys() == wanted.keys() == before.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=2e-5)
        assert not torch.equal(got[name], before[name]), f"{name} was not trained"


def test_bf16_weights_are_the_fp32_masters_rounded_once(spread, tmp_path):
    """What the run computed in, and what it kept: finer than that."""
    consolidate(spread["zero2-bf16"], tmp_path / "auto")
    consolidate(spread["zero2-bf16"], tmp_path / "masters", dtype="float32")
    left, masters = weights(tmp_path / "auto"), weights(tmp_path / "masters")
    assert all(tensor.dtype == torch.bfloat16 for tensor in left.values())
    assert all(torch.equal(left[name], masters[name].bfloat16()) for name in left)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values()), "the masters are no finer than bf16"
    assert load(tmp_path / "auto").dtype == torch.bfloat16


def test_the_run_leaves_what_consolidate_gives(runs, tmp_path):
    said = done("consolidate", runs / "full" / "checkpoint-2", out=tmp_path / "out", dtype="auto")
    assert VERIFIED in said
    left, got = weights(runs / "full" / "model"), weights(tmp_path / "out")
    assert left.keys() == got.keys() and all(torch.equal(left[name], tensor) for name, tensor in got.items())
    for side_file in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "processor_config.json"):
        assert (tmp_path / "out" / side_file).is_file()


def test_a_model_is_bf16_unless_asked_and_an_adapter_fp32(runs, tmp_path):
    done("consolidate", runs / "full" / "checkpoint-2", out=tmp_path / "model")
    done("consolidate", runs / "lora" / "checkpoint-2", out=tmp_path / "adapter")
    model, exact = weights(tmp_path / "model"), weights(runs / "full" / "model")
    assert all(torch.equal(model[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert {tensor.dtype for tensor in weights(tmp_path / "adapter").values()} == {torch.float32}
    consolidate(runs / "lora" / "checkpoint-2", tmp_path / "half", dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.bfloat16}


def test_shards(runs, tmp_path):
    done("consolidate", runs / "full" / "checkpoint-2", out=tmp_path / "sharded", dtype="auto", max_shard_size="3MB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    single, sharded = (load(folder).state_dict() for folder in (runs / "full" / "model", tmp_path / "sharded"))
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    next((tmp_path / "sharded").glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match="model-0000"):
        WeightFiles(tmp_path / "sharded")


def test_a_checkpoint_exported_as_boson_is_the_consolidated_one_under_other_names(runs, tmp_path):
    assert VERIFIED in done("export", runs / "full" / "checkpoint-2", out=tmp_path / "boson", format="boson")
    native, boson = weights(runs / "full" / "model"), weights(tmp_path / "boson")
    assert {original_name(name) for name in native} == boson.keys()
    assert all(torch.equal(boson[original_name(name)], tensor.bfloat16()) for name, tensor in native.items())


def test_the_card_tells_where_the_weights_come_from(runs, demo, tmp_path):
    """And the base's own card and licence go along."""
    checkpoint = shutil.copytree(runs / "full" / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / MODEL_FILES / "README.md").write_text("the base's card")
    (checkpoint / MODEL_FILES / "LICENSE").write_text("the licence")
    manifest = read_manifest(checkpoint)
    wanted = [
        f"| base model | `{demo.model_path}` |", "| steps | `2` |", f"| tokens seen | `{manifest.tokens_seen:,}` |",
        f"| fingerprint of the data | `{manifest.plan['data']}` |", f"torch {torch.__version__}", "community licence",
        "| learning_rate | `0.001` |", "| drop_long_samples | `True` |", "copied here: `LICENSE`",
    ]  # fmt: skip
    for format, use in (("native", "use_text_head=True"), ("boson", "HiggsAudioServeEngine")):
        done("export", checkpoint, out=tmp_path / format, format=format)
        card = (tmp_path / format / "README.md").read_text()
        assert not [line for line in [*wanted, use] if line not in card]
        assert (tmp_path / format / "BASE_README.md").read_text() == "the base's card"
        assert (tmp_path / format / "LICENSE").read_text() == "the licence"
    again = tmp_path / "again"
    done("export", tmp_path / "boson", out=again, format="native")
    assert (again / "README.md").read_text() == card, "a model folder keeps the card that it has"


def test_a_lora_checkpoint_is_no_model_to_export(runs, tmp_path):
    out = {"out": tmp_path / "out", "format": "boson"}
    said = command("export", runs / "lora" / "checkpoint-2", **out)
    assert said.code == 2 and "a LoRA run holds an adapter, no model → `higgs-engine merge` it first" in said.errors
    said = command("export", runs / "lora" / "lora_adapters", **out)
    assert said.code == 2 and "`higgs-engine merge` it into its base first" in said.errors


def test_an_adapter_from_a_checkpoint_merges_as_the_one_that_the_run_left(runs, demo, tmp_path):
    merge(demo.model_path, runs / "lora" / "checkpoint-2", tmp_path / "a")
    merge(demo.model_path, runs / "lora" / "lora_adapters", tmp_path / "b")
    a, b, base = weights(tmp_path / "a"), weights(tmp_path / "b"), weights(demo.model_path)
    assert all(torch.equal(a[name], b[name]) for name in base)
    assert any(not torch.equal(a[name], base[name]) for name in base)


def test_merging_a_full_run_is_refused_before_any_work(runs, demo, tmp_path):
    with pytest.raises(ModelError, match="a full run has no adapter"):
        merge(demo.model_path, runs / "full" / "checkpoint-2", tmp_path / "merged")


def test_files_can_be_read_by_whoever_may_read_the_others(runs, tmp_path):
    consolidate(runs / "lora" / "checkpoint-2", tmp_path / "adapter")
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    for folder in (runs / "full" / "model", tmp_path / "adapter"):
        assert all(file.stat().st_mode & 0o777 == plain.stat().st_mode & 0o777 for file in folder.iterdir())


def test_a_read_only_base_gives_files_that_can_be_written(demo, tmp_path):
    base = shutil.copytree(demo.model_path, tmp_path / "base")
    for file in base.iterdir():
        file.chmod(0o444)
    side = tmp_path / "side"
    side.mkdir()
    copy_side_files(WeightFiles(base), side)
    assert all(file.stat().st_mode & 0o200 for file in side.iterdir())


def test_a_damaged_checkpoint_is_refused(spread, tmp_path):
    copy = shutil.copytree(spread["fsdp"], tmp_path / f"checkpoint-{FIRST}")
    shard = next((copy / "tensors").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=shard.name):
        consolidate(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_does_not_get_into_the_weights(spread, tmp_path, capsys):
    copy = shutil.copytree(spread["fsdp"], tmp_path / f"checkpoint-{FIRST}")
    shard = next((copy / "tensors").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for words in (["consolidate", str(copy)], ["export", str(copy), "--format", "boson"]):
        assert main([*words, "--out", str(tmp_path / "out")]) == 2
        assert f"{shard.name} has changed since it was saved" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_what_stands_there_is_not_overwritten_by_the_command(runs, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("")
    assert main(["consolidate", str(runs / "full" / "checkpoint-2"), "--out", str(tmp_path)]) == 2
    assert "is not empty → give another output folder" in capsys.readouterr().err
