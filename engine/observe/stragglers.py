"""Which process makes the others wait, from the seconds that each spent in the phases of its steps.

Told apart can be what a process does alone: waiting for data, and the forward where weights need not be gathered. In
collectives all take as long as the slowest; who is slow there, `higgs-engine doctor` finds by a product of matrices.
"""

import socket

import torch
import torch.distributed as dist

from engine.runtime import activity
from engine.runtime.distributed import World

PHASES = ("data", "forward")
MIN_STEPS = 10
EXCESS = 0.2
"""Share of a step by which the slowest has to exceed the median, to be worth a word."""


class Stragglers:
    """Every process asks at the same logged steps."""

    def __init__(self, world: World):
        self._world, self._steps = world, 0
        self._before = self._now()

    def _now(self) -> torch.Tensor:
        spent = activity.current.seconds
        return torch.tensor([spent.get(phase, 0.0) for phase in PHASES], dtype=torch.float64)

    def report(self, steps: int, seconds_per_step: float) -> list[str]:
        """A line for each phase in which one process was much slower than the others since the last report.

        Args:
            steps: since the last call; fewer than MIN_STEPS say nothing, and are kept for the next one.
        """
        self._steps += steps
        if self._steps < MIN_STEPS:
            return []
        now = self._now()
        mine, self._before, self._steps = (now - self._before) / self._steps, now, 0
        if self._world.size == 1:
            return []
        everyone = [torch.empty_like(mine) for _ in range(self._world.size)]
        dist.all_gather(everyone, mine)
        hosts: list[str] = [""] * self._world.size
        found = slow([row.tolist() for row in everyone], seconds_per_step)
        if found:
            dist.all_gather_object(hosts, socket.gethostname())
        return [
            f"slow: rank {rank} ({hosts[rank]}) takes {worst:.2f} s of each step for {phase}, the others {median:.2f} s"
            for phase, rank, worst, median in found
        ]


def slow(seconds: list[list[float]], seconds_per_step: float) -> list[tuple[str, int, float, float]]:
    """(phase, rank, its seconds, the others' median) where one is slower by EXCESS of a step.

    Args:
        seconds: of a step, by rank and phase.
    """
    found = []
    for i, phase in enumerate(PHASES):
        spent = [row[i] for row in seconds]
        rank = max(range(len(spent)), key=spent.__getitem__)
        others = sorted(spent[:rank] + spent[rank + 1 :])
        median = others[len(others) // 2]
        if spent[rank] - median > EXCESS * seconds_per_step:
            found.append((phase, rank, spent[rank], median))
    return found
