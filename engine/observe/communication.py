"""The time of a step's collectives, of whatever backend: FSDP2, DeepSpeed, the engine's own.

All Python code reaches a collective through the same two places of torch: the methods of `ProcessGroup`, and `wait`
of the `Work` that they return. Those are timed, in place of the many functions above them, which DeepSpeed and FSDP2
keep references to (so to replace `torch.distributed.all_reduce` would miss them). It costs half a microsecond a call
on a CPU. Functional collectives, which torch calls in C++, are not seen; no step uses them.
"""

import functools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch._C._distributed_c10d import ProcessGroup, Work

from engine.runtime import activity
from engine.runtime.distributed import World

PHASES = frozenset({"between steps", "data", "forward", "backward", "optimizer"})
"""Of a step. What evaluations, saves and the log do together is theirs."""

COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "barrier",
    "allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced",
    "all_gather_single", "all_gather_single_coalesced",
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter", "_end_coalescing",
)  # fmt: skip
"""Names of today and of torch 2.11; those that the installed torch has are timed."""


class CommunicationClock:
    """Seconds spent in collectives by the thread that makes it, outside of what no step does (PHASES)."""

    def __init__(self) -> None:
        self._thread, self._spent = threading.get_ident(), 0.0

    def call(self, function, arguments: tuple, options: dict):
        """`function`, timed: on a CPU the call, or the `wait`, lasts as long as the slowest process."""
        if threading.get_ident() != self._thread or activity.current.phase not in PHASES:
            return function(*arguments, **options)
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            self._spent += time.perf_counter() - began

    def seconds(self, steps: int) -> float | None:
        """Since the last call, in which there were `steps` steps; None where nothing was measured."""
        spent, self._spent = self._spent, 0.0
        return spent


class StreamClock(CommunicationClock):
    """On GPUs, where calls return at once: time on the stream on which a collective is called or waited for.

    A pair of CUDA events stands around each, read at the next logged step. What is computed on another stream
    meanwhile is not taken off: it is an upper bound of the time lost. Only steps that are logged are measured,
    and stand for those before them.

    Args:
        every: steps from one that is measured to the next; the first one is, too.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every, self._steps = every, set()
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._works: weakref.WeakSet[Work] = weakref.WeakSet()

    def call(self, function, arguments: tuple, options: dict):
        # the autograd engine calls from a thread of its own, so any thread counts whose tensors are on the GPU
        step = activity.current.step
        measured = step is not None and (step == 1 or step % self._every == 0) and activity.current.phase in PHASES
        if not measured or not self._on_gpu(arguments):
            return function(*arguments, **options)
        self._steps.add(step)
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        work = function(*arguments, **options)
        pair[1].record()
        self._pairs.append(pair)
        if isinstance(work, Work):
            self._works.add(work)
        return work

    def _on_gpu(self, arguments: tuple) -> bool:
        """Whether it is a collective of GPU tensors, or the wait for one."""
        if isinstance(arguments[0], Work):
            return arguments[0] in self._works
        first = arguments[1] if len(arguments) > 1 else None
        while isinstance(first, (list, tuple)) and first:
            first = first[0]
        device = first.device if isinstance(first, torch.Tensor) else first
        return isinstance(device, torch.device) and device.type == "cuda"

    def seconds(self, steps: int) -> float | None:
        pairs, measured = self._pairs, len(self._steps)
        self._pairs, self._steps = [], set()
        if not pairs:
            return None
        torch.cuda.synchronize()  # of streams that nobody waited for
        zero = pairs[0][0]
        spans = [(zero.elapsed_time(began), zero.elapsed_time(ended)) for began, ended in pairs]
        return covered(spans) / 1000 * steps / measured


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of what (begin, end) spans cover together, wherever they overlap counted once."""
    length, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        length += max(ended - max(began, reached), 0.0)
        reached = max(reached, ended)
    return length


@contextmanager
def measured(world: World, every: int = 1) -> Iterator[CommunicationClock]:
    """A clock that runs meanwhile; torch is left as it was. With one process nothing is touched, and it stays at 0.

    Args:
        every: `logging_steps`.
    """
    if world.size == 1:
        yield CommunicationClock()
        return
    clock = StreamClock(every) if world.device.type == "cuda" else CommunicationClock()
    places = [(ProcessGroup, name) for name in COLLECTIVES if name in ProcessGroup.__dict__] + [(Work, "wait")]
    before = [owner.__dict__[name] for owner, name in places]
    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, _timed(clock, function))
    try:
        yield clock
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def _timed(clock: CommunicationClock, function):
    @functools.wraps(function, assigned=("__name__", "__doc__"))
    def timed(*arguments, **options):
        return clock.call(function, arguments, options)

    return timed
