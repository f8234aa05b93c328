"""Which process makes the others wait, from the seconds that each spent in the phases of its steps.

Told apart can be what a process does alone: waiting for data, and the forward where weights need not be gathered. In
collectives all take as long as the slowest; who is slow there, `higgs-engine doctor` finds by a product of matrices.
"""

import socket

import torch
import torch.distributed as dist

from engine.callbacks import Callback
from engine.runtime import activity

PHASES = ("data", "forward")
MIN_STEPS = 10
EXCESS = 0.2
"""Share of a step by which the slowest has to exceed the median, to be worth a word."""


class Stragglers(Callback):
    """Says a line for each phase in which one process was much slower than the others since the last look.

    It looks at logged steps, once `MIN_STEPS` have been taken since.
    """

    def on_start(self, run, step):
        self._steps, self._before = 0, _seconds()
        self._hosts = [socket.gethostname()] * run.world.size
        if run.world.size > 1:
            dist.all_gather_object(self._hosts, socket.gethostname())

    def on_step(self, run, step, result):
        self._steps += 1

    def on_log(self, run, step, values):
        if self._steps < MIN_STEPS:
            return
        now = _seconds()
        mine, self._before, self._steps = (now - self._before) / self._steps, now, 0
        if run.world.size == 1:
            return
        everyone = [torch.empty_like(mine) for _ in range(run.world.size)]
        dist.all_gather(everyone, mine)
        for phase, rank, worst, median in slow([row.tolist() for row in everyone], values["seconds_per_step"]):
            run.say(
                f"slow: rank {rank} ({self._hosts[rank]}) takes {worst:.2f} s of each step for {phase}, the others "
                f"{median:.2f} s"
            )


def _seconds() -> torch.Tensor:
    spent = activity.current.seconds
    return torch.tensor([spent.get(phase, 0.0) for phase in PHASES], dtype=torch.float64)


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
