"""The command line of each launcher."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.launch.environment import mask

if TYPE_CHECKING:
    from engine.launch.plan import LaunchPlan

MEETING_TIMEOUT_S = 900
"""Machines of a cluster seldom start together; the same as between ranks (engine/runtime/distributed.py)."""


def with_command(plan: "LaunchPlan", env: Mapping[str, str]) -> "LaunchPlan":
    if plan.launcher == "none":
        return replace(plan, command=(sys.executable, "-u"))
    if plan.launcher == "torchrun":
        words = _torchrun(plan, env)
        # Else it keeps one store for all rounds, and ranks of a later one find addresses of ranks that have gone.
        fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if "c10d" in words else {}
        return replace(plan, command=tuple(words), changes=plan.changes | fresh)
    words, changes = _deepspeed(plan, env)
    return replace(plan, command=tuple(words), changes=plan.changes | changes)


def _torchrun(plan: "LaunchPlan", env: Mapping[str, str]) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(plan.here)]
    most = len(plan.processes)
    if plan.node is not None and not env.get("RDZV_ENDPOINT"):
        place = ["--master_addr", plan.host, "--master_port", str(plan.port)]
        return [*words, "--nnodes", str(most), "--node_rank", str(plan.node), *place]
    patience = f"join_timeout={MEETING_TIMEOUT_S},read_timeout={MEETING_TIMEOUT_S}"
    return [
        *words, "--nnodes", str(most) if plan.fewest is None else f"{plan.fewest}:{most}",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", plan.rendezvous,
        "--rdzv_id", env.get("RDZV_ID") or "higgs-engine", "--rdzv_conf", patience,
    ]  # fmt: skip


def _deepspeed(plan: "LaunchPlan", env: Mapping[str, str]) -> tuple[list[str], dict[str, None]]:
    """The words, and variables that must not be there."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    words += ["--master_port", str(plan.port)]
    if env.get("HOSTFILE"):
        words += ["--hostfile", env["HOSTFILE"]]
        words += ["--master_addr", plan.host] if plan.host else []
        if not plan.by_ssh:
            return [*words, "--no_ssh", "--node_rank", str(plan.node)], {}
        _require_ssh(env)
        return words + (["--force_multi"] if len(plan.processes) == 1 else []), {}
    visible = plan.changes.get("CUDA_VISIBLE_DEVICES", env.get("CUDA_VISIBLE_DEVICES"))
    if visible:
        # Beside --num_gpus DeepSpeed ignores the mask and takes the first GPUs of the machine.
        taken = ",".join(visible.split(",")[: plan.here])
        return [*words, "--include", f"localhost:{taken}"], {"CUDA_VISIBLE_DEVICES": None}
    return [*words, "--num_gpus", str(plan.here)], {}


def _require_ssh(env: Mapping[str, str]) -> None:
    """What DeepSpeed needs to start other machines; it would fail with a traceback, or far away."""
    path = env.get("PATH")
    problems = [
        f"{name} is not on PATH, and starts the other machines → install it, or start each machine with its own "
        "NODE_RANK and MASTER_ADDR"
        for name in ("pdsh", "ssh")
        if shutil.which(name, path=path) is None
    ]
    for what, there in (("the working directory", os.getcwd()), ("the Python", sys.executable)):
        if not re.fullmatch(r"[\w@+=:,./-]+", there):
            problems.append(
                f"{what}, {there}, has characters in its path that DeepSpeed's ssh commands cannot have → another "
                "path, or start each machine with its own NODE_RANK and MASTER_ADDR"
            )
    if problems:
        raise ConfigError("the run cannot be started", problems)


def full_command(plan: "LaunchPlan", script: str, arguments: Sequence[str]) -> list[str]:
    """The plan's command with script and arguments; by ssh so that shells on the way leave them as they are."""
    if not plan.by_ssh:
        return [*plan.command, script, *arguments]
    return [*plan.command, shlex.quote(script), *map(through_ssh, arguments)]


def through_ssh(argument: str) -> str:
    """DeepSpeed puts an argument with a space between double quotes, in which it masks those and nothing else."""
    return mask(argument, "\\$`") if " " in argument or "%" in argument else shlex.quote(argument)
