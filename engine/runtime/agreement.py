"""What all processes know at the same step, without making any of them wait.

A background thread ends, a signal comes, at another moment on each process. Before all act on it, all must know it at
the same step, or one would leave while the others wait for it in a collective.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from engine.runtime.distributed import World


class Ballot:
    """A vote that travels while a step is computed: cast in one step, counted in the next.

    Every process makes the same calls.

    Args:
        op: dist.ReduceOp.MIN: what all voted at least; MAX: what one voted at most.
        timeout: how long the slowest voter is awaited.
    """

    def __init__(self, world: World, op: dist.ReduceOp, timeout: timedelta):
        self._op = op
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._box = torch.zeros((), dtype=torch.int64)
        self._sent = None

    def vote(self, number: int) -> int:
        """Votes, and returns the result of the call before this one: 0 at first. Alone, the vote itself."""
        if self._group is None:
            return number
        result = 0
        if self._sent is not None:
            self._sent.wait()
            result = int(self._box)
        self._box.fill_(number)
        self._sent = dist.all_reduce(self._box, op=self._op, group=self._group, async_op=True)
        return result

    def close(self) -> None:
        """Awaits the vote under way: call it before a decision that was reached otherwise, and at the end."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None
