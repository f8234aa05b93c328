"""A repository whose engine is a stub that tells what reached it, and commands in a clean environment."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT

FOREIGN = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "GROUP_", "SLURM_", "OMPI_", "TORCHELASTIC_", "RDZV_"),
    *("NPROC", "NNODES", "NODE_RANK", "LAUNCHER", "HOSTFILE", "OMP_NUM_THREADS", "PYTHONPATH", "HIGGS_ENGINE_RE"),
)
REAL = ("launch", "errors.py", "exit_codes.py", "runtime/activity.py")
"""Of the engine: the launcher and what it needs."""

CONFIG = """
from types import SimpleNamespace
from engine.errors import ConfigError

def parse(arguments):
    if "--wrong" in arguments:
        raise ConfigError("the settings cannot be used", ["wrong: is wrong → leave it out"])
    at = arguments.index("--max_restarts") + 1 if "--max_restarts" in arguments else 0
    restarts = int(arguments[at]) if at else 0
    return SimpleNamespace(max_restarts=restarts, resume="none", output_dir="out", timeout_s=1800)
"""

# One write to stdout per process: lines of two ranks do not mix.
CLI = """
import json, os, signal, sys, time
from engine.runtime import activity

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HIGGS_ENGINE_RESTART")

def say(**what):
    os.write(1, (json.dumps(what) + chr(10)).encode())

def main(arguments):
    told = {name: os.environ.get(name) for name in NAMES}
    if told["RANK"]:
        activity.current.keep(int(told["RANK"]))
    say(arguments=arguments, cwd=os.getcwd(), path=sys.path[0], pid=os.getpid(), **told)
    code = act(arguments, told)
    activity.current.ends(code)
    return code

def act(arguments, told):
    activity.current.enter("backward", step=12)
    if "--fail" in arguments:  # rank 1 alone, at its first start
        code = int(arguments[arguments.index("--fail") + 1])
        if told["RANK"] == "1" and not told["HIGGS_ENGINE_RESTART"]:
            return code
        return 0 if told["HIGGS_ENGINE_RESTART"] else time.sleep(30) or 9
    if "--wait" in arguments:
        code = int(arguments[arguments.index("--wait") + 1])
        heard = []
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            signal.signal(getattr(signal, name), lambda number, frame: heard.append(number))
        say(ready=1, RANK=told["RANK"])
        for _ in range(300):
            time.sleep(0.1)
            if heard and "--deaf" not in arguments:
                time.sleep(1)
                say(heard=heard, RANK=told["RANK"])
                time.sleep(2)  # torchrun ends the others when the first has left; by then they have spoken
                return code
        return 9
    return 0
"""


def make_tree(top: Path) -> Path:
    shutil.copytree(ROOT / "launch", top / "launch")
    (top / "engine" / "runtime").mkdir(parents=True)
    for name in REAL:
        source, target = ROOT / "engine" / name, top / "engine" / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (top / "engine" / "cli.py").write_text(CLI)
    (top / "engine" / "config.py").write_text(CONFIG)
    return top


def environment(**more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return env | {"DS_ACCELERATOR": "cpu", "HIGGS_ENGINE_PYTHON": sys.executable} | more


def run(command: list, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=90)


def start(tree: Path, *arguments: str, cwd: Path, **env: str) -> subprocess.Popen:
    """`launch/train.sh` at work, its output and its errors to be read."""
    command = ["bash", str(tree / "launch/train.sh"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment(**env), text=True, **pipes)


def told(stdout: str) -> list[dict]:
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: int(line["RANK"] or 0))


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])
