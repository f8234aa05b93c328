"""Places in the world from every launcher's variables, and agreement between real processes."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from engine.errors import ConfigError, DataError, EngineError, Interrupted
from engine.runtime import distributed
from engine.runtime.distributed import (
    exit_cleanly,
    init_process_group,
    launcher_variables,
    raise_together,
    shutdown,
    wait_for_all,
)

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "SLURM_", "OMPI_", "TORCHELASTIC_")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_NAMES)}


SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03-05,09],fat1",
    "SLURM_JOB_ID": "70001", "SLURM_STEP_ID": "2",
}  # fmt: skip


def test_torchrun_and_deepspeed_are_taken_as_they_are():
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    for local_size in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        found = launcher_variables(given | {local_size: "2"})
        assert given.items() <= found.items()
        assert (found["LOCAL_WORLD_SIZE"], found["CROSS_RANK"], found["CROSS_SIZE"]) == ("2", "1", "2")
    assert launcher_variables(given | {"CROSS_RANK": "7", "CROSS_SIZE": "9"})["CROSS_RANK"] == "7"


def test_srun(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # without scontrol
    found = launcher_variables(SRUN)
    assert found == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20003", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    }  # fmt: skip
    assert launcher_variables(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})["MASTER_ADDR"] == "a"


@pytest.mark.parametrize(
    "nodelist, first",
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-4]", "n1"), ("a-b[007,9]", "a-b007"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_first_host_without_scontrol(monkeypatch, nodelist, first):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert distributed._first_host(nodelist) == first


def test_a_batch_script_is_no_rank():
    """sbatch gives its script SLURM_PROCID and SLURM_NTASKS, but starts it once."""
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    assert launcher_variables(script)["WORLD_SIZE"] == "1"


def test_mpirun():
    given = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    given |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    found = launcher_variables(given)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    assert [found[name] for name in names] == ["1", "2", "1", "127.0.0.1"]
    with pytest.raises(ConfigError, match="-x MASTER_ADDR"):
        launcher_variables(given | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def test_device(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed._device(1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="Process 2 .* 2 are visible"):
        distributed._device(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each task of srun sees its own GPU only
    assert distributed._device(3) == torch.device("cuda", 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert distributed._device(3) == torch.device("cpu")


def test_alone_without_a_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHER_NAMES):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    for _ in range(2):
        world = init_process_group()
        try:
            assert (world.rank, world.local_rank, world.size, world.is_main) == (0, 0, 1, True)
            assert init_process_group() == world
            assert os.environ["WORLD_SIZE"] == "1" and dist.get_world_size() == 1
            wait_for_all("nobody")
            raise_together(world, None)
            with pytest.raises(KeyError):
                raise_together(world, KeyError("mine"))
        finally:
            shutdown(world)
        assert dict(os.environ) == before and not dist.is_initialized()


def test_who_cannot_meet_says_where_and_why(monkeypatch):
    monkeypatch.setattr(distributed, "_placed", [])
    with socket.create_server(("", 0)) as other, mock.patch.dict(os.environ, clean_environment(), clear=True):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        os.environ |= place | {"RANK": "0", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
        with pytest.raises(Interrupted) as caught:
            init_process_group()
    words = [r"rank 0 \(", "MASTER_ADDR=127.0.0.1, MASTER_PORT=" + place["MASTER_PORT"], "in use", "→ were all 2 "]
    assert re.search(".*".join(words), str(caught.value)) and caught.value.spokesman == 0


def outcome(call) -> list | None:
    try:
        call()
    except BaseException as error:
        return [type(error).__name__, str(error), error.spokesman]


def ranks(case: str, size: int = 2, timeout: float = 60) -> list[dict]:
    """What each of `size` processes that run `case` below has printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = clean_environment() | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": port}
    env |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, case], stdout=subprocess.PIPE, text=True,
                         env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size
    return [json.loads(text) for text in printed]


def case_agreement(world) -> dict:
    """Every kind of agreement, one after the other in the same processes."""
    mine = DataError("Reading", ["row 1: empty", f"row 2: rank {world.rank} finds it long"])
    lost, divided = ConfigError("No such model"), ZeroDivisionError("by zero")
    results = {
        "nothing": outcome(lambda: raise_together(world, None)),
        "both": outcome(lambda: raise_together(world, mine)),
        "same": outcome(lambda: raise_together(world, lost)),
        "one": outcome(lambda: raise_together(world, lost if world.rank else None)),
        "foreign": outcome(lambda: raise_together(world, divided if world.rank else None)),
    }
    # A failure meets those who only wait for the end of the work.
    failing = (lambda: raise_together(world, mine)) if world.rank else (lambda: wait_for_all("the data"))
    results["waiting"] = outcome(failing)
    # What was agreed upon passes an outer agreement unchanged, without another meeting.
    if world.is_main:
        mine.spokesman = 7
        results["again"] = outcome(lambda: raise_together(world, mine))
    return results


def test_two_ranks_agree():
    first, second = ranks("agreement")
    assert first["nothing"] is None and second["nothing"] is None
    both = "Reading\n  - row 1: empty"
    both += "".join(f"\n  - row 2: rank {rank} finds it long (rank {rank})" for rank in range(2))
    assert first["both"] == second["both"] == ["DataError", both, 0]
    assert first["same"] == second["same"] == ["ConfigError", "No such model", 0]
    assert first["one"] == second["one"] == ["ConfigError", "No such model (rank 1)", 1]
    assert first["foreign"] == ["EngineError", "ZeroDivisionError: by zero (rank 1)", 1]
    assert second["foreign"] == ["ZeroDivisionError", "by zero", 1]
    assert first["waiting"][0] == "DataError" and "row 1: empty (rank 1)" in first["waiting"][1]
    assert first["again"][2] == 7


def case_patience(world) -> dict:
    """Rank 0 works for longer than a collective may take."""
    if world.is_main:
        time.sleep(4.5)
    started = time.monotonic()
    wait_for_all("the work of rank 0")
    return {"waited": time.monotonic() - started}


def test_waiting_outlasts_the_timeout_of_collectives():
    first, second = ranks("patience")
    assert first["waited"] < 1 < 3 < second["waited"]


def case_busy(world) -> dict:
    """Rank 1 fails while rank 0 is busy, which is not awaited for longer than the grace."""
    distributed.GRACE_S = 0.5
    started = time.monotonic()
    if world.is_main:
        time.sleep(3)
    result = outcome(lambda: raise_together(world, None if world.is_main else EngineError("Broken")))
    return {"took": time.monotonic() - started, "result": result}


def test_a_busy_rank_is_not_awaited():
    first, second = ranks("busy")
    assert first["result"] == second["result"] == ["EngineError", "Broken (rank 1)", 1]
    assert second["took"] < 2.5


if __name__ == "__main__":
    world = init_process_group(timeout_s=3 if sys.argv[1] == "patience" else 60)
    assert dist.get_world_size() == world.local_size
    print(json.dumps(globals()[f"case_{sys.argv[1]}"](world)))
    shutdown(world)
    exit_cleanly(0)
