"""How fast each rank computes, and how fast all of them exchange data: over NCCL on GPUs, over gloo else.

Bandwidth is the algorithm's: bytes of the result over the time of the slowest rank. Every size is repeated as long as
its time allows, and larger ones are left out where they would take too long, so a slow network is told soon.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from engine.doctor.findings import OK, WARNING, Facts, Finding, who
from engine.runtime.distributed import World

SIZES = tuple(1 << n for n in (10, 15, 20, 24, 26))
"""Bytes of the result: 1 KiB to 64 MiB."""
EACH_S = 0.3
"""Time for one size; one repetition may take ten times as long."""
SLOW = 0.75
"""Of the median rank's speed; the others wait for it in every step."""
LEAST_NCCL = {"all": 2e9, "machine": 10e9}
"""Bytes a second of a large all-reduce below which NCCL has surely not found the fast way."""
LARGE = 1 << 24


def compute(device: torch.device, seconds: float = 0.2) -> float:
    """Operations a second in one matrix product after the other, bf16 on a GPU, fp32 on a CPU."""
    gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    a = torch.ones(side, side, device=device, dtype=dtype)
    wait = torch.cuda.synchronize if gpu else lambda: None
    for _ in range(3):
        a @ a
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        wait()
        done += 1
    return 2 * side**3 * done / (time.perf_counter() - began)


def collectives(world: World, sizes: Sequence[int] = SIZES) -> list[dict]:
    """Rows of operation, group (all, or machine), bytes, seconds, ranks; all ranks of a process group call it.

    Raises:
        RuntimeError: the ranks cannot exchange data, or not within the group's timeout.
    """
    groups: dict[str, dist.ProcessGroup | None] = {"all": None}
    alike = _everywhere(world, world.local_size, min) == _everywhere(world, world.local_size, max)
    if alike and 1 < world.local_size < world.size:
        groups["machine"] = dist.new_subgroups(group_size=world.local_size)[0]
    rows = []
    for name, group in groups.items():
        ranks = dist.get_world_size(group)
        for operation in ("all-reduce", "all-gather"):
            for size in sizes:
                call = _call(operation, size, ranks, world.device, group)
                seconds = _timed(call, world)
                rows.append({"operation": operation, "group": name, "ranks": ranks, "bytes": size, "seconds": seconds})
                if seconds * 8 > 10 * EACH_S:  # the next one is up to 32 times as large
                    break
    return rows


def _call(operation: str, size: int, ranks: int, device: torch.device, group) -> Callable[[], object]:
    whole = torch.ones(-(-size // 4 // ranks) * ranks, device=device)
    if operation == "all-reduce":
        whole.zero_()  # stays what it is however often it is summed
        return lambda: dist.all_reduce(whole, group=group)
    piece = torch.ones(len(whole) // ranks, device=device)
    return lambda: dist.all_gather_into_tensor(whole, piece, group=group)


def _timed(call: Callable[[], object], world: World) -> float:
    """Seconds that one call takes on the slowest rank."""
    wait = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None

    def run(times: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(times):
            call()
        wait()
        return _everywhere(world, time.perf_counter() - began, max) / times

    run(1)  # connects, and reserves buffers
    return run(max(1, min(100, int(EACH_S / max(run(1), 1e-6)))))


def _everywhere(world: World, value: float, of: Callable) -> float:
    """The least or the largest value of all ranks."""
    box = torch.tensor(float(value), dtype=torch.float64, device=world.device)
    dist.all_reduce(box, dist.ReduceOp.MIN if of is min else dist.ReduceOp.MAX)
    return box.item()


# ---------------------------------------------------------------- judged, over all ranks


def judge_compute(everyone: Sequence[Facts]) -> Iterator[Finding]:
    speeds = [facts["compute"] for facts in everyone]
    median = statistics.median(speeds)
    slow = [facts for facts in everyone if facts["compute"] < SLOW * median]
    if slow:
        yield Finding(
            "speed", WARNING,
            f"compute: {_flops(min(speeds))} in a matrix product for {who(slow, everyone)}, median {_flops(median)}",
            "hot, capped, or used by somebody else? (nvidia-smi -q -d PERFORMANCE; top)",
        )  # fmt: skip
    text = f"compute: {_flops(min(speeds))} to {_flops(max(speeds))} a rank in a matrix product"
    yield Finding("speed", OK, text)


def _flops(speed: float) -> str:
    return f"{speed / 1e12:,.0f} TFLOP/s" if speed > 1e12 else f"{speed / 1e9:,.0f} GFLOP/s"


def judge_collectives(rows: Sequence[dict], nccl: bool) -> Iterator[Finding]:
    """One line for each operation and group; the table has all sizes."""
    for key in dict.fromkeys((row["operation"], row["group"]) for row in rows):
        mine = [row for row in rows if (row["operation"], row["group"]) == key]
        best = max(row["bytes"] / row["seconds"] for row in mine)
        latency = min(row["seconds"] for row in mine)
        within = f"{mine[0]['ranks']} ranks of a machine" if key[1] == "machine" else f"all {mine[0]['ranks']} ranks"
        text = f"{key[0]} of {within}: {best / 1e9:,.2f} GB/s, latency {latency * 1e6:,.0f} us"
        large = max(row["bytes"] for row in mine)
        if nccl and key[0] == "all-reduce" and (best < LEAST_NCCL[key[1]] or large < LARGE):
            yield Finding(
                "speed", WARNING, text,
                "NCCL has not found the fast way: run with NCCL_DEBUG=INFO and look for NET/IB or P2P in its lines; "
                "NCCL_IB_DISABLE, NCCL_P2P_DISABLE unset? drivers of the network card in the container?",
            )  # fmt: skip
        else:
            yield Finding("speed", OK, text)


def table(rows: Sequence[dict]) -> list[str]:
    """Sizes down, operations across: GB/s and microseconds."""
    if not rows:
        return []
    keys = list(dict.fromkeys((row["operation"], row["group"]) for row in rows))
    found = {(row["operation"], row["group"], row["bytes"]): row for row in rows}
    heads = [f"{operation} ({'all' if group == 'all' else 'one machine'})" for operation, group in keys]
    lines = [f"{'bytes':>12}  " + "  ".join(f"{head:>26}" for head in heads)]
    for size in sorted({row["bytes"] for row in rows}):
        cells = []
        for key in keys:
            row = found.get((*key, size))
            cell = f"{size / row['seconds'] / 1e9:,.3f} GB/s {row['seconds'] * 1e6:>9,.0f} us" if row else "-"
            cells.append(f"{cell:>26}")
        lines.append(f"{size:>12,}  " + "  ".join(cells))
    return lines
