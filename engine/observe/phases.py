"""The phases of steps (engine/runtime/activity.py) while they are looked at closely: their time, and in the trace."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from engine.runtime import activity

MARK = "phase: "
"""Before a phase's name in a trace."""


class PhaseTimes:
    """Seconds in each phase while `watching`.

    On a GPU they are those of the stream on which the model is computed, by CUDA events: the host is far ahead of it,
    and its own time in a phase says little. A phase in which the stream had work left from before takes no time.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._changes: list[tuple[str, float | torch.cuda.Event]] = []
        self._range: record_function | None = None

    def start(self) -> None:
        self._enter(activity.current.phase)
        activity.current.on_change = self._enter

    def stop(self) -> None:
        activity.current.on_change = None
        self._changes.append(("", self._now()))
        self._close()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Ranges of the profiler's own open or close meanwhile: they have to lie one in another."""
        self._close()
        yield
        self._open(activity.current.phase)

    def seconds(self) -> dict[str, float]:
        """By phase, in the order in which they came; once stopped."""
        if self._on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (phase, began), (_, ended) in zip(self._changes, self._changes[1:], strict=False):
            spent[phase] = spent.get(phase, 0.0) + self._between(began, ended)
        return spent

    def _enter(self, phase: str) -> None:
        self._changes.append((phase, self._now()))
        self._close()
        self._open(phase)

    def _open(self, phase: str) -> None:
        self._range = record_function(MARK + phase)
        self._range.__enter__()

    def _close(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, began, ended) -> float:
        return began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began


def phase_shares(seconds: Sequence[Mapping[str, float]], steps: int) -> list[dict]:
    """What `phases.json` says of each phase.

    Args:
        seconds: by rank and phase, in `steps` steps.

    Returns:
        In the order of the main process: phase, seconds a step and share of the main process; slowest_rank and its
        slowest_seconds a step.
    """
    main, whole = seconds[0], sum(seconds[0].values())
    rows = []
    for phase, spent in main.items():
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank].get(phase, 0.0))
        rows.append(
            {
                "phase": phase,
                "seconds": spent / steps,
                "share": spent / whole if whole else 0.0,
                "slowest_rank": slowest,
                "slowest_seconds": seconds[slowest].get(phase, 0.0) / steps,
            }
        )
    return rows


def phase_table(rows: Sequence[Mapping], processes: int) -> list[str]:
    """Lines for people."""
    lines = [f"{'phase':<16}{'ms a step':>12}{'share':>8}" + ("   slowest process" if processes > 1 else "")]
    for row in rows:
        line = f"{row['phase']:<16}{1000 * row['seconds']:>12,.1f}{row['share']:>8.1%}"
        if processes > 1:
            line += f"   rank {row['slowest_rank']}: {1000 * row['slowest_seconds']:,.1f}"
        lines.append(line)
    return lines
