"""Signals to the launch: the ranks are told once, and a second one ends everything."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
URGENT = (signal.SIGTERM, signal.SIGINT)
ECHO_S = 1.0
"""Ctrl-C and batch systems reach several processes of a run, some of which hand it on: what follows at once is one."""


class Signals:
    """What has come; `take` gives what to do about it.

    Attributes:
        first: the first signal.
        urged: the first TERM or INT, which the ranks have heard once.
        insisted: a second TERM or INT came, or a third.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.urged: int | None = None
        self.insisted = 0
        self._waiting: list[tuple[int, float]] = []
        self._told: set[int] = set()
        self._urged_at: float | None = None

    @contextmanager
    def listening(self) -> Iterator["Signals"]:
        heard = [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object = None) -> None:
        self._waiting.append((number, time.monotonic()))
        self.first = self.first or signal.Signals(number)

    def take(self) -> list[int]:
        """The signals that the ranks have not been told of yet; raises `insisted` instead for repeated ones."""
        new = []
        while self._waiting:
            number, at = self._waiting.pop(0)
            if number in URGENT and self._urged_at is not None:
                if at - self._urged_at > ECHO_S:
                    self.insisted, self._urged_at = self.insisted + 1, at
                continue
            if number in URGENT:
                self.urged, self._urged_at = number, at
            if number not in self._told:
                self._told.add(number)
                new.append(number)
        return new
