"""Reads hostile input under watch: documented errors alone, nothing written elsewhere, no program, no endless wait.

Python tells its audit hooks of every file that is opened, made, renamed or removed, of every program that is started
and of every name that a pickle asks for. A hook cannot be taken away again: there is one, that hears only when armed.
"""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings

from engine.errors import EngineError

CHANGES = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "shutil.rmtree", "shutil.copyfile", "shutil.move",
}  # fmt: skip
PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOST_SECONDS = 20
MOST_MEMORY = 2 << 30
MOST_WORDS = 200_000
"""Characters of a message: what is wrong is told, not repeated."""

DEFAULT = 5290
SCALE = int(os.environ.get("HIGGS_ENGINE_FUZZ", DEFAULT)) / DEFAULT
"""Set the variable to the number of inputs wanted of all tests here together; more than usual are drawn at random."""


def inputs(count: int) -> settings:
    """The settings of a test that tries `count` of the default number of inputs."""
    return settings(
        max_examples=max(1, round(count * SCALE)), derandomize=SCALE <= 1, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class _Hook:
    def __init__(self) -> None:
        self.allowed: str | None = None  # the folder that may change; None: nobody listens
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.allowed is None:
            return
        if event in PROGRAMS:
            self.heard.append(f"{event} {arguments}")
        elif event in CHANGES and (event != "open" or arguments[2] and arguments[2] & WRITES):
            paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
            paths = paths[:1] if event == "open" else paths
            self.heard += [f"{event} {path}" for path in paths if not os.path.realpath(path).startswith(self.allowed)]


_HOOK = _Hook()


def outcome(read: Callable[[], object], may_change: Path | None = None) -> object:
    """What `read` gives, or the documented error that it raises; anything else fails the test.

    Args:
        may_change: the one folder in which it may write.
    """
    with _time_limit(), _listening(os.path.realpath(may_change) + os.sep if may_change else "nowhere"):
        try:
            return read()
        except EngineError as error:
            assert 0 < len(str(error)) < MOST_WORDS, "the message repeats its input"
            str(error).encode()  # it can be printed
            return error


@contextlib.contextmanager
def _listening(allowed: str) -> Iterator[None]:
    _HOOK.heard, _HOOK.allowed = [], allowed
    try:
        yield
    finally:
        _HOOK.allowed = None
    assert not _HOOK.heard, f"reading did more than read: {_HOOK.heard}"


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_) -> None:
        raise TimeoutError(f"not done after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Within, this process gets no more than `MOST_MEMORY` beside what it has: a header that lies cannot have more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
