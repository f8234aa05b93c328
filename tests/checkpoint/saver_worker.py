"""One rank of saves that fail on rank 1 alone: saver_worker.py FOLDER.

Asserts on both ranks that all hear of each failure at the same step.
"""

import errno
import sys
import time
from pathlib import Path

import torch

from engine.backends.tensors import Fragment, Reader
from engine.checkpoint import saver
from engine.checkpoint.manifest import File, read_manifest
from engine.checkpoint.saver import Saver
from engine.errors import CheckpointError
from engine.runtime.distributed import exit_cleanly, init_process_group, shutdown
from tests.checkpoint.test_lifecycle import manifest, names, write_once

real = saver.describe_files
broken_on: set[int] = set()
slow: dict[int, float] = {}
rank = -1


def describe_files(folder: Path, mine) -> dict[str, File]:
    time.sleep(slow.get(rank, 0.0))
    if rank in broken_on:
        raise OSError(errno.EIO, "Input/output error", str(folder))
    return real(folder, mine)


def main() -> None:
    global rank
    world = init_process_group(timeout_s=60)
    rank = world.rank
    saver.describe_files = describe_files
    for background in (False, True):
        out = Path(sys.argv[1]) / f"background-{background}"
        if world.is_main:
            out.mkdir()
        torch.distributed.barrier()
        said: list[str] = []
        run = Saver(out, world, limit=None, keep_every=None, background=background, say=said.append)

        def save(step: int, run=run) -> None:
            half = torch.full((10,), float(10 * step + rank))
            state = {"model.w": Fragment(half, 10 * rank, 20), "step": Fragment.whole(torch.tensor(float(step)))}
            run.save(manifest(step, world_size=2, shapes={"w": [20]}), state, write_once)

        slow[1] = 0.2 if background else 0.0
        save(1)
        poll_until_heard(run)
        broken_on.add(1)
        save(2)
        poll_until_heard(run)
        assert len(said) == 1 and "process 1: Input/output error" in said[0], said
        broken_on.clear()
        save(3)
        run.wait()
        broken_on.add(1)
        save(4)
        try:
            save(5)
            run.wait()
        except CheckpointError as error:
            assert "two checkpoints in a row" in str(error) and "process 1" in str(error), error
        else:
            raise AssertionError("the second failure in a row was not raised")
        broken_on.clear()
        torch.distributed.barrier()
        assert names(out) == ["checkpoint-1", "checkpoint-3"], names(out)
        assert "rng/rank-1.pt" in read_manifest(out / "checkpoint-3").files
        stored = Reader(out / "checkpoint-3").tensor("model.w")
        assert stored.tolist() == [30.0] * 10 + [31.0] * 10, stored
    not_shared(Path(sys.argv[1]), world)
    print("as expected")
    shutdown(world)
    exit_cleanly(0)


def not_shared(folder: Path, world) -> None:
    """Machines that each have a folder of that name, but not the same one."""
    saver.SLOWEST_SIGHT_S = 0.5
    out = folder / f"machine-{rank}"
    out.mkdir()
    said: list[str] = []
    run = Saver(out, world, limit=None, keep_every=None, background=False, say=said.append)
    state = {"model.w": Fragment(torch.zeros(10), 10 * rank, 20), "step": Fragment.whole(torch.zeros(()))}
    run.save(manifest(1, world_size=2, shapes={"w": [20]}), state, write_once)
    assert len(said) == 1 and "process 1" in said[0] and "put output_dir where all machines see it" in said[0], said


def poll_until_heard(run: Saver) -> None:
    """Polls as a training loop would, and makes sure that both ranks hear at the same poll."""
    polls = 0
    while run._under_way is not None and polls < 1000:
        run.poll()
        polls += 1
        time.sleep(0.005)
    both = [None, None]
    torch.distributed.all_gather_object(both, polls)
    assert both[0] == both[1] < 1000, f"the ranks hear at different steps: {both}"


if __name__ == "__main__":
    main()
