"""`higgs-engine inspect` shows what is inside, of every kind of folder, and points at what is no number."""

import math

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.small_checkpoints import small_checkpoint, small_model
from tests.commands import command, done


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("inspect") / "model")


def cells(text: str, name: str) -> list[str]:
    """The line of a table that begins with a name, cut at its gaps."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_checkpoint(model, tmp_path):
    said = done("inspect", small_checkpoint(tmp_path, model, eval_loss=2.34567, world_size=8, backend="fsdp"))
    header = dict(line.split(":", 1) for line in said.splitlines()[:9])
    assert header["step"].strip() == "5, in epoch 2" and header["tokens seen"].strip() == "1,234"
    assert header["held-out loss"].strip() == "2.3457" and header["written by"].strip() == "fsdp, 8 process(es)"
    assert f"torch {torch.__version__}" in header["versions"] and str(model) in header["base"]
    assert "1.2 MiB in 6 files" in header["size"]
    settings = said.partition("settings other than the defaults:\n")[2].partition("\n\n")[0]
    assert sorted(line.strip().split(":")[0] for line in settings.splitlines()) == [
        "learning_rate", "model_path", "save_steps"
    ]  # fmt: skip


def test_layers_add_up_and_moments_stand_beside(model, tmp_path):
    said = done("inspect", small_checkpoint(tmp_path, model))
    assert cells(said, "model.layers.*.mlp.up_proj.weight")[1:] == [
        "2", "64 x 48", "float32", "6,144", "24.0 KiB", "48.0 KiB"
    ]  # fmt: skip
    assert "33 tensors, 88,752 parameters: weights 346.7 KiB, moments of the optimizer 693.4 KiB" in said


def test_frozen_weights_have_a_dtype_of_their_own(model, tmp_path):
    weights = {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 3), "model.layers.1.mlp.up_proj.weight": None}
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(2, 3, dtype=torch.bfloat16)
    said = done("inspect", small_checkpoint(tmp_path, model, weights=weights))
    rows = [line.split() for line in said.splitlines() if line.startswith("model.layers.*")]
    assert [row[5:7] for row in rows] == [["float32", "6"], ["bfloat16", "6"]], "one group each"


def test_values_of_every_tensor(model, tmp_path):
    values = torch.tensor([[-2.0, 0.0], [1.0, 5.0]])
    said = done("inspect", small_checkpoint(tmp_path, model, weights={"a.weight": values}), "--tensors")
    assert cells(said, "a.weight") == ["a.weight", "2 x 2", "float32", "-2", "5", "1", "2.55", "-"]
    assert cells(said, "exp_avg_sq.a.weight")[1] == "2 x 2", "the moments too"
    assert "NOT FINITE" not in said


def test_what_is_no_number_is_pointed_out(model, tmp_path):
    weights = {
        "a.weight": torch.tensor([1.0, math.nan, 3.0, math.inf]),
        "b.weight": torch.full((2,), math.nan),
        "c.weight": torch.ones(3),
    }
    said = done("inspect", small_checkpoint(tmp_path, model, weights=weights), "--tensors")
    assert cells(said, "a.weight")[3:] == ["1", "3", "2", "1", "2"], "measured over what is finite"
    assert cells(said, "b.weight")[3:] == ["-", "-", "-", "-", "2"]
    _, _, broken = said.partition("NOT FINITE, 2 tensor(s)")
    assert "a.weight: 2 of 4 values" in broken and "b.weight: 2 of 2 values" in broken and "c.weight:" not in broken


def test_a_damaged_checkpoint_still_tells_what_it_was(model, tmp_path):
    folder = small_checkpoint(tmp_path, model)
    (folder / "rng" / "rank-0.pt").unlink()
    said = done("inspect", folder)
    assert "rng/rank-0.pt is missing → higgs-engine verify" in said and "33 tensors" in said


def test_a_model_folder(model):
    said = done("inspect", model)
    assert cells(said, "model.layers.*.mlp.up_proj.weight")[1:] == ["2", "64 x 48", "float32", "6,144", "24.0 KiB", "-"]
    assert said.startswith("group") and said.rstrip().endswith("33 tensors, 88,752 parameters: weights 346.7 KiB")


def test_an_adapter_in_its_folder_or_in_that_of_its_run(tmp_path):
    folder = tmp_path / "lora_adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    tensor = torch.tensor([[0.0, math.inf]], dtype=torch.bfloat16)
    save_file({"base_model.model.audio_lm_head.lora_A.weight": tensor}, folder / "adapter_model.safetensors")
    for path in (folder, tmp_path):
        said = done("inspect", path, "--tensors")
        name = "base_model.model.audio_lm_head.lora_A.weight"
        assert cells(said, name) == [name, "1 x 2", "bfloat16", "0", "0", "0", "0", "1"]
        assert f"  {name}: 1 of 2 values" in said


def test_what_it_cannot_show(tmp_path):
    said = command("inspect", tmp_path)
    assert said.code == 2 and "give a checkpoint-N, a model or an adapter folder" in said.errors
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 30)
    said = command("inspect", tmp_path)
    assert said.code == 2 and f"{tmp_path / 'model.safetensors'}: not a readable safetensors file" in said.errors
