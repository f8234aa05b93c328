"""`higgs-engine evaluate`: the same numbers for any number of processes, backend and rows, and as in training."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from engine.exit_codes import MISTAKE
from engine.observe import journal
from tests import processes
from tests.commands import command, done, flags

UNEQUAL = 3
"""Samples; two processes with rows of one sample each have two and one."""


@pytest.fixture(scope="module")
def parts(demo, tmp_path_factory):
    """Data files: to train on, and the odd few to evaluate on."""
    folder = tmp_path_factory.mktemp("parts")
    rows = json.loads(demo.data_file.read_text())
    for name, part in (("train", rows[UNEQUAL:]), ("eval", rows[:UNEQUAL])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    for name in ("audio",):
        if (demo.data_file.parent / name).exists():
            (folder / name).symlink_to(demo.data_file.parent / name)
    return folder


def settings(demo, parts, **more) -> dict:
    return {
        "model_path": demo.model_path, "audio_tokenizer_path": demo.audio_tokenizer_path,
        "train_data_file": parts / "train.json", "eval_data_file": parts / "eval.json", "report_to": "none",
        "codes_cache_dir": demo.data_file.parent / "codes", "max_tokens_per_micro_batch": 900,
        "dataloader_num_workers": 0, "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 2,
    } | more  # fmt: skip


def run(demo, parts, out, *words, **more) -> dict:
    """Trains two steps alone; the last evaluation."""
    done("train", *words, backend="none", output_dir=out, **settings(demo, parts, **more))
    last = journal.read(out / "metrics.jsonl")[-1]
    return {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def metrics(file) -> dict:
    return json.loads(file.read_text())["metrics"]


@pytest.mark.parametrize("backend", [("deepspeed", "zero3"), ("fsdp", "zero2")], ids=lambda pair: pair[0])
def test_a_checkpoint_by_two_processes_of_unequal_shares(demo, parts, tmp_path, backend):
    """Adapters through FSDP, everything through ZeRO 3."""
    lora = ["--use_lora"] if backend[0] == "fsdp" else []
    wanted = run(demo, parts, tmp_path / "run", *lora)
    assert wanted["loss"] > 0 and len(wanted["codebook_accuracies"]) == 8
    words = ["--checkpoint", tmp_path / "run/checkpoint-2", "--out", tmp_path / "two.json", "--backend", backend[0]]
    words += ["--ds_config", backend[1], "--per_device_eval_batch_size", 1]
    processes.run(["-m", "engine", "evaluate", *map(str, words)], world_size=2)
    same(metrics(tmp_path / "two.json"), wanted)
    if lora:
        more = settings(demo, parts) | {"lora_adapter_path": tmp_path / "run/lora_adapters"}
        said = done("evaluate", "--use_lora", "--out", tmp_path / "one.json", backend="none", **more)
        same(metrics(tmp_path / "one.json"), wanted)
        assert f"loss {wanted['loss']:.4f}" in said


def test_what_cannot_be_evaluated_is_said(demo, parts, tmp_path):
    words = flags(model_path=demo.model_path, train_data_file=parts / "train.json", output_dir=tmp_path, backend="none")
    words += ["--out", str(tmp_path / "evaluation.json")]
    said = command("evaluate", *words, "--audio_tokenizer_path", demo.audio_tokenizer_path)
    assert said.code == 2
    assert "eval_data_file: there is nothing to evaluate on → give it, or train_data_file and" in said.errors
    assert f"--out {tmp_path}: is a folder" in command("evaluate", *words, "--out", tmp_path).errors, "before it begins"
    said = command("evaluate", "--checkpoint", tmp_path / "none")
    assert said.code == 2 and "none" in said.errors


def test_what_is_not_finite_is_not_known(demo, parts, tmp_path):
    """A text head whose logits overflow: text has no loss then, the codebooks have theirs."""
    broken = tmp_path / "broken"
    shutil.copytree(demo.model_path, broken)
    weights = load_file(broken / "model.safetensors")
    weights["text_lm_head.weight"] = weights["text_lm_head.weight"].sign() * 1e38
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    told = {name: settings(demo, parts)[name] for name in ("audio_tokenizer_path", "eval_data_file", "codes_cache_dir")}
    out = tmp_path / "found.json"
    said = command("evaluate", backend="none", model_path=broken, out=out, **told)
    assert said.code == MISTAKE and "broken: the loss is not finite →" in said.errors
    found = metrics(out)
    assert found["loss"] is found["text_loss"] is None and all(loss > 1 for loss in found["codebook_losses"])
