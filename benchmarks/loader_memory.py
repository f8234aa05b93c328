"""Private memory of the process that plans and of its loader's worker, over a store.

Each store gets a new process, `python -m benchmarks.loader_memory STORE ROWS`: memory that was freed in an old one
would be used again, and not be seen.
"""

import ctypes
import json
import multiprocessing
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.synthetic_data import SPECIAL
from engine.data.batches import BatchPlan, MicroBatch
from engine.data.dataset import Dataset
from engine.data.loader import packed_batches
from engine.data.packing import PackedBatch
from engine.data.store import Store

MAX_TOKENS = 8192  # of a packed row
MICRO_BATCHES_PER_STEP = 64
PR_SET_THP_DISABLE = 41


def plan_of(data: Dataset) -> BatchPlan:
    return BatchPlan(
        data.lengths, max_tokens=MAX_TOKENS, max_samples=None, micro_batches_per_step=MICRO_BATCHES_PER_STEP, epochs=1,
        mixture=data.mixture(0),
    )  # fmt: skip


def micro_batches(data: Dataset) -> list[MicroBatch]:
    return [row for step in plan_of(data).epoch(0) for row in step]


def batches(data: Dataset, rows: Sequence[MicroBatch], workers: int) -> Iterator[PackedBatch]:
    return packed_batches(data, rows, audio_token_id=SPECIAL.audio_out, workers=workers, device=torch.device("cpu"))


def in_new_process(folder: Path, packed_rows: int) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.loader_memory", str(folder), str(packed_rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=_without_huge_pages)
    return json.loads(done.stdout.splitlines()[-1])


def _without_huge_pages() -> None:
    """Of the process and those it starts: what the kernel counts as private of a shared huge page is an estimate."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def measure(folder: Path, packed_rows: int) -> dict[str, int]:
    """Samples of the store, and the highest that the process has added to itself and that its worker holds.

    A worker begins as a copy of its parent, whose pages both share until one of them writes. So the parent walks
    through the whole of its plan, as it will have by the end of the epoch: reference counts are writes too.
    """
    before, highest = kept_bytes("self", "Anonymous"), Counter()
    data = Dataset([Store(folder)])
    steps = plan_of(data).epoch(0)
    rows = [row for row, _ in zip((row for step in steps for row in step), range(packed_rows), strict=False)]
    loaded = batches(data, rows, 1)
    (worker,) = multiprocessing.active_children()
    for number, _ in enumerate(loaded):
        if number == len(rows) // 2:
            for step in steps:
                sum(sum(row) for row in step)
        if number % 20 < 2 and number < len(rows) - 8:  # it ends when it has sent the last, some rows ahead
            highest["process"] = max(highest["process"], kept_bytes("self", "Anonymous") - before)
            highest["worker"] = max(highest["worker"], kept_bytes(worker.pid, "Private_Dirty"))
    return {"samples": len(data), **highest}


def kept_bytes(process: int | str, kind: str) -> int:
    """Memory of a process that the system cannot take back: `Anonymous`, or `Private_Dirty` without what is shared."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text()).group(1))


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
