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


def benchmark(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    # one thread: two of them wait for each other on a busy machine
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_throughput_table(tmp_path):
    rows = ["trainer", "native", "packed_checkpointing", "packed"]
    arguments = "--geometry tiny --table --turns 1 --tokens 900 --seconds 2 --clock processor --rows".split()
    out = tmp_path / "result.json"
    printed = benchmark("benchmarks.throughput", *arguments, *rows, "--out", str(out))
    report = json.loads(out.read_text())
    assert report["check"]["passed"] and set(report["check"]["losses"]) == {"reference", *rows}
    results = report["results"]
    assert list(results) == rows and all(f"| {row['title']} | " in printed for row in results.values())
    for row in results.values():
        assert row["tokens_per_second"] > 0 and row["mfu"] is row["hfu"] is None, "no peak is known of a CPU"
        assert min(row["parts"][part] for part in ("data", "forward", "backward", "optimizer")) > 0
        assert sum(row["parts"].values()) < 1.01 * row["median_seconds"]
    # processor time and memory do not depend on what else the machine does: text logits of all positions dominate
    of_padded = results["packed"]["forward_backward_ratio"] / results["native"]["forward_backward_ratio"]
    assert of_padded > 4, "packed rows, and heads at labelled positions only"
    memory = {name: row["peak_memory_bytes"] for name, row in results.items()}
    assert memory["packed"] is None or memory["packed"] < 0.6 * memory["native"]
    spent = {name: row["hardware_by_model_flops"] for name, row in results.items()}
    assert 1 == spent["packed"] < spent["packed_checkpointing"] < spent["native"] < spent["trainer"]


@pytest.mark.slow
def test_throughput_of_adapters_in_two_processes(tmp_path):
    arguments = "--geometry tiny --mode lora --backend deepspeed --steps 1 --tokens 900 --seconds 2".split()
    out = tmp_path / "result.json"
    launcher = "torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.throughput".split()
    printed = benchmark(*launcher, *arguments, "--gradient_checkpointing", "none", "--out", str(out))
    report = json.loads(out.read_text())
    assert report["check"]["passed"] and report["processes"] == report["samples"]["micro_batches"] == 2
    settings = report["engine_settings"]
    assert settings["use_lora"] and settings["gradient_checkpointing"] == "none", "the engine's flags are taken"
    assert 0 < report["communication_seconds"] and "collectives: " in printed


@pytest.mark.slow
def test_parts(tmp_path):
    """All ways of a part agree, or it would have stopped."""
    from benchmarks.parts import PARTS

    out = tmp_path / "result.json"
    arguments = "--geometry tiny --tokens 120 --repeats 1 --clock processor".split()
    printed = benchmark("benchmarks.parts", *arguments, "--out", str(out))
    report = json.loads(out.read_text())
    assert report["check"]["passed"] and list(report["results"]) == list(PARTS)
    for part, ways in report["results"].items():
        assert len(ways) >= 2 and f"| {PARTS[part]} | {next(iter(ways))} | " in printed
        assert all(way["median_seconds"] > 0 for way in ways.values())


def test_length_mix():
    """A seed's samples are the same however many follow, and as long as two clips, their text and a system turn."""
    from benchmarks.length_mix import describe_mix, make_samples
    from benchmarks.random_weights import configuration

    samples = make_samples(configuration("tiny"), 300, seconds=4.5, seed=1)
    assert [len(s) for s in make_samples(configuration("tiny"), 5, 4.5, 1)] == [len(s) for s in samples[:5]]
    mix = describe_mix([samples[i : i + 5] for i in range(0, 300, 5)])
    assert mix["samples"] == 300 and mix["tokens"] == sum(len(s) for s in samples)
    assert 0.65 < mix["audio_share"] < 0.8 and 0.25 < mix["padding_share"] < 0.45
    assert 330 < mix["lengths"]["median"] < 420


def test_the_published_table_is_as_fast_as_its_page_says():
    """Packed rows against transformers' padded forward, with and without checkpointing in both."""
    (file, *_) = sorted((ROOT / "benchmarks" / "results").glob("throughput_table_small_*.json"), reverse=True)
    ratios = {n: row["forward_backward_ratio"] for n, row in json.loads(file.read_text())["results"].items()}
    kept, checkpointing = (ratios[f"packed{n}"] / ratios[f"native{n}"] for n in ("", "_checkpointing"))
    assert kept > 5 and checkpointing > 5
    assert f"{kept:.1f} times as fast with activations kept" in (ROOT / "benchmarks" / "README.md").read_text()


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


@pytest.mark.slow
def test_memory(tmp_path):
    arguments = "--geometry tiny --tokens 2048 --backends none --modes none".split()
    printed = benchmark("benchmarks.memory", *arguments, "--out", str(tmp_path / "result.json"))
    report = json.loads((tmp_path / "result.json").read_text())
    found = report["results"]["none/none"]
    assert abs(found["ratio"] - found["planned"] / found["measured"]) < 1e-9 and 0.8 < found["ratio"] < 1.2
    assert "| none, none | " in printed


def test_long_samples_take_no_more_for_a_token():
    """What was published: flat up to 32k tokens, and half of it in two processes that share the row."""
    (file, *_) = sorted((ROOT / "benchmarks" / "results").glob("long_sequences_*.json"), reverse=True)
    results = json.loads(file.read_text())["results"]
    one, two = (results[f"measured, pieces {n}"] for n in (1, 2))
    assert list(one) == list(two) == ["4096", "8192", "16384", "32768"]
    assert max(one.values()) < 1.1 * min(one.values())
    assert all(0.45 < two[length] / one[length] < 0.55 for length in one)
    assert sum(name.startswith("planned") for name in results) == 3 * 4
