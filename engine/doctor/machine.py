"""What each machine offers its ranks: cores, memory, shared memory, limits, GPUs."""

import contextlib
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from engine.doctor.findings import FAILURE, OK, WARNING, Facts, Finding, deviants, machines, named, who
from engine.runtime.distributed import World

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
LEAST_MEMORY = 2 * GIB
"""Host memory that a rank takes for the libraries alone, with some room for its data."""
LEAST_SHARED = 64 * 2**20
"""Of /dev/shm for each rank: rows from data workers, NCCL's or DeepSpeed's buffers."""
TAKEN = 2 * GIB
"""More of a GPU's memory than a run's own context takes: somebody else's."""
LIMITS = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}


def probe(world: World, trouble: str | None = None) -> dict:
    """`trouble`: why this rank could not be given a device."""
    return {
        "local_rank": world.local_rank,
        "local_size": world.local_size,
        "world_size": world.size,
        "cores": _cores(),
        "memory": _memory(psutil.virtual_memory().available),
        "shared_memory": _free(SHARED_MEMORY),
        "limits": {name: resource.getrlimit(number)[0] for name, number in LIMITS.items()},
        "infiniband": any(Path("/sys/class/infiniband").glob("*")),
        "trouble": trouble,
        "gpu": _gpu(world.device) if world.device.type == "cuda" else None,
    }


def _cgroups() -> Iterator[Path]:
    """This process's control group and those around it, each of which may bound it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                inner = CGROUP / line[3:].strip("/")
                yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(CGROUP))


def _memory(available: int) -> int:
    """Of the machine's available memory what the control groups leave."""
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            bound, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            available = min(available, max(bound - used, 0))
    return available


def _cores() -> float:
    """Cores that this process may use at once; containers often bound time instead of cores."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    for group in _cgroups():
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())
            cores = min(cores, quota / period)
    return cores


def _free(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        return psutil.disk_usage(str(folder)).free
    return None


def _gpu(device: torch.device) -> dict:
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": about.name, "uuid": str(getattr(about, "uuid", device.index)), "total": total, "free": free,
        "visible": torch.cuda.device_count(),
    }  # fmt: skip


# ---------------------------------------------------------------- judged, over all ranks


def judge(everyone: Sequence[Facts]) -> Iterator[Finding]:
    yield from _places(everyone)
    yield from _devices(everyone)
    yield from _room(everyone)
    yield from _limits(everyone)


def _of(facts: Facts) -> dict:
    return facts["machine"]


def _places(everyone: Sequence[Facts]) -> Iterator[Finding]:
    """Each machine has as many ranks as its launcher says, each with another place."""
    hosts = machines(everyone)
    for first in hosts:
        ranks = [facts for facts in everyone if facts["host"] == first["host"]]
        places = [_of(facts)["local_rank"] for facts in ranks]
        if len(set(places)) < len(places):
            yield Finding(
                "machine", WARNING,
                f"names: several ranks are number {max(places, key=places.count)} of {first['host']}: two machines of "
                "this name, or a launcher that tells no LOCAL_RANK",
                "give machines names of their own; where the launcher is at fault, export LOCAL_RANK",
            )  # fmt: skip
    usual, others = deviants(everyone, lambda facts: _of(facts)["local_size"], hosts)
    for other, whose in others:
        yield Finding(
            "machine", WARNING, f"processes: {usual} on a machine, but {other} with {whose}",
            "start as many on each: hybrid sharding and some launchers take it for granted",
        )  # fmt: skip


def _devices(everyone: Sequence[Facts]) -> Iterator[Finding]:
    for facts in everyone:
        if _of(facts)["trouble"]:
            yield Finding("machine", FAILURE, f"device: {who([facts], everyone)}: {_of(facts)['trouble']}")
    if not any(_of(facts)["gpu"] for facts in everyone):
        yield Finding("machine", OK, "devices: no GPU, all ranks compute on CPUs")
        return
    without = [facts for facts in everyone if not _of(facts)["gpu"]]
    having = [facts for facts in everyone if _of(facts)["gpu"]]
    if without and not any(_of(facts)["trouble"] for facts in without):
        yield Finding(
            "machine", FAILURE, f"devices: no GPU for {who(without, everyone)}, while others have one",
            "does nvidia-smi work there, is CUDA_VISIBLE_DEVICES set, is torch a build for its driver?",
        )  # fmt: skip
    usual, others = deviants(everyone, lambda f: [_of(f)["gpu"]["name"], round(_of(f)["gpu"]["total"] / GIB)], having)
    yield Finding("machine", OK, f"devices: {len(having)} x {usual[0]}, {usual[1]} GiB")
    for other, whose in others:
        yield Finding(
            "machine", WARNING, f"devices: {other[0]} with {other[1]} GiB for {whose}",
            "all wait for the slowest, and the smallest decides what fits",
        )  # fmt: skip
    yield from _shared_and_taken(having, everyone)


def _shared_and_taken(having: Sequence[Facts], everyone: Sequence[Facts]) -> Iterator[Finding]:
    users: dict[str, list[Facts]] = {}
    for facts in having:
        users.setdefault(f"{facts['host']} {_of(facts)['gpu']['uuid']}", []).append(facts)
    for several in users.values():
        if len(several) > 1:
            yield Finding(
                "machine", WARNING, f"devices: {who(several, everyone)} all got the same GPU",
                "start one process for each GPU; srun: --gpus-per-task=1, or --gpus-per-node with no binding",
            )  # fmt: skip
    taken = [f for f in having if _of(f)["gpu"]["total"] - _of(f)["gpu"]["free"] > TAKEN]
    if taken:
        most = max(_of(f)["gpu"]["total"] - _of(f)["gpu"]["free"] for f in taken)
        yield Finding(
            "machine", WARNING,
            f"devices: up to {most / GIB:.1f} GiB of the GPUs of {who(taken, everyone)} are taken before the run",
            "nvidia-smi names the processes",
        )  # fmt: skip
    idle = [f for f in machines(having) if _of(f)["gpu"]["visible"] > _of(f)["local_size"]]
    if idle:
        text = f"devices: {_of(idle[0])['gpu']['visible']} GPUs are visible, {_of(idle[0])['local_size']} used on "
        remedy = "start a process for each, unless the others are meant for something else"
        yield Finding("machine", WARNING, text + named(idle), remedy)


def _room(everyone: Sequence[Facts]) -> Iterator[Finding]:
    hosts = machines(everyone)
    if low := _below(hosts, "cores", 1):
        yield Finding(
            "machine", WARNING, f"cores: {_of(low[0])['cores']:g} for {_of(low[0])['local_size']} ranks: {named(low)}",
            "give the job more (--cpus-per-task, --cpus), or start fewer ranks there",
        )  # fmt: skip
    if low := _below(hosts, "memory", LEAST_MEMORY):
        yield Finding(
            "machine", WARNING,
            f"memory: {_of(low[0])['memory'] / GIB:.1f} GiB are free for {_of(low[0])['local_size']} ranks on "
            f"{named(low)}",
            f"have {LEAST_MEMORY // GIB} GiB for each, more with offload or async_save",
        )  # fmt: skip
    if low := _below(hosts, "shared_memory", LEAST_SHARED):
        shared = _of(low[0])["shared_memory"]
        yield Finding(
            "machine", WARNING,
            f"/dev/shm: {shared / 2**20:.0f} MiB are free for {_of(low[0])['local_size']} ranks on {named(low)}",
            "start the container with --shm-size=8g or --ipc=host, or set dataloader_num_workers to 0",
        )  # fmt: skip
    least = {name: min(_of(facts)[name] or 0 for facts in hosts) for name in ("cores", "memory", "shared_memory")}
    yield Finding(
        "machine", OK, f"each machine has at least {least['cores']:g} cores, {least['memory'] / GIB:,.0f} GiB of free "
        f"memory, {least['shared_memory'] / GIB:,.1f} GiB of /dev/shm",
    )  # fmt: skip


def _below(hosts: Sequence[Facts], name: str, for_each: float) -> list[Facts]:
    """Machines with too little of something for their ranks, the worst first."""
    known = [facts for facts in hosts if _of(facts)[name] is not None]
    low = [facts for facts in known if _of(facts)[name] < for_each * _of(facts)["local_size"]]
    return sorted(low, key=lambda facts: _of(facts)[name])


def _limits(everyone: Sequence[Facts]) -> Iterator[Finding]:
    """Of open files each rank needs two for every other one; threads and workers count as processes."""
    size = _of(everyone[0])["world_size"]
    wanted = {
        "nofile": (64 + 2 * size, FAILURE),
        "nproc": (128 * max(_of(f)["local_size"] for f in everyone), WARNING),
    }
    sound = True
    for name, (least, level) in wanted.items():
        low = [f for f in everyone if 0 <= _of(f)["limits"][name] < least]
        if low:
            sound = False
            number = min(_of(facts)["limits"][name] for facts in low)
            yield Finding(
                "machine", level, f"limits: {name} is {number} for {who(low, everyone)}, {least} are needed",
                f"raise it where they are started (ulimit, limits.conf, LimitNOFILE, --ulimit {name}=1048576)",
            )  # fmt: skip
    bound = [f for f in everyone if _of(f)["infiniband"] and _of(f)["limits"]["memlock"] != resource.RLIM_INFINITY]
    if bound:
        sound = False
        yield Finding(
            "machine", WARNING, f"limits: memlock is bounded for {who(bound, everyone)}, InfiniBand pins memory",
            "ulimit -l unlimited, --ulimit memlock=-1, or LimitMEMLOCK=infinity of slurmd",
        )  # fmt: skip
    if sound:
        yield Finding("machine", OK, "limits: open files, processes and locked memory suffice")
