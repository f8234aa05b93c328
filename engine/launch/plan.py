"""Who starts how many processes where, from the environment, the hostfile and what this machine has.

The variables are those of `bash launch/train.sh --help`. A plan is the same on every machine of a run but for the
machine's own number; each machine that is started by itself computes it alone.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import ConfigError
from engine.launch import commands
from engine.launch.hostfile import read_hostfile
from engine.launch.machine import Machine, free_port

LAUNCHERS = ("deepspeed", "torchrun", "none")
PORT = "29500"
WITHOUT_GPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""A launcher's variables for its ranks; an operator's RANK for each machine must not pass for one of them."""


@dataclass(frozen=True)
class LaunchPlan:
    """
    Attributes:
        launcher: deepspeed, torchrun, or none: this very process.
        processes: on each machine, by name; by number where this machine does not know the others' names.
        fewest: machines to begin with, where more may come and go; None: all of them.
        node: this machine's place among them; None: it is found by the rendezvous, or one machine starts all by ssh.
        by_ssh: the launcher starts the other machines' processes too.
        host, port: where the processes meet.
        command: the launcher's words; the script and its arguments follow.
        changes: of the environment; None: the variable is taken away.
    """

    launcher: str
    processes: dict[str, int]
    fewest: int | None
    node: int | None
    by_ssh: bool
    host: str
    port: int
    command: tuple[str, ...]
    changes: dict[str, str | None] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.processes.values())

    @property
    def here(self) -> int | None:
        """Processes of this machine; by ssh it need not be among them."""
        if self.by_ssh:
            return None
        return list(self.processes.values())[self.node or 0]

    @property
    def meets_others(self) -> bool:
        """Other machines, each started by itself, come to the same place."""
        return not self.by_ssh and (len(self.processes) > 1 or self.fewest is not None)

    @property
    def rendezvous(self) -> str:
        return f"{self.host}:{self.port}"


def make_plan(env: Mapping[str, str], machine: Machine) -> LaunchPlan:
    """
    Raises:
        ConfigError: everything that is wrong with the variables and the hostfile.
    """
    return _Planning(env, machine).plan()


def environment(env: Mapping[str, str], plan: LaunchPlan) -> dict[str, str]:
    """What the launcher runs in."""
    changed = dict(env) | plan.changes
    return {name: value for name, value in changed.items() if value is not None}


class _Planning:
    """Reads one variable after the other and collects what is wrong with them."""

    def __init__(self, env: Mapping[str, str], machine: Machine):
        self.env = dict(env) | _of_slurm(env) | _of_operator(env)
        self.machine, self.problems = machine, []
        self.launcher = self._launcher()

    def plan(self) -> LaunchPlan:
        here, hosts = self._processes(), self._hosts()
        fewest, most = self._machines(hosts)
        node = self._node(float("inf") if hosts is None else most) if self.env.get("NODE_RANK") else None
        by_ssh = bool(hosts) and node is None and (len(hosts) > 1 or not self._is_here(*hosts))
        if node is None and most == 1 and not by_ssh:
            node = 0
        host, port = self._meeting_place(most, fewest, by_ssh)
        if self.problems:
            raise ConfigError("the run cannot be started", self.problems)
        processes = hosts or {self.machine.host if most == 1 else f"machine {n}": here for n in range(most)}
        changes = self._changes(list(processes.values())[node or 0])
        fewest_if_any = None if fewest == most else fewest
        plan = LaunchPlan(self.launcher, processes, fewest_if_any, node, by_ssh, host, port, (), changes)
        return commands.with_command(plan, self.env)

    def _launcher(self) -> str:
        name = self.env.get("LAUNCHER") or "deepspeed"
        if name not in LAUNCHERS:
            self.problems.append(f"LAUNCHER={name} → one of {', '.join(LAUNCHERS)}")
        # DeepSpeed knows GPUs by number alone; torchrun leaves UUIDs, as MIG slices always have, to the ranks.
        if name == "deepspeed" and not re.fullmatch(r"[0-9,]*", self.env.get("CUDA_VISIBLE_DEVICES", "")):
            return "torchrun"
        return name

    def _processes(self) -> int:
        gpus = self.machine.gpus
        count = self._number("NPROC", at_least=1) if self.env.get("NPROC") else gpus or 2
        if gpus and count > gpus:
            self.problems.append(f"NPROC={count}, but {gpus} GPUs are visible → at most {gpus}")
        return count

    def _hosts(self) -> dict[str, int] | None:
        """None: there are some, and the file does not say which."""
        path = self.env.get("HOSTFILE")
        if not path:
            return {}
        hosts, problems = read_hostfile(path)
        self.problems += problems
        if self.launcher != "deepspeed":
            self.problems.append(f"HOSTFILE is for LAUNCHER=deepspeed, not {self.launcher} → NNODES and MASTER_ADDR")
        return None if problems else hosts

    def _machines(self, hosts: dict[str, int] | None) -> tuple[int, int]:
        """How many at least, and at most."""
        expected = len(hosts or ()) or 1
        text = self.env.get("NNODES") or str(expected)
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        fewest, most = (int(part) for part in (match.group(1), match.group(2) or match.group(1))) if match else (0, 0)
        if not 1 <= fewest <= most:
            self.problems.append(f"NNODES={text} is no number of machines → as 2, or 1:4 for one to four")
            return 1, 1
        if self.launcher == "deepspeed" and hosts is not None and (fewest, most) != (expected, expected):
            self.problems.append(
                f"NNODES={text}: LAUNCHER=deepspeed finds the other machines in HOSTFILE, not from NNODES → give "
                "HOSTFILE, or LAUNCHER=torchrun"
            )
        if self.launcher == "none" and most > 1:
            self.problems.append(f"NNODES={text}: LAUNCHER=none is a single process → LAUNCHER=torchrun")
        return fewest, most

    def _node(self, most: float) -> int:
        """This machine's place among `most`."""
        if most > 1:
            return self._number("NODE_RANK", at_least=0, below=most)
        if (text := self.env["NODE_RANK"]) != "0":
            self.problems.append(f"NODE_RANK={text} of one machine → NNODES or HOSTFILE has to name the others, too")
        return 0

    def _meeting_place(self, most: int, fewest: int, by_ssh: bool) -> tuple[str, int]:
        """By ssh the host may be left empty: DeepSpeed asks the first machine for its address."""
        endpoint = self.env.get("RDZV_ENDPOINT", "")
        host, port = re.fullmatch(r"(\[.*\]|[^:]*):?(.*)", endpoint).groups()
        if endpoint and self.launcher != "torchrun":
            self.problems.append(f"RDZV_ENDPOINT={endpoint} is for LAUNCHER=torchrun → set that, or MASTER_ADDR")
        if fewest != most and self.env.get("NODE_RANK"):
            self.problems.append("NODE_RANK with a range in NNODES: machines are numbered as they come → leave it out")
        host = host or self.env.get("MASTER_ADDR") or ("127.0.0.1" if most == 1 and not by_ssh else "")
        if not host and not by_ssh:
            self.problems.append("several machines have to know where to meet → MASTER_ADDR=<the first machine>")
        port = port or self.env.get("MASTER_PORT") or (str(free_port()) if most == 1 and not by_ssh else PORT)
        if not re.fullmatch(r"\d+", port) or not 0 < int(port) < 2**16:
            self.problems.append(f"port {port!r} → a number from 1 to 65535, in MASTER_PORT")
            port = PORT
        return host, int(port)

    def _changes(self, here: int) -> dict[str, str | None]:
        changes: dict[str, str | None] = dict.fromkeys(name for name in OF_A_RANK if name in self.env)
        if not self.machine.gpus:
            changes |= WITHOUT_GPU
        if not self.env.get("OMP_NUM_THREADS"):
            changes["OMP_NUM_THREADS"] = str(max(self.machine.cores // here, 1))
        return changes

    def _is_here(self, host: str) -> bool:
        return host in ("localhost", "127.0.0.1", self.machine.host, self.machine.host.partition(".")[0])

    def _number(self, name: str, at_least: int, below: float = float("inf")) -> int:
        text = self.env[name]
        if re.fullmatch(r"\d+", text) and at_least <= int(text) < below:
            return int(text)
        limit = f" to {below - 1}" if below < float("inf") else " on"
        self.problems.append(f"{name}={text} → a whole number, from {at_least}{limit}")
        return at_least


def _of_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """One task of srun per machine starts the ranks of its machine: by torchrun, and the first machine is known."""
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) <= 1:
        return {}
    number = int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
    return {
        "LAUNCHER": env.get("LAUNCHER") or "torchrun",
        "NNODES": env["SLURM_STEP_NUM_NODES"],
        "NODE_RANK": env["SLURM_NODEID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_machine(env.get("SLURM_STEP_NODELIST", "")),
        # The same on all machines of a step, another for its neighbours, and below what the kernel hands out.
        "MASTER_PORT": env.get("MASTER_PORT") or str(10000 + number % 20000),
    }


def _first_machine(nodelist: str) -> str:
    try:
        return subprocess.check_output(["scontrol", "show", "hostnames", nodelist], text=True).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _of_operator(env: Mapping[str, str]) -> dict[str, str]:
    """Kubernetes operators set RANK and WORLD_SIZE once per machine, of the machine; LAUNCHER says that it is so."""
    if not (env.get("LAUNCHER") == "torchrun" and env.get("RANK") and env.get("WORLD_SIZE")):
        return {}
    return {"NNODES": env.get("NNODES") or env["WORLD_SIZE"], "NODE_RANK": env.get("NODE_RANK") or env["RANK"]}
