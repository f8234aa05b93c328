"""What the bash half of launch/train.sh hands over to, with the script's own path and its arguments."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import ConfigError, EngineError
from engine.launch import dry_run
from engine.launch.machine import Machine
from engine.launch.plan import WITHOUT_GPU, LaunchPlan, environment, make_plan
from engine.launch.restarts import Restarts

OTHER_COMMANDS = ("prepare", "evaluate", "doctor")
"""First words that make the ranks do this instead of training."""
WATCHDOGS_FIRST_S = 60.0
"""Ranks that are not stopped see that one hangs, and know more about it."""


def main(argv: Sequence[str]) -> int:
    script, *arguments = argv
    try:
        return _launch(script, arguments, os.environ)
    except EngineError as error:
        print(f"\nlaunch/train.sh: {error}", file=sys.stderr, flush=True)
        return error.code


def _launch(script: str, arguments: list[str], env: Mapping[str, str]) -> int:
    from engine.cli import main as engine

    first = arguments[0] if arguments else "demo"
    command = first if first in ("demo", *OTHER_COMMANDS) else "train"
    if {"-h", "--help"} & set(arguments):
        return engine([command, "--help"])
    machine = Machine.here(env)
    if command == "demo":
        if not machine.gpus:
            os.environ.update(WITHOUT_GPU)
        return engine(["demo", *arguments[1:]])

    given = dry_run.without(arguments)
    plan, settings = _checked(env, machine, given if command == "train" else None)
    if len(given) < len(arguments):
        text = dry_run.settings_text(settings, plan.total, machine.gpus > 0) if settings else f"# {command}\n"
        print(dry_run.report(text, dry_run.plan_lines(plan, env, script, given)))
        return 0
    if plan.launcher == "none":
        # this very process, so that a debugger has the terminal
        os.execve(plan.command[0], [*plan.command, script, *given], environment(env, plan))
    limit, latest, patience = 0, None, None
    if settings:
        limit, latest = settings.max_restarts, Path(settings.output_dir, "latest")
        patience = settings.timeout_s + WATCHDOGS_FIRST_S
    return Restarts(lambda: make_plan(env, machine), env, script, given, limit, latest, patience).run()


def _checked(env: Mapping[str, str], machine: Machine, arguments: list[str] | None) -> tuple[LaunchPlan, object]:
    """The plan, and the settings where `arguments` are settings; or everything that is wrong with both."""
    from engine.config import parse

    plan = settings = None
    problems = []
    try:
        plan = make_plan(env, machine)
    except ConfigError as error:
        problems += error.problems
    try:
        settings = None if arguments is None else parse(arguments)
        if plan and settings and plan.fewest is not None and settings.resume != "auto":
            problems.append(
                f"resume: {settings.resume}: machines that come or go start the run again → --resume auto, which then "
                "goes on from the last checkpoint"
            )
        if plan and settings and plan.launcher == "none" and settings.max_restarts:
            problems.append("max_restarts: with LAUNCHER=none nobody watches the process → set it to 0, or a launcher")
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError("the run cannot be started", problems)
    return plan, settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
