"""Profiled steps: what is left of them, which steps they are, and that they compute the same."""

import gzip
import json
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from engine.observe import journal
from engine.observe.kernels import TOP, exposed, ranking
from engine.observe.phases import PhaseTimes, phase_shares, phase_table
from engine.observe.profiling import Profiler
from engine.runtime import activity
from engine.runtime.distributed import World
from tests.commands import done


def trace_of(folder) -> list[dict]:
    with gzip.open(folder / "trace-rank-0.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


@pytest.fixture
def doing(monkeypatch):
    """An Activity of the test's own."""
    fresh = activity.Activity()
    monkeypatch.setattr(activity, "current", fresh)
    return fresh


# ---------------------------------------------------------------- the numbers, by hand


def test_shares_of_phases_and_who_is_slowest():
    rows = phase_shares([{"data": 1.0, "forward": 3.0}, {"forward": 5.0, "data": 0.5, "save": 9.0}], steps=2)
    assert [(row["phase"], row["seconds"], row["share"]) for row in rows] == [
        ("data", 0.5, 0.25), ("forward", 1.5, 0.75),
    ]  # fmt: skip
    assert [(row["slowest_rank"], row["slowest_seconds"]) for row in rows] == [(0, 0.5), (1, 2.5)]
    lines = phase_table(rows, processes=2)
    assert lines[1].split() == ["data", "500.0", "25.0%", "rank", "0:", "500.0"]
    assert "rank" not in "".join(phase_table(rows, processes=1))


def test_only_communication_that_nothing_runs_beside_is_exposed():
    kernels = [("gemm", 0, 10), ("ncclDevKernel_AllGather", 8, 14), ("ncclDevKernel_Reduce", 13, 16), ("add", 15, 20)]
    assert exposed(kernels) == pytest.approx(5e-6), "10 to 15"
    assert exposed([]) == exposed(kernels[:1]) == 0


def test_the_table_ranks_by_time_and_sums_up_the_rest():
    lines = ranking([("small", 4, 1000.0), ("large", 2, 6000.0), *[("x", 1, 100.0)] * 30], "kernel", steps=2)
    assert lines[1].split() == ["3.000", "60.0%", "1.0", "large"]
    assert lines[2].split() == ["0.500", "10.0%", "2.0", "small"]
    assert len(lines) == 1 + TOP + 1 and lines[-1].split() == ["0.100", "2.0%", "2", "others"]


def test_phases_are_timed_while_watched_and_no_longer(doing):
    doing.enter("data", 1)
    watch = PhaseTimes(torch.device("cpu"))
    watch.start()
    time.sleep(0.02)
    doing.enter("forward")
    doing.enter("data")
    time.sleep(0.02)
    with watch.interrupted():
        pass
    watch.stop()
    assert doing.on_change is None
    doing.enter("save")
    spent = watch.seconds()
    assert list(spent) == ["data", "forward"]
    assert spent["data"] >= 0.04 and spent["forward"] < spent["data"]


# ---------------------------------------------------------------- which steps


def profiled(tmp_path, doing, wanted, start=0, total=9, until=None) -> list[str]:
    """What is said in steps start + 1 to `until`; step N adds N + 1 times."""
    said: list[str] = []
    alone = World(0, 0, 1, torch.device("cpu"))
    settings = SimpleNamespace(profile_steps=wanted)
    run = SimpleNamespace(
        settings=settings, world=alone, output_dir=tmp_path, total=total, say=said.append,
        meter=SimpleNamespace(paused=nullcontext),
    )  # fmt: skip
    profiler, until = Profiler(), until or total
    profiler.on_start(run, start)
    for step in range(start + 1, until + 1):
        doing.enter("forward", step)
        for _ in range(step + 1):
            torch.ones(2).mul_(2)
        profiler.on_step(run, step, None)
    profiler.on_end(run, until, 0)
    assert doing.on_change is None
    return said


def multiplied(tmp_path) -> int:
    return sum(event.get("name") == "aten::mul_" for event in trace_of(tmp_path / "profile"))


def steps_of(tmp_path) -> int:
    return json.loads((tmp_path / "profile" / "phases.json").read_text())["steps"]


def test_exactly_the_steps_that_are_named_are_recorded(tmp_path, doing):
    said = profiled(tmp_path, doing, "3:4")
    assert "profile: steps 3:4 are recorded, and take longer" in said
    assert multiplied(tmp_path) == 4 + 5 and steps_of(tmp_path) == 2


@pytest.mark.filterwarnings("error")
def test_the_first_step_needs_no_warm_up(tmp_path, doing):
    profiled(tmp_path, doing, "1:1")
    assert multiplied(tmp_path) == 2


def test_a_run_that_ends_meanwhile_leaves_what_it_has(tmp_path, doing):
    profiled(tmp_path, doing, "3:8", until=4)
    assert multiplied(tmp_path) == 4 + 5 and steps_of(tmp_path) == 2


def test_a_run_that_ends_while_it_warms_up_leaves_nothing(tmp_path, doing):
    for until in (1, 2):
        (*_, line) = profiled(tmp_path, doing, "3:8", until=until)
        assert line == "note: profile_steps 3:8: the run ends before, nothing is recorded"
    assert not list(tmp_path.rglob("trace*"))


def test_steps_that_are_past_or_beyond_the_end_are_said(tmp_path, doing):
    (line,) = profiled(tmp_path, doing, "2:3", start=5)
    assert line == "note: profile_steps 2:3: this run has no such step, they lie before step 6, where it goes on"
    (line,) = profiled(tmp_path, doing, "10:12")
    assert line.endswith("they lie after its last")
    assert not (tmp_path / "profile").exists()
    said = profiled(tmp_path, doing, "5:20", start=7)
    assert said[0] == "note: profile_steps: only steps 8:9 of 5:20 are to come"
    assert multiplied(tmp_path) == 9 + 10


def test_a_full_disk_does_not_end_the_run(tmp_path, doing):
    (tmp_path / "profile").write_text("in the way")
    assert any("could not be written, training goes on" in line for line in profiled(tmp_path, doing, "2:3"))


# ---------------------------------------------------------------- a run


def test_a_profiled_run_computes_the_same_and_shows_its_phases(demo, tmp_path):
    def losses(name: str, **settings) -> tuple[list[float], str]:
        said = done(
            "train", "--drop_long_samples", model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path,
            train_data_file=demo.data_file, codes_cache_dir=demo.data_file.parent / "codes", backend="none",
            output_dir=tmp_path / name, max_tokens_per_micro_batch=900, dataloader_num_workers=0, max_steps=4,
            warmup_steps=0, report_to="none", logging_steps=1, save_steps=50, **settings,
        )  # fmt: skip
        return journal.read(tmp_path / name / "metrics.jsonl"), said

    plain, _ = losses("plain")
    lines, said = losses("profiled", profile_steps="2:3")
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    assert [line["grad_norm"] for line in lines] == [line["grad_norm"] for line in plain]
    assert all(line["communication_share"] == 0 <= line["data_share"] < 1 for line in lines)
    assert all(0.1 < line["memory_gib"] <= line["memory_peak_gib"] for line in lines)

    folder = tmp_path / "profiled" / "profile"
    shares = {row["phase"]: row["share"] for row in json.loads((folder / "phases.json").read_text())["phases"]}
    assert {"data", "forward", "backward", "optimizer"} <= set(shares) and sum(shares.values()) == pytest.approx(1)
    ranges = {event["name"] for event in trace_of(folder) if event.get("name", "").startswith("phase: ")}
    assert {"phase: data", "phase: forward", "phase: backward", "phase: optimizer"} <= ranges
    kernels = (folder / "kernels.txt").read_text()
    assert "aten::" in kernels and "phase: forward" in kernels
    assert all(line in said for line in kernels.splitlines()[: 1 + len(shares)]), "the table of phases is printed"
