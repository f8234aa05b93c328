"""One rank of runs whose moments take less than fp32: each goes on from its checkpoint bit for bit.

moments_worker.py MODEL FOLDER JOB...     JOB: CASE:DTYPE, a case of parity_worker.py and an optimizer_state_dtype

Leaves the checkpoint and all losses in FOLDER/JOB@WORLD.
"""

import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import torch

from engine.runtime.distributed import World, exit_cleanly, init_process_group, shutdown
from tests.checkpoint import small_run

STEPS, FIRST = 4, 2


def compact_run(job: str, model: Path, out: Path, world: World) -> small_run.SmallRun:
    case, dtype = job.split(":")
    settings = dataclasses.replace(small_run.settings_for(case, str(model), world.size), optimizer_state_dtype=dtype)
    with mock.patch.object(small_run, "settings_for", return_value=settings):
        return small_run.SmallRun(case, model, out, world)


def straight_and_resumed(job: str, model: Path, out: Path, world: World) -> list[list[float]]:
    """The losses of a run without a break; asserts that one from its checkpoint repeats them."""
    run = compact_run(job, model, out, world)
    losses = []
    for number in range(STEPS):
        losses.append(run.step(number))
        if number + 1 == FIRST:
            run.save(FIRST)
    run.close()
    again = compact_run(job, model, out, world)
    assert again.load(out / f"checkpoint-{FIRST}") == FIRST  # and compares every element with what is stored
    for number in range(FIRST, STEPS):
        assert again.step(number) == losses[number], f"{job}: step {number} differs after the resume"
    again.close()
    return losses


def main() -> None:
    torch.set_num_threads(1)
    model, folder, *jobs = sys.argv[1:]
    world = init_process_group(timeout_s=60)
    for job in jobs:
        out = Path(folder) / f"{job}@{world.size}"
        if world.is_main:
            out.mkdir()
        torch.distributed.barrier()
        losses = straight_and_resumed(job, Path(model), out, world)
        if world.is_main:
            (out / "losses.json").write_text(json.dumps(losses))
    shutdown(world)
    exit_cleanly(0)


if __name__ == "__main__":
    main()
