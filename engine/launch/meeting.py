"""Not to walk into the meeting place of the attempt before.

Each machine of a run restarts by itself, at the same host and port. One that is ahead would find there the store of
the old attempt, whose end the first machine has not noticed yet, and take old addresses for new ones. So while an
attempt runs, each machine keeps a connection to its store, over which nothing is said; it breaks when the store ends.
How often each machine has started does not matter: one that was started anew joins the others' next attempt. All
need `--resume auto` for that, from the beginning: the ranks of the new one do not know that the run was restarted.
"""

import contextlib
import socket
import threading

RETRY_S = 1.0
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""After 40 s of silence a machine whose cable was pulled counts as gone."""


class OldMeetingPlace:
    """The store of one attempt."""

    def __init__(self, host: str, port: int):
        self._place = (host.strip("[]"), port)
        self._connection: socket.socket | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._connect, name="meeting place", daemon=True)
        self._thread.start()

    def _connect(self) -> None:
        """The store is there when the first machine's launcher, or its first rank, has come so far."""
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                connection = socket.create_connection(self._place, timeout=5)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in KEEPALIVE.items():
                    if hasattr(socket, name):
                        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
                if self._over.is_set():  # this is the next attempt's
                    connection.close()
                else:
                    self._connection = connection
                return
            self._over.wait(RETRY_S)

    def attempt_is_over(self) -> None:
        """From now on a store that answers would be the next attempt's."""
        self._over.set()

    def is_gone(self) -> bool:
        """Whether its store has ended, or never was."""
        if self._connection is None:
            return True
        self._connection.settimeout(0.01)
        try:
            return self._connection.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._over.set()
        if self._connection is not None:
            self._connection.close()
