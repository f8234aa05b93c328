"""A training of two real processes that is killed again and again while it saves, and goes on from what is there.

kill_ranks_worker.py MODEL FOLDER CASE      cases as in tests/backends/parity_worker.py

First undisturbed, then with one process killed in each attempt, at moments spread over all that a save and its
pruning do. Every step ever computed must have the very bits of the undisturbed run. The processes are forks of this
one, which has all imports behind it and no threads.
"""

import json
import os
import signal
import sys
from pathlib import Path

import deepspeed  # noqa: F401  (before the forks: its import takes seconds)
import torch

from engine.checkpoint.lifecycle import checkpoints, find
from engine.checkpoint.manifest import content_problems, read_manifest
from engine.runtime.distributed import init_process_group
from tests.checkpoint.killing import Trap
from tests.checkpoint.small_run import SmallRun
from tests.processes import free_port

STEPS, MOMENTS = 8, 12


def train(rank: int, model: Path, out: Path, case: str, at: int) -> None:
    """From the newest checkpoint on, a save after each step; the trap is armed in every one, but not in the first."""
    world = init_process_group(timeout_s=60)
    trap = Trap(out)
    run = SmallRun(case, model, out, world, limit=1)
    checkpoint = find("auto", out, world, lambda line: None)
    start = run.load(checkpoint) if checkpoint else 0
    for number in range(start, STEPS):
        values = run.step(number)
        if world.is_main:
            with open(out.with_suffix(".losses"), "a") as losses:
                losses.write(json.dumps([number, values]) + "\n")
        if checkpoint or number:
            trap.arm(at)
        run.save(number + 1)
        if number == start + 1:
            out.with_suffix(f".moments-{rank}").write_text(str(trap.count))
    torch.distributed.barrier()
    os._exit(0)


def attempt(model: Path, out: Path, case: str, victim: int = 0, at: int = 0) -> bool:
    """Both processes, one of which is killed at a moment of its next save (0: never). Whether it came to that."""
    port, children = str(free_port()), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            train(rank, model, out, case, at if rank == victim else 0)
        children.append(child)
    _, status = os.waitpid(children[victim], 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"the victim failed: {status}"
    if killed:
        os.kill(children[1 - victim], signal.SIGKILL)
    _, status = os.waitpid(children[1 - victim], 0)
    assert killed or status == 0, f"the other process failed: {status}"
    return killed


def main() -> None:
    torch.set_num_threads(1)
    model, folder, case = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    straight, tried = folder / f"{case}-straight", folder / f"{case}-tried"
    straight.mkdir()
    tried.mkdir()
    assert not attempt(model, straight, case)
    wanted = dict(json.loads(line) for line in straight.with_suffix(".losses").read_text().splitlines())
    kills = 0
    for victim, moments in ((0, MOMENTS - 3), (1, 3)):
        last = int(straight.with_suffix(f".moments-{victim}").read_text())
        for i in range(moments):
            at = 1 + round(i * (last - 1) / (moments - 1))
            kills += attempt(model, tried, case, victim, at)
            for checkpoint in checkpoints(tried):
                assert not content_problems(checkpoint, read_manifest(checkpoint)), f"{checkpoint} after moment {at}"
            assert checkpoints(tried) or kills == 1, "nothing is left to go on from"
    assert not attempt(model, tried, case)
    assert [c.name for c in checkpoints(tried)] == [f"checkpoint-{STEPS}"] and not list(tried.glob(".*"))
    computed = [json.loads(line) for line in tried.with_suffix(".losses").read_text().splitlines()]
    assert all(values == wanted[number] for number, values in computed), "a step differs from the undisturbed run's"
    assert {number for number, _ in computed} == set(wanted)
    print(kills, "kills")


if __name__ == "__main__":
    main()
