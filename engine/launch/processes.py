"""The processes of a run on this machine, found by the folder for records that all of them were given.

Not by their parents: torchrun gives each rank a session of its own, what ssh starts hangs from its server, and a
launcher that was killed leaves its ranks to nobody.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from engine.runtime.activity import FOLDER

GRACE_S = 30.0
"""Between telling processes to end and ending them; launchers give their ranks as long."""


def of_run(records: Path) -> list[psutil.Process]:
    """Every process of the run but this one: launchers, ranks, and what these have started."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _belongs(process, records)]


def ranks(records: Path) -> list[psutil.Process]:
    """A rank has RANK, and its launcher has not; a rank's own children are its business."""
    return [process for process in of_run(records) if _is_rank(process, records)]


def _environment(process: psutil.Process | None) -> dict[str, str]:
    try:
        return process.environ() if process else {}
    except (psutil.Error, OSError):  # another user's, or just ended
        return {}


def _belongs(process: psutil.Process | None, records: Path) -> bool:
    return _environment(process).get(FOLDER) == str(records)


def _is_rank(process: psutil.Process, records: Path) -> bool:
    try:
        parent = process.parent()
    except psutil.Error:
        return False
    return "RANK" in _environment(process) and _belongs(parent, records) and "RANK" not in _environment(parent)


class Endings:
    """Which of the watched processes has ended, and in which order: the launcher ends the others right after a first
    one, and does not say which that was."""

    def __init__(self) -> None:
        self._handles: dict[int, int] = {}
        self._poll = select.poll() if _has_handles() else None

    def watch(self, pid: int) -> bool:
        """Whether there is still something to watch."""
        try:
            handle = os.pidfd_open(pid) if self._poll else pid
        except OSError:
            return False
        if self._poll:
            self._poll.register(handle, select.POLLIN)
        self._handles[handle] = pid
        return True

    def wait(self, seconds: float) -> list[int]:
        """The processes that end first, or none in that time."""
        if self._poll is None:
            time.sleep(seconds)
            found = [pid for pid in self._handles if _is_gone(pid)]
        else:
            found = [handle for handle, _ in self._poll.poll(1000 * seconds)]
        for handle in found if self._poll else ():
            self._poll.unregister(handle)
            os.close(handle)
        return [self._handles.pop(handle) for handle in found]

    def close(self) -> None:
        for handle in self._handles if self._poll else ():
            os.close(handle)
        self._handles.clear()


def _has_handles() -> bool:
    """Whether the system has handles of processes, which tell of their end at once: Linux, unless a sandbox forbids."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, also if nobody has asked for its exit code yet."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def is_stopped(pid: int, records: Path) -> bool:
    """Whether it is of the run, and was stopped by a signal; not by a debugger."""
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_STOPPED and _belongs(process, records)
    except psutil.NoSuchProcess:
        return False


def kill(pid: int) -> None:
    """With -9, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def tell(processes: Iterable[psutil.Process], number: int) -> int:
    """Sends a signal; how many of them were still there."""
    told = 0
    for process in processes:
        try:
            process.send_signal(number)
            told += 1
        except psutil.Error:
            continue
    return told


def end_all(records: Path, hurry: Callable[[], object]) -> None:
    """Ends what is left of a run: asks, and kills after `GRACE_S` or in a hurry."""
    left = of_run(records)
    tell(left, signal.SIGTERM)
    tell(left, signal.SIGCONT)  # one that is stopped would never hear of it
    deadline = time.monotonic() + GRACE_S
    while (remaining := of_run(records)) and time.monotonic() < deadline and not hurry():
        time.sleep(0.1)
    tell(remaining, signal.SIGKILL)
