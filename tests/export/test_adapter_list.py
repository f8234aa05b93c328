"""`higgs-engine adapters`: every adapter below a folder once, with its step and loss, and whether it is whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.export.adapter_list import HEADINGS, find_adapters
from tests.commands import command, done
from tests.export.small_adapters import load, save_adapter
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    config = {"target_modules": ["q_proj", "audio_mlp.up_proj"], "use_dora": True, "modules_to_save": ["audio_lm_head"]}
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", load(base), **config)


@pytest.fixture
def run(adapter, tmp_path):
    """The output folder of a run: two checkpoints, one of them evaluated, a draft, the final adapter."""
    for step, held_out in ((9, None), (10, 1.5)):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(adapter, checkpoint / "lora_adapters")
        shutil.copy(adapter / "adapter_config.json", checkpoint)
        (checkpoint / "manifest.json").write_text(json.dumps({"step": step, "eval_loss": held_out}))
    shutil.copytree(tmp_path / "run" / "checkpoint-9", tmp_path / "run" / ".checkpoint-11.incomplete")
    shutil.copytree(adapter, tmp_path / "run" / "lora_adapters")
    (tmp_path / "run" / "trainer_state.json").write_text('{"step": 12}')
    lines = [
        {"step": 8, "loss": 4.0},
        {"step": 9, "eval_loss": 3.0},
        {"step": 10, "loss": 2.0},
        {"step": 12, "loss": 1.0},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 13, "lo')
    return tmp_path / "run"


def cells(found) -> list[dict[str, str]]:
    return [dict(zip(HEADINGS, adapter.row, strict=True)) for adapter in found]


def test_a_run_has_each_adapter_once_in_the_order_of_steps(run, base):
    rows = cells(find_adapters(run))
    assert [(row["adapter"], row["step"], row["loss"]) for row in rows] == [
        ("checkpoint-9/lora_adapters", "9", "4.0000"),
        ("checkpoint-10/lora_adapters", "10", "1.5000"),
        ("lora_adapters", "12", "1.0000"),
    ]
    row = rows[0]
    assert row["rank/alpha"] == "4/8" and row["targets"] == "audio_mlp.up q" and row["base"] == str(base)
    assert row["variant"] == "DoRA + audio_lm_head" and row["state"] == "complete" and row["size"].endswith(" MB")


def test_the_command(run, tmp_path):
    said = done("adapters", path=run)
    assert len(said.splitlines()) == 4 and said.split()[:2] == ["adapter", "step"]
    assert "layers.*.self_attn.q_proj.lora_A.weight: 2 tensors, 384 values" in done("adapters", "--verbose", path=run)
    (tmp_path / "empty").mkdir()
    assert "no adapter below" in done("adapters", path=tmp_path / "empty")
    assert command("adapters", path=tmp_path / "nowhere").code == 2


def spoil(folder, change) -> None:
    """Changes an adapter's tensors; the file stays a correct one."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def first(kind: str, tensors) -> str:
    return next(name for name in sorted(tensors) if kind in name)


SPOILT = {
    "damaged: base_model.model.model.layers.0.audio_mlp.up_proj.lora_B.weight is missing": (
        lambda tensors: tensors.pop(first("lora_B", tensors))
    ),
    "damaged: base_model.model.model.layers.0.audio_mlp.up_proj.lora_A.weight has shape (3, 48)": (
        lambda tensors: tensors.update({first("lora_A", tensors): torch.ones(3, 48)})
    ),
    "damaged: base_model.model.model.layers.0.audio_mlp.up_proj.lora_B.weight has no A": (
        lambda tensors: tensors.pop(first("lora_A", tensors))
    ),
    "damaged: base_model.model.model.layers.0.audio_mlp.up_proj.lora_magnitude_vector is missing": (
        lambda tensors: tensors.pop(first("magnitude", tensors))
    ),
    "not finite: base_model.model.model.layers.0.audio_mlp.up_proj.lora_A.weight": (
        lambda tensors: tensors[first("lora_A", tensors)].fill_(float("inf"))
    ),
}


@pytest.mark.parametrize("state", SPOILT)
def test_what_is_wrong_with_an_adapter_is_told(state, run):
    spoil(run / "checkpoint-10" / "lora_adapters", SPOILT[state])
    found = find_adapters(run)
    assert [adapter.state == "complete" for adapter in found] == [True, False, True]
    assert found[1].state.startswith(state), found[1].state
    assert command("adapters", path=run).code == 2


def test_an_adapter_that_does_nothing(base, tmp_path):
    save_adapter(tmp_path / "adapter", load(base), by=0, use_dora=True)  # its magnitudes are those of the base
    assert [adapter.state for adapter in find_adapters(tmp_path)] == ["all zero"]


def test_files_that_cannot_be_read(run):
    file = run / "lora_adapters" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (run / "checkpoint-9" / "lora_adapters" / "adapter_model.safetensors").unlink()
    (run / "checkpoint-10" / "lora_adapters" / "adapter_config.json").write_text("{")
    states = [adapter.state for adapter in find_adapters(run)]
    assert all(state.startswith("damaged: ") for state in states)
    assert (
        "no adapter_model.safetensors" in states[0] and "not valid JSON" in states[1] and "not a readable" in states[2]
    )


def test_adapters_that_are_not_lora_are_shown_and_are_no_failure(run):
    config = run / "lora_adapters" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    assert "not usable: an adapter of type IA3" in done("adapters", path=run)
