"""One rank of the runs of test_tensor_parallel.py; what no other rank can know is asserted here.

    tensor_parallel_worker.py MODEL FOLDER JOB...

A JOB of COMPARED is a case of parity_worker.py, and leaves its arrays in FOLDER; `look` looks inside; others are jobs
of anywhere_worker.py.
"""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine.data.packing import pack
from engine.higgs_engine import HiggsEngine
from engine.model.cut import axis, cut_shape
from engine.runtime.distributed import World, exit_cleanly, init_process_group, shutdown
from tests.backends.parity_worker import MICRO_BATCHES, micro_batches, require_exact_masters, settings_for
from tests.backends.parity_worker import run as parity_run
from tests.checkpoint.anywhere_worker import perform
from tests.checkpoint.small_run import SmallRun

COMPARED = ("zero0-tp2", "zero2-tp2-selective", "zero1-bf16-tp2")
CUT = 2 * 10
"""Matrices cut in the tiny model's two layers: q, k, v, o, and three in each FFN."""


def evaluated(run: SmallRun) -> np.ndarray:
    """Sums of an evaluation, over all processes, after two steps."""
    run.step(0)
    run.step(1)
    mine = micro_batches(2)[run.reader :: run.readers]
    sums = run.engine.evaluate([pack(batch, run.files.config.audio_token_id) for batch in mine])
    if run.world.size > 1:
        dist.all_reduce(sums)
    return sums.numpy()


def look_inside(model: Path, folder: Path, world: World) -> None:
    """Both FFNs are really cut, and what is not cut stays the same on all processes, bit for bit."""
    run = SmallRun("zero1-tp2", model, folder, world)
    sums = evaluated(run)
    if world.is_main:
        np.save(folder / "evaluation.npy", sums)
    weights = dict(run.engine.backend.model.named_parameters())
    full = run.engine.stored_shapes()
    cut = [name for name in weights if list(weights[name].shape) != full[name]]
    assert len(cut) == CUT and sum(".audio_mlp." in name for name in cut) == 6, cut
    assert all(weights[name].shape == cut_shape(name, torch.Size(full[name]), 2) for name in cut)
    assert "tensor parallel" in run.engine.backend.precision
    mine = torch.cat([weight.detach().view(-1) for name, weight in weights.items() if axis(name) is None])
    first = mine.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(mine, first), "what is not cut differs between processes"
    run.close()


def look_at_frozen(model: Path, world: World) -> None:
    """Of weights that are not trained every group has all: a checkpoint must not have their sum."""
    settings = replace(settings_for("zero2-tp2", str(model), world.size), train_modules=["*.down_proj.weight"])
    run = SmallRun("zero2-tp2", model, model, world)
    engine = HiggsEngine(settings, world, run.files, rounds=MICRO_BATCHES // run.readers)
    require_exact_masters(engine, run.files)
    engine.backend.engine.destroy()
    run.close()


def main() -> None:
    torch.set_num_threads(1)
    model, folder, *jobs = sys.argv[1:]
    model, folder = Path(model), Path(folder)
    world = init_process_group(timeout_s=60)
    for job in jobs:
        if job == "look":
            look_inside(model, folder, world)
            look_at_frozen(model, world)
        elif world.size == 2 and job in COMPARED:
            results = parity_run(job, str(model), world)
            if world.is_main:
                np.savez(folder / f"{job}-world2.npz", **results)
            gc.collect()
        else:
            perform(job, model, folder, world)
    shutdown(world)
    exit_cleanly(0)


if __name__ == "__main__":
    main()
