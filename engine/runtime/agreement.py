"""What all processes know at the same step, without making any of them wait.

A background thread ends at another moment on each process. Before all act on it, all must know that all have
seen it, at the same step, or one would leave while the others wait for it in a collective.
"""

import torch
import torch.distributed as dist

from engine.runtime.distributed import World


class Ballot:
    """A vote that travels while a step is computed: cast in one step, counted in the next.

    Every process makes the same calls.
    """

    def __init__(self, world: World):
        self._size = world.size
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._box = torch.zeros(1)
        self._sent = None

    def unanimous(self, vote: bool) -> bool:
        """Whether all processes voted yes in the call before this one."""
        if self._group is None:
            return vote
        agreed = False
        if self._sent is not None:
            self._sent.wait()
            agreed = int(self._box.item()) == self._size
        self._box.fill_(float(vote))
        self._sent = dist.all_reduce(self._box, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        """Awaits the vote under way: call it before a decision that was reached otherwise."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None
