"""One rank of short conditioned runs: two steps, a checkpoint, two steps on, and these again from the checkpoint.

whisper_worker.py MODEL OUT CASE...     cases as in tests/backends/parity_worker.py
"""

import sys
from pathlib import Path

import torch

from engine.runtime.distributed import exit_cleanly, init_process_group, shutdown
from tests.checkpoint.small_run import SmallRun


def main() -> None:
    torch.set_num_threads(1)
    model, out, *cases = sys.argv[1:]
    world = init_process_group(timeout_s=60)
    for case in cases:
        folder = Path(out) / case
        folder.mkdir(exist_ok=True)
        run = SmallRun(case, Path(model), folder, world)
        first = run.step(0), run.step(1)
        assert first[0] != first[1]
        checkpoint = run.save(2)
        straight = [run.step(2), run.step(3)]
        run.close()
        run = SmallRun(case, Path(model), folder, world)
        run.load(checkpoint)
        resumed = [run.step(2), run.step(3)]
        assert resumed == straight, f"{case}: {resumed} after the resume, {straight} without"
        run.close()
    shutdown(world)
    exit_cleanly(0)


if __name__ == "__main__":
    main()
