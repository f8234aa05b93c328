"""Starts a test script in several real gloo processes and gives their output when one fails."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(command: list[str], world_size: int, **env: str) -> list[subprocess.Popen]:
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
        started.append(
            subprocess.Popen(
                [sys.executable, *command], env=variables | env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
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
