"""`--dry_run`: the settings as config.yaml would have them, and as comments below them who would run what where.

It is no setting. Its output is a file for --config.
"""

import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.launch import environment as forwarding
from engine.launch.commands import full_command
from engine.launch.plan import LaunchPlan

if TYPE_CHECKING:
    from engine.config import Settings

FLAGS = frozenset({"--dry_run", "--dry-run"})
HELP = "  --dry_run             show the resolved settings and what would run where, as a file for --config, and stop"


def without(arguments: Iterable[str]) -> list[str]:
    return [word for word in arguments if word not in FLAGS]


def settings_text(settings: "Settings", processes: int, has_gpu: bool) -> str:
    """
    Raises:
        ConfigError: settings that cannot be used with so many processes.
    """
    resolved = settings.with_resolved(processes, has_gpu, resumed_step=_resumed_step(settings))
    with tempfile.TemporaryDirectory() as folder:
        resolved.to_yaml(Path(folder, "config.yaml"))
        return Path(folder, "config.yaml").read_text(encoding="utf-8")


def _resumed_step(settings: "Settings") -> int | None:
    """The size of the steps of the run that would be resumed; whether its checkpoint is whole is not asked."""
    if settings.resume == "none":
        return None
    from engine.checkpoint.lifecycle import checkpoints
    from engine.checkpoint.manifest import load_manifest

    found = checkpoints(Path(settings.output_dir)) if settings.resume == "auto" else [Path(settings.resume)]
    return load_manifest(found[-1]).plan["micro_batches_per_step"] if found else None


def plan_lines(plan: LaunchPlan, env: Mapping[str, str], script: str, arguments: Sequence[str]) -> list[str]:
    """What bash launch/train.sh would do, started on this machine."""
    here = "" if plan.node is None else f" (this is machine {plan.node})" if len(plan.processes) > 1 else ""
    lines = [f"launcher: {plan.launcher}", f"processes: {plan.total}{here}"]
    lines += [f"  {name}: {count}" for name, count in plan.processes.items()]
    if plan.fewest is not None:
        lines.append(f"machines: {plan.fewest} to {len(plan.processes)}, as they come")
    if plan.launcher != "none":
        lines.append(f"meeting place: {plan.host or 'the address of the first machine'}, port {plan.port}")
    lines.append(f"command: {shlex.join(full_command(plan, script, arguments))}")
    lines.append("environment of the command, beside that of this shell:")
    lines += [
        f"  {forwarding.shown(name, value) if value is not None else f'without {name}'}"
        for name, value in plan.changes.items()
    ]
    if plan.by_ssh and plan.changes.get("DS_ACCELERATOR") == "cpu":
        lines.append("note: the automatic settings above are those of machines without GPUs, as this one is")
    return [*lines, *(_forwarded_lines(env) if plan.by_ssh else _not_forwarded(plan))]


def _not_forwarded(plan: LaunchPlan) -> list[str]:
    if not plan.meets_others:
        return ["environment for other machines: there are none"]
    return ["environment for other machines: each has the one that it is started in"]


def _forwarded_lines(env: Mapping[str, str]) -> Iterator[str]:
    yield "environment for other machines, from this shell:"
    for name, value in forwarding.forwarded(env).items():
        yield f"  {forwarding.shown(name, value)}"
    for name, why in forwarding.held_back(env).items():
        yield f"  without {name}: {why}"
    for file, lines in forwarding.own_lines(env, Path.cwd()).items():
        yield f"environment for other machines, from {file}:"
        for line in lines:
            yield f"  {forwarding.shown(*line.strip().split('=', 1))}"


def rank_lines(env: Mapping[str, str]) -> list[str]:
    """What a rank of any launcher knows of its run."""
    from engine.runtime.distributed import launcher_variables

    own = launcher_variables(env)
    return [
        f"launcher: another's; processes: {own['WORLD_SIZE']}, {own['LOCAL_WORLD_SIZE']} on this machine",
        f"meeting place: {own['MASTER_ADDR']}, port {own['MASTER_PORT']}",
        "environment of this process, as far as launch/train.sh would hand it on:",
        *(f"  {forwarding.shown(name, value)}" for name, value in forwarding.forwarded(env).items()),
    ]


def report(settings_yaml: str, lines: Iterable[str]) -> str:
    comments = "\n".join(lines).splitlines()
    return "\n".join([settings_yaml, "# Launch: what would run where", *(f"#   {line}" for line in comments)])


def show_as_rank(settings: "Settings") -> None:
    """Of the processes of any launcher, or without one, the first prints all of it, the others nothing."""
    from engine.runtime.distributed import launcher_variables

    own = launcher_variables(os.environ)
    text = settings_text(settings, int(own["WORLD_SIZE"]), _has_gpu())
    if own["RANK"] == "0":
        print(report(text, rank_lines(os.environ)))


def _has_gpu() -> bool:
    import torch

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
