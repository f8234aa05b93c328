"""One rank of runs that write checkpoints, and of runs that go on from checkpoints of other backends and worlds.

anywhere_worker.py MODEL FOLDER JOB...

JOB `CASE`: trains STEPS steps, saves to FOLDER/CASE@WORLD after FIRST of them, and leaves all its losses beside.
JOB `CASE!`: saves there what it has been given, untrained.
JOB `CASE<WRITTEN`: goes on as CASE from the checkpoint in FOLDER/WRITTEN, and leaves the losses of the rest.
Cases are those of tests/backends/parity_worker.py.
"""

import json
import sys
from pathlib import Path

import torch

from engine.runtime.distributed import World, exit_cleanly, init_process_group, shutdown
from tests.checkpoint.small_run import SmallRun

STEPS, FIRST = 6, 3


def main() -> None:
    torch.set_num_threads(1)
    model, folder, *jobs = sys.argv[1:]
    world = init_process_group(timeout_s=60)
    for job in jobs:
        perform(job, Path(model), Path(folder), world)
    shutdown(world)
    exit_cleanly(0)


def perform(job: str, model: Path, folder: Path, world: World) -> None:
    case, _, source = job.partition("<")
    name = f"{case}@{world.size}" + (f"<{source}" if source else "")
    case, untrained = case.rstrip("!"), case.endswith("!")
    out = folder / name
    if world.is_main:
        out.mkdir()
    if world.size > 1:
        torch.distributed.barrier()
    run = SmallRun(case, model, out, world)
    start = run.load(folder / source / f"checkpoint-{FIRST}") if source else 0
    losses = {}
    if untrained:
        run.save(FIRST)
    for number in range(start, 0 if untrained else STEPS):
        losses[number] = run.step(number)
        if number + 1 == FIRST:
            run.save(FIRST)
    run.close()
    if world.is_main:
        (out / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
