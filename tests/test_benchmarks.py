"""The benchmarks run, compare before they time, and report what their page says they do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.model.initial import build_on_meta
from engine.model.weights import WeightFiles
from tests.processes import ROOT

TINY = (
    "--hidden_size 64 --intermediate_size 96 --layers 2 --heads 2 --kv_heads 1 --head_dim 32 --samples 2 --seconds 2"
    " --repeats 1 --device cpu --dtype fp32"
)


def benchmark(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    # one thread: two of them wait for each other on a busy machine
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_packed_forward(tmp_path):
    printed = benchmark("benchmarks.packed_forward", *TINY.split(), "--out", str(tmp_path / "result.json"))
    report = json.loads((tmp_path / "result.json").read_text())
    assert set(report) == {
        "date", "hardware", "versions", "settings", "attention", "parameters", "samples", "model_flops", "check",
        "results",
    }  # fmt: skip
    assert report["check"]["passed"]
    assert set(report["check"]["losses"]) == set(report["results"]) == {"native_padded", "native_packed", "packed"}
    assert report["samples"]["tokens"] == sum(report["samples"]["lengths"]) > report["samples"]["audio_tokens"] > 0
    for result in report["results"].values():
        assert result["tokens_per_second"] > 0 and result["mfu"] is None and len(result["seconds"]) == 1
    assert "packed (this engine)" in printed
    # memory does not depend on what else the machine does: no logits of unlabelled positions, no padding
    memory = {name: result["peak_memory_added_bytes"] for name, result in report["results"].items()}
    assert memory["packed"] is None or memory["packed"] < memory["native_padded"] / 3


def test_data(demo, tmp_path):
    folder = demo.data_file.parent.parent
    printed = benchmark("benchmarks.data", "--quick", "--demo", str(folder), "--out", str(tmp_path / "result.json"))
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["check"].pop("passed") and len(report["check"]) >= 10 and all(report["check"].values())
    results = report["results"]
    for name in (
        "import_json", "import_jsonl", "encode_demo", "encode_none", "prepare", "store_write", "open_small",
        "open_large", "plan", "loader_in_process", "loader_one_worker", "sample",
    ):  # fmt: skip
        assert results[name]["median"] > 0 and results[name]["met"] is None, "tiny sizes are no measure of targets"
        assert f"| {results[name]['title']} | " in printed
    assert results["encode_none"]["median"] > results["encode_demo"]["median"]
    assert Path("/proc/self/smaps_rollup").exists() == ("memory_worker" in results)


def test_the_published_data_benchmark_has_todays_targets():
    from benchmarks.data import TARGETS

    (file, *_) = sorted((ROOT / "benchmarks" / "results").glob("data_*.json"), reverse=True)
    results = json.loads(file.read_text())["results"]
    for name, (side, limit) in TARGETS.items():
        assert results[name]["target"] == f"{side} {limit}"
        assert results[name]["met"] == (
            results[name]["median"] < limit if side == "<" else results[name]["median"] > limit
        )


def test_random_model(demo, tmp_path):
    size = "--layers 1 --hidden_size 128 --intermediate_size 64".split()
    printed = benchmark("benchmarks.random_model", str(tmp_path / "model"), "--tokenizer", str(demo.model_path), *size)
    files = WeightFiles(tmp_path / "model")
    files.check({name: tuple(p.shape) for name, p in build_on_meta(files.config).named_parameters()})
    assert f"{sum(torch.Size(shape).numel() for shape in files.shapes.values()):,} parameters" in printed
    assert files.read("audio_lm_head.weight").std() > 0.01


@pytest.mark.slow
def test_checkpoint_save(tmp_path):
    arguments = "save --geometry tiny --repeats 1 --processes 1 --backends fsdp".split()
    out = tmp_path / "result.json"
    printed = benchmark("benchmarks.checkpoint", *arguments, "--folder", str(tmp_path), "--out", str(out))
    results = {name: result["median"] for name, result in json.loads(out.read_text())["results"].items()}
    assert 0 < results["fsdp_async_stall"] < results["fsdp_async_total"]
    assert 0 < results["fsdp_sync_total"] <= results["fsdp_sync_stall"] * 1.01, "training waits for all of it"
    ratio = 100 * results["fsdp_async_stall"] / results["fsdp_sync_stall"]
    assert abs(results["fsdp_ratio"] - ratio) < 0.01 * ratio
    assert results["fsdp_bytes"] > 12 * 17, "MB: weights and two moments of 17 M parameters"
    assert "| fsdp, async: training waits | " in printed
    assert list(tmp_path.iterdir()) == [out], "nothing of it stays"


@pytest.mark.slow
def test_checkpoint_consolidate(tmp_path):
    arguments = "consolidate --geometry tiny --repeats 1 --processes 2".split()
    out = tmp_path / "result.json"
    benchmark("benchmarks.checkpoint", *arguments, "--folder", str(tmp_path), "--out", str(out))
    report = json.loads(out.read_text())
    assert report["check"]["passed"] and report["results"]["peak"]["met"]
    assert report["results"]["tensors"]["median"] == 19 and report["results"]["seconds"]["median"] > 0


def test_published_results_say_where_they_come_from():
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        report = json.loads(file.read_text())
        assert {"date", "hardware", "versions", "settings", "results"} <= set(report), file.name
        assert report["check"]["passed"], file.name
