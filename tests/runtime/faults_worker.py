"""Runs of two real processes into each of which something goes wrong; prints what became of them, as JSON.

faults_worker.py FOLDER FLAGS ...      the settings of a run that would go on for a long time

The processes are forks of this one, which has all imports behind it. A case waits until the victim, rank 1, is in its
third step, by the record that each rank keeps (engine/runtime/activity.py), and does its worst.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import psutil
import torch

import engine.train  # noqa: F401  (before the forks: its imports take seconds)
from engine.backends.torch_optimizer import TorchBackend
from engine.cli import main
from engine.data import loader
from engine.runtime import activity, beats, distributed
from tests.processes import free_port

STEP = 3
BOUND_S = 40


def nothing(victim: int) -> None:
    """What goes wrong is in the patch."""


def sends(number: int):
    return lambda victim: os.kill(victim, number)


def kills_its_loader_worker(victim: int) -> None:
    worker = next(p for p in psutil.Process(victim).children() if p.status() != psutil.STATUS_ZOMBIE)
    worker.kill()


def at_step(action):
    """Patches rank 1's forward."""

    def patch(rank: int) -> None:
        forward = TorchBackend.forward

        def patched(self, *inputs):
            if rank == 1 and activity.current.step == STEP:
                action()
            return forward(self, *inputs)

        TorchBackend.forward = patched

    return patch


def damaged_data(rank: int) -> None:
    """The loader of rank 1 cannot pack its third row."""
    pack, calls = loader.pack, []

    def patched(*arguments):
        calls.append(1)
        if rank == 1 and len(calls) == STEP:
            raise IndexError("codes of another length")
        return pack(*arguments)

    loader.pack = patched


def unpatched(rank: int) -> None:
    """The engine as it is."""


CASES = {
    # name: what is done to rank 1, what is patched, more flags
    "signal": (sends(signal.SIGUSR1), unpatched, ()),
    "time": (nothing, unpatched, ("--max_train_hours", "0.0015")),
    "killed": (sends(signal.SIGKILL), unpatched, ()),
    "stopped": (sends(signal.SIGSTOP), unpatched, ()),
    "late": (nothing, at_step(lambda: (activity.current.enter("data"), time.sleep(100))), ()),
    "worker": (kills_its_loader_worker, unpatched, ("--dataloader_num_workers", "1")),
    "data": (nothing, damaged_data, ()),
    "memory": (nothing, at_step(lambda: torch.empty(2**46)), ()),
    "defect": (nothing, at_step(lambda: 1 // 0), ()),
}


def rank(number: int, port: str, records: Path, log: Path, patch, arguments: list[str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, activity.FOLDER: str(records)}
    patch(number)
    code = 1
    try:
        code = main(["train", *arguments])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run(folder: Path, name: str, flags: list[str]) -> dict:
    """Exit codes (negative: the signal), what each rank said, and the seconds from the fault to the end."""
    harm, patch, more = CASES[name]
    out, records = folder / name, folder / f"{name}-records"
    records.mkdir()
    logs = [folder / f"{name}-{number}.log" for number in range(2)]
    port, children = str(free_port()), []
    for number in range(2):
        child = os.fork()
        if child == 0:
            rank(number, port, records, logs[number], patch, [*flags, *more, "--output_dir", str(out)])
        children.append(child)
    codes: list[int | None] = [None, None]
    give_up = time.monotonic() + BOUND_S
    while not any(r["rank"] == 1 and (r["step"] or 0) >= STEP for r in activity.read_records(records)):
        assert time.monotonic() < give_up, "\n".join(log.read_text() for log in logs)
        time.sleep(0.02)
    harm(children[1])
    began = time.monotonic()
    while None in codes and time.monotonic() < began + BOUND_S:
        for i in range(2):
            if codes[i] is None and (ended := os.waitpid(children[i], os.WNOHANG))[0]:
                codes[i] = os.waitstatus_to_exitcode(ended[1])
        if codes[0] is not None and name == "stopped" and codes[1] is None:
            os.kill(children[1], signal.SIGKILL)  # as a launcher does
        time.sleep(0.02)
    took = time.monotonic() - began
    for i in range(2):
        if codes[i] is None:
            os.kill(children[i], signal.SIGKILL)
            os.waitpid(children[i], 0)
    return {
        "codes": codes, "said": [log.read_text() for log in logs], "seconds": took,
        "records": activity.read_records(records), "checkpoints": sorted(p.name for p in out.glob("checkpoint-*")),
        "stacks": {p.name: p.read_text() for p in out.glob("stacks/*")}, "pids": children,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    beats.INTERVAL_S, distributed.GRACE_S = 0.25, 1.0
    where, arguments = Path(sys.argv[1]), sys.argv[2:]
    print(json.dumps({name: run(where, name, arguments) for name in CASES}))
