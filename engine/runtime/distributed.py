"""Who this process is among its peers, and how the peers go on, or stop, together.

Any launcher will do: its variables are translated into those that torch and DeepSpeed read. Agreement runs
over the rendezvous store, never over collectives: one rank may prepare data for hours while the others wait,
no collective times out meanwhile, and the mistake that one rank finds reaches all of them in its own words.
"""

import itertools
import logging
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from engine.errors import ConfigError, EngineError, Interrupted
from engine.runtime import activity

GRACE_S = 5.0  # after the first failure, the other ranks have this long to add theirs to the same message
MEETING_PLACE_TIMEOUT = timedelta(minutes=15)  # machines of a cluster seldom start together
Result = TypeVar("Result")
LONGEST_PAUSE_S = 1.0  # between two looks at the store; the first looks follow each other much faster

_store: dist.Store | None = None
_meetings = itertools.count()
_placed: list[str] = []  # environment variables that were not there before us


@dataclass(frozen=True)
class World:
    """This process's place among the `size` processes of the run, `local_size` of them on this machine."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def in_groups(self, of: int) -> tuple[int, int]:
        """The number of this process's group, and how many there are, if neighbours form groups."""
        return self.rank // of, self.size // of


def launcher_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch and DeepSpeed read, from those of the launcher that started this process."""
    addr, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if "RANK" in env and "WORLD_SIZE" in env:  # torchrun or DeepSpeed
        rank, size, local_rank = env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", "0")
        local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE", "1")
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Only a task of srun has this; a batch script has SLURM_PROCID and SLURM_NTASKS too, but no peers.
        rank, size, local_rank = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env["SLURM_LOCALID"]
        local_size = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1")).group()
        addr = addr or _first_host(env["SLURM_STEP_NODELIST"])
        # The same for all ranks of a step, another for its neighbours, and below what the kernel hands out.
        step = int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
        port = port or str(10000 + step % 20000)
    elif "OMPI_COMM_WORLD_RANK" in env:
        rank, size = env["OMPI_COMM_WORLD_RANK"], env["OMPI_COMM_WORLD_SIZE"]
        local_rank, local_size = env["OMPI_COMM_WORLD_LOCAL_RANK"], env["OMPI_COMM_WORLD_LOCAL_SIZE"]
        if not addr and int(local_size) < int(size):
            raise ConfigError(
                "mpirun on several machines does not tell the ranks where rank 0 is:"
                " add -x MASTER_ADDR=<first machine> -x MASTER_PORT=29500 to mpirun"
            )
    else:
        rank, size, local_rank, local_size = "0", "1", "0", "1"
    return {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": addr or "127.0.0.1", "MASTER_PORT": port or "29500",
        # DeepSpeed's checkpoint writers need the machine's number, which only DeepSpeed's own launcher gives.
        "CROSS_RANK": env.get("CROSS_RANK") or str(int(rank) // int(local_size)),
        "CROSS_SIZE": env.get("CROSS_SIZE") or str(-(-int(size) // int(local_size))),
    }  # fmt: skip


def _first_host(nodelist: str) -> str:
    """The first name in SLURM's notation, `gpu[03-05,09],fat1`; containers often have no scontrol to ask."""
    try:
        return subprocess.check_output(["scontrol", "show", "hostnames", nodelist], text=True).split()[0]
    except (OSError, subprocess.CalledProcessError):
        parts = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
        return "".join(parts.groups(default=""))


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:  # `srun --gpus-per-task=1` shows each task its own GPU, as number 0
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise ConfigError(f"Process {local_rank} of this machine has no GPU: {visible} are visible;"
                          " start one process per GPU")  # fmt: skip
    return torch.device("cuda", local_rank)


def init_process_group(timeout_s: float = 1800) -> World:
    """Joins the run: finds this process's place and device, and readies torch.distributed, at any world size.

    Without a launcher it is a run of one, which opens no port. `timeout_s` bounds every collective, not
    `wait_for_all` and `raise_together`.

    Raises:
        ConfigError: the launcher's variables do not suffice, or there is no GPU for this process.
        Interrupted: the processes do not find each other.
    """
    global _store
    variables = launcher_variables(os.environ)
    _placed.extend(name for name in variables if name not in os.environ)
    os.environ.update(variables)
    rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    local_rank, local_size = int(variables["LOCAL_RANK"]), int(variables["LOCAL_WORLD_SIZE"])

    device = _device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # DeepSpeed takes LOCAL_RANK for the device's number (and insists that Open MPI agrees).
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
            os.environ[name] = str(device.index)

    if not dist.is_initialized():
        try:
            _store = _join(rank, size, device, timedelta(seconds=timeout_s))
        except RuntimeError as error:  # also of gloo, which knows no other
            raise _not_met(error, rank, size) from None
    activity.current.keep(rank)
    return World(rank, local_rank, size, device, local_size)


def _join(rank: int, size: int, device: torch.device, timeout: timedelta) -> dist.Store:
    """Makes the process group; the engine's part of the store of all ranks."""
    patience = max(timeout, MEETING_PLACE_TIMEOUT)
    store = dist.HashStore() if size == 1 else next(dist.rendezvous("env://", timeout=patience))[0]
    store.set_timeout(patience)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout
    )
    return dist.PrefixStore("engine", store)


def _not_met(error: RuntimeError, rank: int, size: int) -> Interrupted:
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    failure = Interrupted(
        f"rank {rank} ({activity.current.host}) and the others do not meet at {place}: {why} → were all {size} "
        "started, is the port free there, and open to all? `launch/train.sh doctor`, started likewise, looks closer"
    )
    failure.spokesman = rank
    return failure


def shared_store() -> dist.Store:
    """Another connection to the store of all ranks, for a thread: one that waits keeps a connection to itself."""
    return _store.clone()


def wait_for_all(name: str) -> None:
    """Waits until every rank is here, however long that takes; raises if one reports a failure instead.

    Args:
        name: what is waited for, as the message says it should the run break off meanwhile.
    """
    if failures := _meet(name, None):
        raise _merge(failures)


def raise_together(world: World, error: BaseException | None) -> None:
    """Every rank calls this after work that may fail; if it failed anywhere, all of them raise.

    An EngineError comes back with the problems of all ranks merged, each named once, and with the ranks that
    have it unless all do. Any other exception is raised unchanged where it happened, as an EngineError
    elsewhere. The exception's `spokesman` is the rank that should print it; a rank still busy `GRACE_S` after
    the first failure is not awaited.
    """
    if error is not None and (world.size == 1 or hasattr(error, "spokesman")):  # alone, or agreed upon before
        raise error
    try:
        failures = _meet("the other ranks", error)
    except EngineError:
        if error is None:
            raise
        error.spokesman = world.rank  # nobody is left to speak for it
        raise error from None
    if not failures:
        return
    merged = _merge(failures)
    if error is None or isinstance(error, EngineError):
        raise merged from error
    error.spokesman = merged.spokesman
    raise error


def together(world: World, work: Callable[[], Result]) -> Result:
    """What `work` returns here; if it fails on any process, all of them raise (`raise_together`)."""
    error = result = None
    try:
        result = work()
    except Exception as failure:
        error = failure
    raise_together(world, error)
    return result


def on_main(world: World, work: Callable[[], Result]) -> Result:
    """What `work` returns on the main process, which alone does it, on all of them; or what it raises there."""
    results = [together(world, lambda: work() if world.is_main else None)]
    if world.size > 1:
        dist.broadcast_object_list(results)
    return results[0]


def _meet(name: str, error: BaseException | None) -> list[tuple[int, EngineError]]:
    """Reports this rank's arrival or failure, awaits the others, and returns the failures in order of rank.

    Ranks meet at the n-th call of each, whichever function makes it: a failing rank reaches waiting ones.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return []
    rank, store, slot = dist.get_rank(), _store, next(_meetings)
    here, failed, read = f"{slot}/here", f"{slot}/failed", f"{slot}/read"
    try:
        if error is not None:
            if not isinstance(error, EngineError):
                error = EngineError(f"{type(error).__name__}: {error}".rstrip(": "))
            place = store.add(failed, 1)
            store.set(f"{failed}/{place}", pickle.dumps((rank, error)))
        store.add(here, 1)
        pause, give_up = 0.01, float("inf")
        # To add nothing is to read without blocking.
        while store.add(here, 0) < size and time.monotonic() < give_up:
            if give_up == float("inf") and store.add(failed, 0):
                give_up = time.monotonic() + GRACE_S
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
        failures = [pickle.loads(store.get(f"{failed}/{i + 1}")) for i in range(store.add(failed, 0))]
        if failures:
            store.add(read, 1)
            give_up = time.monotonic() + 2 * LONGEST_PAUSE_S
            # Rank 0 may be the store's host, and leaves last, lest the others lose the message.
            while rank == 0 and store.add(read, 0) < store.add(here, 0) and time.monotonic() < give_up:
                time.sleep(0.05)
    except dist.DistError as lost:
        raise EngineError(f"Waiting for {name}: rank 0 or its launcher has ended; see what it said") from lost
    return sorted(failures, key=lambda failure: failure[0])


def _merge(failures: list[tuple[int, EngineError]]) -> EngineError:
    """One error with the kind and heading of the lowest failing rank and the distinct problems of all."""
    spokesman, first = failures[0]
    said: dict[str, list[int]] = {}
    for rank, error in failures:
        prefix = "" if error.heading == first.heading else f"{error.heading}: "
        for line in dict.fromkeys([prefix + problem for problem in error.problems] or [error.heading]):
            said.setdefault(line, []).append(rank)

    def named(line: str) -> str:
        ranks = said[line]
        if len(ranks) == dist.get_world_size():
            return line
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return f"{line} (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:4]))}{more})"

    heading = first.heading if first.problems else named(first.heading)
    merged = type(first)(heading, [named(line) for line in said if line != first.heading])
    merged.spokesman = spokesman
    return merged


def shutdown(world: World) -> None:
    """Leaves the run when every rank is through; the environment is again as it was before we came."""
    global _store
    wait_for_all("the end of the run")
    if dist.is_initialized():
        dist.barrier()  # nobody still looks at rank 0's store, and no message is cut short
        dist.destroy_process_group()
    _store = None
    while _placed:
        os.environ.pop(_placed.pop(), None)


def exit_cleanly(code: int) -> NoReturn:
    """Ends the process with `code`, past the destructors of gloo's threads.

    After a correct run those sometimes abort the process ("terminate called without an active exception"),
    and the launcher reports a failure. Nothing registered with atexit runs: close trackers and files before.
    """
    logging.shutdown()
    activity.current.ends(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
