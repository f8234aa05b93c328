"""What this process is doing: which step, which phase, since when; kept where it can be read after a kill -9.

A launcher that names a folder in HIGGS_ENGINE_RECORDS finds there a record of each rank of its machine. A record is
memory that is mapped to a file: to write it takes microseconds and no system call, and it outlives the process.
"""

import json
import mmap
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = "HIGGS_ENGINE_RECORDS"
SIZE = 512
"""Bytes of a record: JSON, filled up with spaces."""


class Activity:
    """One process's; the engine's code tells `current` below.

    Attributes:
        step: optimizer step under way, counted from 1 as in the log; None outside of the steps.
        phase: in words.
        patient: the phase may take as long as it likes.
        since: time.time() of the last progress.
        seconds: spent so far in each phase that was left.
        code: the exit code, once the process is about to end.
        on_change: is told the name of each phase that begins (engine/observe/phases.py); None: nobody is.
    """

    def __init__(self) -> None:
        self.rank, self.host, self.pid = 0, socket.gethostname(), os.getpid()
        self.step: int | None = None
        self.phase, self.patient, self.code = "start", True, None
        self.since, self._progress = time.time(), time.monotonic()
        self.seconds: dict[str, float] = {}
        self.on_change: Callable[[str], None] | None = None
        self._entered = time.monotonic()
        self._memory: mmap.mmap | None = None

    @property
    def idle_s(self) -> float:
        """Seconds without progress, by a clock that nobody sets."""
        return time.monotonic() - self._progress

    def keep(self, rank: int) -> None:
        """From now on this process is `rank`, and its record a file where the launcher asked for one.

        The file is that of its place on the machine: where machines come and go, ranks are numbered anew, and who had
        the place before is of no interest any more.
        """
        self.rank, self.pid, self.code = rank, os.getpid(), None
        folder = os.environ.get(FOLDER)
        if folder and os.path.isdir(folder):
            place = os.environ.get("LOCAL_RANK", rank)
            with open(Path(folder) / f"process-{place}.json", "w+b") as file:
                file.truncate(SIZE)
                self._memory = mmap.mmap(file.fileno(), SIZE)
        self._write()

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase of a step begins; without a number it is the step under way."""
        self._change(phase, patient=False)
        self.step = self.step if step is None else step
        self.tick()

    def outside(self, phase: str) -> None:
        """A phase that belongs to no step begins: it takes as long as it likes."""
        self._change(phase, patient=True)
        self.step = None
        self.tick()

    def _change(self, phase: str, patient: bool) -> None:
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._entered
        self.phase, self.patient, self._entered = phase, patient, now
        if self.on_change is not None:
            self.on_change(phase)

    def tick(self) -> None:
        """The phase under way has got further."""
        self.since, self._progress = time.time(), time.monotonic()
        self._write()

    def ends(self, code: int) -> None:
        """The process is about to end with this exit code."""
        self.code = code
        self._write()

    def record(self) -> dict:
        names = ("rank", "host", "pid", "step", "phase", "since", "code")
        return {name: getattr(self, name) for name in names}

    def _write(self) -> None:
        if self._memory is not None:
            self._memory[:] = json.dumps(self.record()).encode()[:SIZE].ljust(SIZE)


current = Activity()


def read_records(folder: Path) -> list[dict]:
    """The records in a folder, by rank; one that its process had just begun is left out."""
    found = []
    for file in folder.glob("process-*.json"):
        try:
            found.append(json.loads(file.read_text()))
        except ValueError:
            continue
    return sorted(found, key=lambda record: record["rank"])


def describe(record: dict, idle_s: float | None = None) -> str:
    """`rank 3 (node-b, pid 4711): step 12, backward, for 31 s`; by default up to now, by this machine's clock."""
    step = "" if record["step"] is None else f"step {record['step']}, "
    who = f"rank {record['rank']} ({record['host']}, pid {record['pid']})"
    idle_s = max(time.time() - record["since"], 0.0) if idle_s is None else idle_s
    return f"{who}: {step}{record['phase']}, for {idle_s:.0f} s"
