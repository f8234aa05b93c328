"""Time in collectives, and shares of time: against hand-computed cases, and between two real processes."""

import json
import mmap
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from engine.observe import communication, memory, shares
from engine.observe.communication import CommunicationClock, StreamClock, covered
from engine.observe.memory import GIB, Memory
from engine.observe.shares import TimeShares
from engine.runtime import activity
from engine.runtime.distributed import World
from tests.processes import run

ALONE, OF_TWO = (World(0, 0, size, torch.device("cpu")) for size in (1, 2))


@pytest.fixture
def doing(monkeypatch):
    """An Activity of the test's own."""
    fresh = activity.Activity()
    monkeypatch.setattr(activity, "current", fresh)
    return fresh


@pytest.fixture
def group():
    """A real group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


@pytest.fixture
def stopwatch(monkeypatch):
    """A clock of which each reading is 0.25 s after the one before."""
    now = iter(range(10**6))
    monkeypatch.setattr(communication.time, "perf_counter", lambda: next(now) / 4)


def test_overlapping_spans_count_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 1.7)]) == 4


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # names of torch 2.11, which DeepSpeed calls
def test_calls_and_waits_are_counted_and_torch_is_left_as_it_was(group, stopwatch, doing):
    before = {name: ProcessGroup.__dict__.get(name) for name in communication.COLLECTIVES} | {"": Work.wait}
    with communication.measured(OF_TWO) as clock:
        doing.enter("backward", 1)
        box = torch.ones(3)
        kept = dist.all_reduce  # as DeepSpeed keeps references
        kept(box)  # the call and the wait inside: two spans
        assert clock.seconds(1) == 0.5
        work = dist.all_reduce(box, async_op=True)
        assert clock.seconds(1) == 0.25
        work.wait()
        assert clock.seconds(1) == 0.25
        dist.broadcast(box, 0)
        dist.all_gather_into_tensor(torch.empty(3), box)
        dist.reduce_scatter_tensor(torch.empty(3), box)
        dist.all_to_all_single(torch.empty(3), box)
        assert clock.seconds(1) == 4 * 0.5, "of each the call and the wait"
        assert clock.seconds(1) == 0, "since the last call"
    assert {name: ProcessGroup.__dict__.get(name) for name in communication.COLLECTIVES} | {"": Work.wait} == before
    dist.all_reduce(box)
    assert clock.seconds(1) == 0


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_evaluations_saves_and_other_threads_do_not_count(group, stopwatch, doing):
    with communication.measured(OF_TWO) as clock:
        for phase in ("evaluate", "save", "log"):
            doing.enter(phase, 1)
            dist.all_reduce(torch.ones(3))
        doing.enter("forward")
        other = threading.Thread(target=dist.all_reduce, args=(torch.ones(3),))
        other.start()
        other.join()
        assert clock.seconds(1) == 0
        with pytest.raises(RuntimeError, match="tensor size"):
            dist.all_gather_into_tensor(torch.empty(7), torch.ones(3))
        dist.all_reduce(torch.ones(3))
        assert clock.seconds(1) >= 0.5, "also after one that failed"


def test_on_a_gpu_logged_steps_stand_for_all(group, doing, monkeypatch):
    """Its events are played here: each is 2 ms after the one before."""
    now = iter(range(0, 10**6, 2))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(StreamClock, "_on_gpu", lambda self, arguments: True)
    with communication.measured(World(0, 0, 2, torch.device("cuda")), every=10) as clock:
        for step in range(2, 11):
            doing.enter("backward", step)
            dist.all_reduce(torch.ones(3), async_op=True)
        assert len(clock._pairs) == 1, "of step 10 only"
        assert clock.seconds(steps=9) == pytest.approx(9 * 0.002)
        assert clock.seconds(steps=1) is None, "nothing measured is not nothing spent"
        doing.enter("backward", 1)
        dist.all_reduce(torch.ones(3))
        assert clock.seconds(steps=1) == pytest.approx(0.004), "the call and the wait"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_collectives_are_measured_and_those_of_the_host_are_not(group, doing):
    nccl = dist.new_group(backend="nccl")
    with communication.measured(World(0, 0, 2, torch.device("cuda")), every=1) as clock:
        doing.enter("backward", 1)
        dist.all_reduce(torch.ones(3))
        assert clock.seconds(steps=1) is None
        work = dist.all_reduce(torch.ones(2**24, device="cuda"), group=nccl, async_op=True)
        work.wait()
        assert len(clock._pairs) == 2 and clock.seconds(steps=1) > 0


def test_one_process_is_left_alone():
    before = ProcessGroup.allreduce
    with communication.measured(ALONE) as clock:
        assert ProcessGroup.allreduce is before
        assert clock.seconds(3) == 0


class Told(CommunicationClock):
    """Says what the test says."""

    def __init__(self, *seconds):
        self._each = iter((0.0, *seconds))

    def seconds(self, steps):
        return next(self._each)


def test_shares_are_of_the_time_since_the_last_reading(doing, monkeypatch):
    monkeypatch.setattr(shares.Memory, "read", lambda self: (1.5, 2.5))
    doing.seconds["data"] = 100.0
    read = TimeShares(ALONE, Told(1.0, None, 9.0)).read
    doing.seconds["data"] += 2.0
    expected = {"data_share": 0.25, "communication_share": 0.125, "memory_gib": 1.5, "memory_peak_gib": 2.5}
    assert read(8.0, 4) == expected
    assert read(8.0, 4) == expected | {"data_share": 0.0, "communication_share": None}, "nothing was measured"
    assert read(8.0, 4)["communication_share"] == 1.0, "an estimate is no more than all of it"


def test_the_peak_of_a_process_is_since_the_last_reading():
    if memory._kernel_peak() is None:
        pytest.skip("this system's peak cannot be set back")
    meter = Memory(torch.device("cpu"))
    meter.read()
    size = 64 * 2**20
    with mmap.mmap(-1, size) as block:  # of the system's: what the C library has kept from before would be no new peak
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
    now, peak = meter.read()
    assert peak - now > 0.9 * size / GIB
    now, peak = meter.read()
    assert now <= peak < now + 16 * 2**20 / GIB


def test_without_the_kernels_peak_it_is_the_higher_of_two_readings(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    meter = Memory(torch.device("cpu"))
    assert meter.read()[0] == meter.read()[0] > 0.01
    meter._last = 1e6
    assert meter.read()[1] == 1e6 and meter.read()[1] < 1e6


# ---------------------------------------------------------------- two processes; the file is their script too


def test_the_slow_process_waits_for_data_and_the_other_for_it(tmp_path):
    """Both are told both shares. A quarter of a second of waiting in something more than that."""
    run([__file__, str(tmp_path)], 2)
    mine, others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert mine["read"] == others["read"], "all know the highest"
    assert mine["read"]["data_share"] > 0.5 and mine["read"]["communication_share"] > 0.5
    assert mine["alone"][0] > 0.25 > 0.2 > others["alone"][0], "rank 0 waited for data"
    assert others["alone"][1] > 0.2 > mine["alone"][1], "rank 1 waited for rank 0"
    assert mine["read"]["memory_peak_gib"] >= mine["read"]["memory_gib"] > 0.05


def _rank(folder: Path) -> None:
    from engine.runtime.distributed import init_process_group, shutdown

    world = init_process_group(60)
    with communication.measured(world) as clock:
        dist.barrier()
        reader, began = TimeShares(world, clock), time.perf_counter()
        seconds, spent = clock.seconds, []
        clock.seconds = lambda steps: spent.append(seconds(steps)) or spent[-1]
        activity.current.enter("data", 1)
        time.sleep(0.3 if world.rank == 0 else 0.0)
        activity.current.enter("backward")
        dist.all_reduce(torch.ones(3))
        activity.current.enter("log")
        read = reader.read(time.perf_counter() - began, steps=1)
    said = {"read": read, "alone": [activity.current.seconds["data"], spent[0]]}
    (folder / f"{world.rank}.json").write_text(json.dumps(said))
    shutdown(world)


if __name__ == "__main__":
    import sys

    _rank(Path(sys.argv[1]))
