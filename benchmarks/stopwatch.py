"""Time of the parts of a step on the device's own clock, memory at its peak, and what it all ran on."""

import gc
import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

import engine

T = TypeVar("T")


class Stopwatch:
    """Laps of one optimizer step each, and the parts in them.

    On a GPU marks are events in its stream: the host goes on, no step is slowed by being timed, and a part is as long
    as the device took for it. `read` waits for the device.

    Args:
        clock: of a CPU, in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock = device, clock
        self.start()

    def start(self) -> None:
        """Forgets everything and begins the first lap."""
        synchronize(self.device)
        self._laps: list[tuple[Any, Any, list]] = []
        self._parts: list[tuple[str, Any, Any]] = []
        self._began = self._mark()

    def lap(self) -> None:
        """Ends a step and begins the next."""
        now = self._mark()
        self._laps.append((self._began, now, self._parts))
        self._began, self._parts = now, []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self._mark()
        yield
        self._parts.append((name, began, self._mark()))

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        def call(*args, **kwargs) -> T:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def timed_items(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, the wait for each of them timed."""
        take = self.timed(name, lambda: next(iterator, None))
        iterator = iter(items)
        while (item := take()) is not None:
            yield item

    def read(self) -> list[dict[str, float]]:
        """Seconds of each lap as `step`, and of the parts in it by their names."""
        synchronize(self.device)
        return [self._seconds(began, ended, parts) for began, ended, parts in self._laps]

    def _seconds(self, began: Any, ended: Any, parts: list) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float, step=self._between(began, ended))
        for name, start, stop in parts:
            found[name] += self._between(start, stop)
        return dict(found)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return stop - start if self.device.type != "cuda" else start.elapsed_time(stop) / 1e3


class PeakMemory:
    """Bytes held at the peak beyond what was held when this was made: allocated on a GPU, resident on a CPU (Linux)."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        self.before = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated()
        elif os.path.exists("/proc/self/clear_refs"):
            self.before = _resident("VmRSS")

    def restart(self) -> None:
        """The peak starts anew at what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.before is not None:
            Path("/proc/self/clear_refs").write_text("5")

    def added(self) -> int | None:
        if self.before is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _resident("VmHWM")
        return peak - self.before


def _resident(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    file = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    name = models[0] if models else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    return {
        "engine": engine.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def slug(device_name: str) -> str:
    """A device's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("(r)", "")).strip("-")
