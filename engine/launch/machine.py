"""What this machine has: GPUs that torch can use, and cores."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """
    Attributes:
        gpus: visible, and usable by this Python's torch.
        cores: that this process may use.
    """

    host: str
    gpus: int
    cores: int

    @classmethod
    def here(cls, env: Mapping[str, str]) -> "Machine":
        return cls(socket.gethostname(), count_gpus(env), count_cores())


def count_gpus(env: Mapping[str, str]) -> int:
    """torch is asked, for it knows the masks and its build; unless there is no GPU to ask about, for it takes seconds.

    Raises:
        ConfigError: there are GPUs, and torch cannot use them.
    """
    if env.get("DS_ACCELERATOR") == "cpu" or env.get("CUDA_VISIBLE_DEVICES", "all") == "" or not lists_gpus():
        return 0
    # Another process, lest this one keep memory of every GPU for as long as the run takes.
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(asked, env=dict(env), stdout=subprocess.PIPE, text=True).stdout.split()
    count = int(answer[-1]) if answer else 0
    if count == 0:
        line = (
            f"this machine has GPUs that the torch of {sys.executable} cannot use → install a build of torch for its "
            "driver, or set DS_ACCELERATOR=cpu to train on the CPU"
        )
        raise ConfigError("the run cannot be started", [line])
    return count


def lists_gpus() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return any(line.startswith("GPU ") for line in listed.stdout.splitlines())


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
