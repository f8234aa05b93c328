"""Starts a test script in several real gloo processes and gives their output when one fails.

The processes are forked from one that has imported the engine: torch and transformers take each process four to five
seconds, and the tests start hundreds. What launchers start (tests/launch and others) begins from nothing, as a user's.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["engine.cli", "engine.train", "engine.evaluate.sampler"])


class Started:
    """A process that runs `python *command`, with what is used of subprocess.Popen's interface.

    Args:
        variables: its whole environment.
    """

    def __init__(self, command: list[str], variables: dict[str, str]):
        self._output = tempfile.NamedTemporaryFile("r")
        self._process = FORKS.Process(target=_run, args=([str(word) for word in command], variables, self._output.name))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the process", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits for the end; what it has written, errors among the rest."""
        self.wait(timeout)
        return self._output.read(), None


def _run(command: list[str], variables: dict[str, str], output: str) -> None:
    """In the new process: becomes `python *command`."""
    os.environ.clear()
    os.environ.update(variables)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout.reconfigure(encoding=variables.get("PYTHONIOENCODING"))
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    first, *rest = command
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(first, run_name="__main__")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(command: list[str], world_size: int, **env: str) -> list[Started]:
    """`python *command` once a rank, with the environment that a launcher would give."""
    port = str(free_port())
    started = []
    for rank in range(world_size):
        variables = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        started.append(Started(command, variables | env))
    return started


def run(command: list[str], world_size: int, timeout: float = 240, check: bool = True, **env: str) -> tuple[list, list]:
    """Runs to the end; returns exit codes and outputs by rank.

    Raises:
        AssertionError: with `check`, a rank failed or the time is over (a hang).
    """
    processes = start(command, world_size, **env)
    deadline = time.monotonic() + timeout
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(1, deadline - time.monotonic()))[0])
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not finished after {timeout} s: the processes hang") from None
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    codes = [process.returncode for process in processes]
    if check and any(codes):
        raise AssertionError(f"exit codes {codes}\n" + "\n".join(f"--- rank {i}\n{o}" for i, o in enumerate(outputs)))
    return codes, outputs
