"""Being asked to stop, by a signal or by the clock: all processes save after the same step, and leave.

A signal may come to one process only, or to all at another moment each; the processes agree on a step by a vote
(agreement.py). The operating system's signals are read from a pipe by a thread: Python's own handlers would not run
while the main thread waits in a collective, which is when a second Ctrl-C has to work.
"""

import ctypes
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from engine.exit_codes import STOPPED, TIME_IS_UP
from engine.runtime import activity
from engine.runtime.agreement import Ballot
from engine.runtime.distributed import World

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""USR1 is what batch systems send ahead of a time limit or a pre-emption."""
PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: the signal that a process gets when its parent dies."""
ECHO_S = 1.0
"""Ctrl-C reaches every process of a terminal, and some launchers hand it on once more."""


class Response(enum.Enum):
    LEAVE = "there is nothing to save"
    SAVE = "after the step under way, all together"
    NONE = "the process is about to end anyway, and still has something to say"


class StopRequests:
    """What asks this process to stop.

    Args:
        max_hours: from now; None: no limit.

    Attributes:
        signal: the first one that came.
        response: to a first signal.
    """

    def __init__(self, max_hours: float | None = None):
        self.signal: signal.Signals | None = None
        self.response = Response.LEAVE
        self._deadline = float("inf") if max_hours is None else time.monotonic() + 3600 * max_hours
        self._heard_at: dict[signal.Signals, float] = {}

    @property
    def code(self) -> int:
        """The exit code that is asked for; 0: none."""
        if self.signal is not None:
            return STOPPED
        return TIME_IS_UP if time.monotonic() > self._deadline else 0

    def nothing_is_left_to_save(self) -> None:
        """From now on a signal ends this process at once; so does one that came too late for the last vote."""
        self.response = Response.LEAVE
        if self.signal is not None:
            self._leave(self.signal, "leaves; everything is saved", STOPPED)

    def hear(self, number: int) -> None:
        """A first signal asks to save and leave, which is at once where there is nothing to save; the same again
        leaves at once, unless it is USR1."""
        now = signal.Signals(number)
        since = time.monotonic() - self._heard_at.setdefault(now, time.monotonic())
        if self.signal is None:
            self.signal = now
            if self.response == Response.LEAVE:
                self._leave(now, "leaves; there is nothing to save", STOPPED)
            once_more = "" if now == signal.SIGUSR1 else "; once more leaves at once"
            if self.response == Response.SAVE:
                _say(f"{now.name}: saves after this step and leaves{once_more}")
        elif now != signal.SIGUSR1 and since > ECHO_S:
            self._leave(now, "leaves at once, without saving", 128 + number)

    def _leave(self, number: signal.Signals, how: str, code: int) -> NoReturn:
        _say(f"{number.name}: {how}")
        activity.current.ends(code)
        os._exit(code)

    @contextmanager
    def listening(self) -> Iterator["StopRequests"]:
        """In here signals are heard. Only the main thread can; in another one nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        heard = [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
        handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.write(writing, b"\0")  # closing it would not do: loader workers have it open too
            thread.join()
            os.close(writing)
            os.close(reading)

    def _listen(self, reading: int) -> None:
        while 0 not in (numbers := os.read(reading, 64)):
            for number in numbers:
                if number in HEARD:
                    self.hear(number)


def _say(line: str) -> None:
    sys.stderr.write(f"\nrank {os.environ.get('RANK', '0')}: {line}\n")
    sys.stderr.flush()


class StopVote:
    """Whether to stop after this step; the same answer on all processes."""

    def __init__(self, requests: StopRequests, world: World, timeout: timedelta):
        self._requests, self._ballot = requests, Ballot(world, dist.ReduceOp.MAX, timeout)

    def after_step(self) -> int:
        """The exit code to leave with once this step is saved, or 0. A request takes effect a step after it came."""
        return self._ballot.vote(self._requests.code)

    def close(self) -> None:
        self._ballot.close()


def begin_worker() -> None:
    """For loader workers: signals are their rank's business, and they die with it.

    SLURM sends SIGTERM to every process of a job, while ranks still need batches. A worker that outlives its rank
    keeps the rank's connections open, and the other ranks would learn of its end only seconds later.
    """
    signal.set_wakeup_fd(-1)  # the rank's pipe
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
