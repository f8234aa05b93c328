"""Exact resume with two real processes: a run that goes on from a checkpoint repeats the straight one bit for bit."""

import json
import shutil
import signal
import time
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import HiggsAudioV2ForConditionalGeneration

from tests.processes import run, start

pytestmark = pytest.mark.slow

CASES = {
    "zero2": ["--ds_config", "zero2", "--async_save"],
    "zero3-lora": ["--ds_config", "zero3", "--use_lora"],
    "fsdp": ["--backend", "fsdp", "--async_save"],
    "fsdp-lora": ["--backend", "fsdp", "--use_lora", "--lora_modules_to_save", "audio_lm_head"],
}
STEPS = 6


def command(demo, out, *extra):
    return [
        "-m", "engine", "train", "--model_path", str(demo.model_path), "--train_data_file", str(demo.data_file),
        "--audio_tokenizer_path", str(demo.audio_tokenizer_path), "--output_dir", str(out), "--max_steps", str(STEPS),
        "--codes_cache_dir", str(demo.data_file.parent / "codes"), "--max_tokens_per_micro_batch", "900",
        "--drop_long_samples", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", "--warmup_steps", "2",
        "--logging_steps", "1", "--save_steps", "3", "--dataloader_num_workers", "0", *extra,
    ]  # fmt: skip


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def trajectory(out):
    """step -> what must be equal to the last bit."""
    return {
        line["step"]: [line["loss"], *line["codebook_losses"], line["grad_norm"], line["tokens_seen"]]
        for line in lines(out)
        if "loss" in line
    }


def evaluations(out):
    """step -> held-out losses."""
    return {
        line["step"]: [line["eval_loss"], *line["eval_codebook_losses"]] for line in lines(out) if "eval_loss" in line
    }


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_identical(case, demo, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(command(demo, straight, *CASES[case]), world_size=2)
    resumed.mkdir()
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    _, outputs = run(command(demo, resumed, *CASES[case], "--resume", "auto"), world_size=2)
    assert "resumed checkpoint-3" in outputs[0]
    wanted, got = trajectory(straight), trajectory(resumed)
    assert sorted(wanted) == [1, 2, 3, 4, 5, 6] and sorted(got) == [4, 5, 6]
    for step in got:
        assert got[step] == wanted[step], f"step {step} differs after the resume"
    if "--use_lora" in CASES[case]:
        adapters_of_every_save(straight, demo.model_path)


def adapters_of_every_save(out, base):
    """Two processes' shards have become whole adapters, which plain PEFT takes; the last is what the run left."""
    kept = {}
    for folder in ("checkpoint-3/lora_adapters", "checkpoint-6/lora_adapters", "lora_adapters"):
        model = HiggsAudioV2ForConditionalGeneration.from_pretrained(base, use_text_head=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*adapter keys.*")
            model = PeftModel.from_pretrained(model, out / folder)
        kept[folder] = {n: p for n, p in model.named_parameters() if ".lora_" in n or ".modules_to_save." in n}
        assert any(p.any() for n, p in kept[folder].items() if ".lora_B." in n)
    first, last, left = kept.values()
    assert all(torch.equal(last[name], left[name]) for name in last)
    assert not any(torch.equal(first[name], last[name]) for name in last if ".lora_B." in name)


def test_the_same_command_goes_on_with_another_number_of_processes(demo, tmp_path):
    """The steps stay those of the checkpoint, although accumulation times processes would now give smaller ones."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(command(demo, straight, "--backend", "fsdp", "--save_total_limit", "1", "--keep_every", "3"), world_size=2)
    assert sorted(p.name for p in straight.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    resumed.mkdir()
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    _, outputs = run(command(demo, resumed, "--ds_config", "zero1", "--resume", "auto"), world_size=1)
    assert "resumed checkpoint-3: step 3 of 6, written by 2 process(es) of fsdp" in outputs[0]
    wanted, got = trajectory(straight), trajectory(resumed)
    assert sorted(got) == [4, 5, 6]
    for step in got:
        assert got[step] == pytest.approx(wanted[step], rel=1e-5)


def test_config_yaml_alone_repeats_the_run(demo, tmp_path):
    """Also with another number of processes: steps and held-out samples are the same, numbers equal up to rounding."""
    first, again, alone = (tmp_path / name for name in ("first", "again", "alone"))
    held_out = ["--eval_data_file", str(demo.data_file), "--eval_steps", "4"]
    run(command(demo, first, "--backend", "fsdp", *held_out), world_size=2)
    repeat = ["-m", "engine", "train", "--config", str(first / "config.yaml"), "--output_dir"]
    run([*repeat, str(again)], world_size=2)
    assert trajectory(again) == trajectory(first) and evaluations(again) == evaluations(first)
    run([*repeat, str(alone)], world_size=1)
    for what in (trajectory, evaluations):
        wanted, got = what(first), what(alone)
        assert list(wanted) == list(got) == ([4, 6] if what is evaluations else [1, 2, 3, 4, 5, 6])
        for step in wanted:
            assert got[step] == pytest.approx(wanted[step], rel=1e-4)
    assert evaluations(first)[6][0] < evaluations(first)[4][0]


def test_kill_then_auto_resume(demo, tmp_path):
    """kill -9 of one rank in the middle; `--resume auto` goes on, and the curve is that of an undisturbed run."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(command(demo, straight, "--backend", "fsdp"), world_size=2)
    arguments = command(demo, killed, "--backend", "fsdp", "--resume", "auto")
    processes = start(arguments, world_size=2)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-3").exists():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), "no checkpoint appeared"
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    processes[0].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    run(arguments, world_size=2)
    assert trajectory(killed) == trajectory(straight)
    assert not list(killed.glob(".checkpoint-*")), "nothing half-made is left"
