"""A thread in each process that ends a run which hangs, and says which process holds it up.

Three things make it end its process, all of them while the main thread gets no further:
- it has not for `timeout_s` (a collective that others never join, a loader that gives nothing);
- the next rank gives no sign of life any more (stopped, or its machine is gone);
- another process has said that the run is over.
The one that ends first tells the others why, so that a fault is told once and nobody waits for a peer that has gone.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.distributed as dist

from engine.exit_codes import HUNG
from engine.runtime import activity, beats, distributed
from engine.runtime.distributed import World

SILENT_S = 60.0
"""A process without a sign of life for so long is gone, if its neighbour waits as well."""
STORE_SPARE_S = 15.0
"""What a round of the watchdog may take beside waiting for one answer."""
GOES_FIRST_S = 30.0
"""Collectives are given so much longer than the watchdog, which knows more of why they do not end."""
STACKS_S = 3.0
"""For the file of stacks: a file system that does not answer may be why the run hangs."""


class Watchdog:
    """Every process of a run has one.

    Args:
        timeout_s: how long the main thread may be without progress in a phase that is not patient (activity.py).
        stacks: folder for what each process was doing, line by line, when it was ended.
    """

    def __init__(self, world: World, timeout_s: float, stacks: Path):
        self._world, self._timeout_s, self._stacks = world, timeout_s, stacks
        self._silent_s = min(SILENT_S, timeout_s)
        self.beats = beats.Beats(world)
        self._stop = threading.Event()
        self._round_at = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        threading.Thread(target=self._watch_store, args=(thread,), name="watchdog of the store", daemon=True).start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        neighbour = (self._world.rank + 1) % self._world.size
        last, heard_at = None, time.monotonic()
        while not self._stop.wait(beats.INTERVAL_S):
            self._round_at = time.monotonic()
            doing = activity.current
            waits_long = doing.idle_s > self._silent_s
            try:
                self.beats.publish()
                if doing.idle_s > self._timeout_s and not doing.patient:
                    self._end(beats.hanging(*self.beats.all_twice()))
                if doing.idle_s > 3 * beats.INTERVAL_S and (over := self.beats.over()):
                    self._follow(over["code"])
                beat = self.beats.of(neighbour)
                if beat != last:
                    last, heard_at = beat, time.monotonic()
                elif waits_long and time.monotonic() - heard_at > self._silent_s:
                    self._end(beats.hanging(*self.beats.all_twice()))
            except dist.DistError:
                if waits_long:
                    self._end(["rank 0 or its launcher, which keeps the rendezvous store, does not answer"])

    def _watch_store(self, watching: threading.Thread) -> None:
        """A call to the store does not return, nor time out, while its machine is cut off from the network."""
        while watching.is_alive():
            time.sleep(beats.INTERVAL_S)
            blocked_s = time.monotonic() - self._round_at
            if blocked_s > self._silent_s + STORE_SPARE_S and activity.current.idle_s > self._silent_s:
                self._dump_stacks()
                say([
                    f"the run hangs: rank {self._world.rank} has had no answer for {blocked_s:.0f} s from the"
                    " rendezvous store, which rank 0 or its launcher keeps",
                    "→ look at the network between the machines, then resume with --resume auto",
                ])  # fmt: skip
                self._leave(HUNG)

    def _end(self, lines: list[str]) -> None:
        dumped = self._dump_stacks()
        with contextlib.suppress(dist.DistError):
            if not self.beats.announce(HUNG, lines):
                self._leave(HUNG)
        say([
            f"the run hangs: no progress on rank {self._world.rank} for {activity.current.idle_s:.0f} s", *lines,
            *([f"what each process was doing, line by line: {self._stacks}"] if dumped else []),
            "→ resume with --resume auto; timeout_s is the longest that a step, an evaluation or a save may take",
        ])  # fmt: skip
        self._leave_last(HUNG)

    def _dump_stacks(self) -> bool:
        """Whether it could; in a thread of its own, so that no disk keeps this process from ending."""
        done = threading.Event()

        def dump() -> None:
            with contextlib.suppress(OSError):
                self._stacks.mkdir(parents=True, exist_ok=True)
                with open(self._stacks / f"rank-{self._world.rank}.txt", "w") as file:
                    faulthandler.dump_traceback(file)
                done.set()

        thread = threading.Thread(target=dump, name="stacks", daemon=True)
        thread.start()
        thread.join(STACKS_S)
        return done.is_set()

    def _follow(self, code: int) -> None:
        if code == HUNG:
            self._dump_stacks()
        self._leave_last(code)

    def _leave_last(self, code: int) -> None:
        """Rank 0 may be the store's host, from which the others learn that it is over, and who has said so."""
        if self._world.rank == 0 and self._world.size > 1:
            self._stop.wait(distributed.GRACE_S + 1)
        self._leave(code)

    def _leave(self, code: int) -> None:
        activity.current.ends(code)
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
        os._exit(code)


def say(lines: Iterable[str]) -> None:
    """One write, so that the lines of several processes do not mix; none where nobody reads any more."""
    with contextlib.suppress(OSError):
        sys.stderr.write("\n" + "\n  ".join(lines) + "\n")
        sys.stderr.flush()
