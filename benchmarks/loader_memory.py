"""Private memory of the process that plans and of its loader's worker, over a store: run each time in a new process."""

import multiprocessing
import re
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


def plan_of(data: Dataset) -> BatchPlan:
    return BatchPlan(
        data.lengths, max_tokens=MAX_TOKENS, max_samples=None, micro_batches_per_step=MICRO_BATCHES_PER_STEP, epochs=1,
        mixture=data.mixture(0),
    )  # fmt: skip


def micro_batches(data: Dataset) -> list[MicroBatch]:
    return [row for step in plan_of(data).epoch(0) for row in step]


def batches(data: Dataset, rows: Sequence[MicroBatch], workers: int) -> Iterator[PackedBatch]:
    return packed_batches(data, rows, audio_token_id=SPECIAL.audio_out, workers=workers, device=torch.device("cpu"))


def loader_memory(folder: Path, packed_rows: int) -> dict[str, int]:
    """Samples of the store, and what the process and its worker hold of their own while rows are loaded.

    A worker begins as a copy of its parent, whose pages both share until one of them writes. So the parent walks
    through the whole of its plan, as it will have by the end of the epoch: reference counts are writes too.
    """
    before = private_bytes("self")
    data = Dataset([Store(folder)])
    plan = plan_of(data)
    rows = (row for step in plan.epoch(0) for row in step)
    loaded = batches(data, [row for row, _ in zip(rows, range(packed_rows), strict=False)], 1)
    (worker,) = multiprocessing.active_children()
    highest = Counter()
    for number, _ in enumerate(loaded):
        if number == packed_rows // 2:
            Counter(len(row) + sum(row) for step in plan.epoch(0) for row in step)
        if number % 20 == 0 or number >= packed_rows // 2:
            for name, process in (("process", "self"), ("worker", worker.pid)):
                highest[name] = max(highest[name], private_bytes(process) - (before if name == "process" else 0))
        if number == packed_rows - 5:  # the worker ends when it has sent the last
            break
    return {"samples": len(data), **highest}


def private_bytes(process: int | str) -> int:
    """Memory that no other process shares and the system cannot drop."""
    return 1024 * int(re.search(r"Private_Dirty:\s+(\d+)", Path(f"/proc/{process}/smaps_rollup").read_text()).group(1))
