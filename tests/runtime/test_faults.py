"""Runs of two real processes into which something goes wrong: they end in bounded time, and say who, where and what.

All cases come from one script, whose ranks are forks (faults_worker.py), so that the imports are paid once.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from engine.exit_codes import FAILED, HUNG, STOPPED, TIME_IS_UP
from tests.commands import flags
from tests.processes import ROOT

TIMEOUT_S = 4


@pytest.fixture(scope="module")
def outcome(demo, tmp_path_factory):
    """name of a case -> what became of it."""
    settings = flags(
        model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path, train_data_file=demo.data_file,
        codes_cache_dir=demo.data_file.parent / "codes", max_steps=10_000, save_steps=10_000, logging_steps=1,
        max_tokens_per_micro_batch=512, backend="fsdp", dataloader_num_workers=0, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("faults")
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.runtime.faults_worker", str(folder), *settings]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name, code, why", [
    ("signal", STOPPED, "a signal asked for it"), ("time", TIME_IS_UP, "max_train_hours"),
])  # fmt: skip
def test_asked_to_stop_all_save_the_same_step_and_leave(outcome, name, code, why):
    """The signal comes to rank 1 only."""
    result = outcome[name]
    assert result["codes"] == [code, code], result["said"]
    (checkpoint,) = result["checkpoints"]
    step = int(checkpoint.removeprefix("checkpoint-"))
    assert step >= 3
    assert f"stopped after step {step} of 10000: {why}" in result["said"][0]
    assert result["seconds"] < 15
    if name == "signal":
        assert "rank 1: SIGUSR1: saves after this step and leaves" in result["said"][1]


def test_a_killed_rank_is_named_with_host_step_and_phase(outcome):
    result = outcome["killed"]
    assert result["codes"] == [FAILED, -signal.SIGKILL] and result["seconds"] < 20, result["said"][0]
    said = result["said"][0]
    assert "another process is gone → --resume auto" in said
    assert f"no sign of life of rank 1 ({os.uname().nodename}, pid {result['pids'][1]}): step " in said
    assert "Traceback" not in said
    # what the launcher reads: exactly where it was, and that it did not end by itself
    left = {record["rank"]: record for record in result["records"]}
    assert left[0]["code"] == FAILED and left[1]["code"] is None
    assert left[1]["step"] >= 3 and left[1]["phase"] in ("data", "forward", "backward", "optimizer", "log")


def test_a_stopped_rank_is_found_by_its_neighbour(outcome):
    result = outcome["stopped"]
    assert result["codes"][0] == HUNG and result["seconds"] < 3 * TIMEOUT_S
    assert "the run hangs" in result["said"][0]
    assert f"no sign of life of rank 1 ({os.uname().nodename}, pid {result['pids'][1]})" in result["said"][0]
    assert "in forward" in result["stacks"]["rank-0.txt"]


def test_who_comes_late_is_told_from_who_waits(outcome):
    result = outcome["late"]
    assert result["codes"] == [HUNG, HUNG] and result["seconds"] < 3 * TIMEOUT_S
    told = "".join(result["said"])
    assert told.count("the run hangs") == 1
    assert "held up by rank 1" in told and "): step 3, data, for" in told
    assert "faults_worker.py" in result["stacks"]["rank-1.txt"]  # the very line where it sleeps


@pytest.mark.parametrize("name, code, words", [
    ("worker", FAILED, ["a process that makes batches was killed", "lower dataloader_num_workers"]),
    ("data", FAILED, ["step 3, micro-batch 1 of rank 1 cannot be made of row", "codes of another length", "validate"]),
    ("memory", FAILED, ["step 3, forward", "out of memory → lower max_tokens_per_micro_batch"]),
    ("defect", FAILED, ["step 3, forward, for 0 s: ZeroDivisionError", "Traceback", "in patched"]),
])  # fmt: skip
def test_what_fails_on_one_rank_ends_both(outcome, name, code, words):
    result = outcome[name]
    assert result["codes"] == [code, code] and result["seconds"] < 20, result["said"]
    assert all(word in result["said"][1] for word in words), result["said"][1]
    assert "Traceback" not in result["said"][0]
    assert name == "defect" or "Traceback" not in result["said"][1]
    assert name == "worker" or [record["step"] for record in result["records"]] == [3, 3]
