"""A tracker in a thread of its own: training waits for no network and no disk.

The seconds, or minutes of retries, that a server does not answer pass there. A tracker that fails is reported once
and switched off; so is one so slow that `MOST_WAITING` calls wait for it. `metrics.jsonl` has everything anyway.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from operator import methodcaller

from engine.exit_codes import FAILED, HUNG
from engine.observe.trackers.tracker import NullTracker

MOST_WAITING = 1000
PATIENCE_S = 60.0
"""For a tracker to send what it still has when the run ends."""
HURRY_S = 5.0
"""The same after a failure: the other processes wait to be told of it."""


class Background:
    """
    Args:
        name: of the tracker.
        say: prints a line; called from any thread.
    """

    def __init__(self, name: str, tracker: NullTracker, say: Callable[[str], None]):
        self.name, self.tracker, self._say = name, tracker, say
        self._on = True
        self._calls: queue.Queue[Callable | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def call(self, method: str, *args: object) -> None:
        """Has the tracker's method called, soon."""
        if not self._on:
            return
        try:
            self._calls.put_nowait(methodcaller(method, *args))
        except queue.Full:
            self._switched_off(f"{MOST_WAITING} calls wait for it")

    def close(self, code: int) -> None:
        """Closes the tracker when it has sent everything, which is awaited, but not for ever."""
        patience = PATIENCE_S if self._on and code not in (FAILED, HUNG) else HURRY_S
        with contextlib.suppress(queue.Full):
            self._calls.put(methodcaller("close", code), timeout=patience)
            self._calls.put(None, timeout=patience)
        self._thread.join(patience)
        if self._thread.is_alive() and self._on:
            self._switched_off(f"it has not sent everything after {patience:g} s")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call(self.tracker)
            except Exception as error:  # whatever a tracker's library raises
                failed, self.tracker = self.tracker, NullTracker()
                self._switched_off(f"{type(error).__name__}: {error}")
                with contextlib.suppress(Exception):
                    failed.close(FAILED)

    def _switched_off(self, why: str) -> None:
        if self._on:
            self._on = False
            self._say(f"report_to: {self.name} is switched off: {why}; training goes on, metrics.jsonl has everything")
