"""Where the time of the steps goes, and the memory: of each process, and of all of them the highest, in one message."""

import torch
import torch.distributed as dist

from engine.observe.communication import CommunicationClock
from engine.observe.memory import Memory
from engine.runtime import activity
from engine.runtime.distributed import World

NAMES = ("data_share", "communication_share", "memory_gib", "memory_peak_gib")
UNKNOWN = -1.0
"""In the message; all that is known is above."""


class TimeShares:
    """Every process reads at the same logged steps.

    Args:
        clock: of engine/observe/communication.py.
    """

    def __init__(self, world: World, clock: CommunicationClock):
        self._world, self._clock, self._memory = world, clock, Memory(world.device)
        self._waited = self._in_data()
        self._memory.read()
        clock.seconds(0)

    @staticmethod
    def _in_data() -> float:
        return activity.current.seconds.get("data", 0.0)

    def read(self, elapsed_s: float, steps: int) -> dict[str, float | None]:
        """Metrics since the last reading, of the process that has most of each; None where no process knows.

        Args:
            elapsed_s: that the steps took.
            steps: in this time.
        """
        waited, before = self._in_data(), self._waited
        self._waited = waited
        communication = self._clock.seconds(steps)
        mine = [(waited - before) / elapsed_s, UNKNOWN if communication is None else communication / elapsed_s]
        values = torch.tensor([*mine, *self._memory.read()], dtype=torch.float64)
        if self._world.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return {
            name: None if value == UNKNOWN else min(value, 1.0) if name.endswith("_share") else value
            for name, value in zip(NAMES, values.tolist(), strict=True)
        }
