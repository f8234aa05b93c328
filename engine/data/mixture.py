"""Which samples an epoch has, and in which order: several data sets with weights, shuffled, part by part if asked.

A data set of n samples and weight w gives each epoch round(w * n) samples. They are the next ones of an endless
sequence of shuffled passes over it, so with weight 1 an epoch is one pass, with 0.5 two epochs are one, and with 2
an epoch has every sample twice. A pure function of seed and epoch.

Data sets of several parts are passed through a few parts at a time, in shuffled order: samples mix within these
`WINDOW` parts, and reading stays near to where it was. The data sets are spread evenly over the epoch.
"""

from collections.abc import Sequence

import numpy as np

WINDOW = 4
"""Parts that are mixed with each other."""


class Mixture:
    """
    Args:
        blocks: for each data set, the sizes of its parts, in order; samples are numbered through all of them.
        weights: of each data set; None means 1 each.
        seed: another seed, another order.
    """

    def __init__(self, blocks: Sequence[Sequence[int]], weights: Sequence[float] | None = None, seed: int = 0):
        self.blocks = [np.asarray(sizes, np.int64) for sizes in blocks]
        sizes = [int(part.sum()) for part in self.blocks]
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).tolist()
        self.sizes = sizes
        self.weights, self.seed = list(weights or [1.0] * len(sizes)), seed

    def share(self, source: int) -> int:
        """Samples that a data set gives to each epoch, at least one."""
        return max(1, round(self.weights[source] * self.sizes[source]))

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample numbers in the order of the epoch, int64."""
        drawn = [self._next(source, epoch) for source in range(len(self.sizes))]
        if len(drawn) == 1:
            return drawn[0]
        rng = np.random.default_rng([self.seed, epoch, 1])
        places = [(np.arange(len(part)) + rng.random(len(part))) / len(part) for part in drawn]
        return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]

    def _next(self, source: int, epoch: int) -> np.ndarray:
        size, count = self.sizes[source], self.share(source)
        first, last = epoch * count, (epoch + 1) * count
        passes = [self._pass(source, number) for number in range(first // size, -(-last // size))]
        skipped = first - first // size * size
        return self.starts[source] + np.concatenate(passes)[skipped : skipped + count]

    def _pass(self, source: int, number: int) -> np.ndarray:
        """Every sample of a data set once."""
        rng = np.random.default_rng([self.seed, number, 0, source])
        sizes = self.blocks[source]
        starts = np.cumsum(sizes) - sizes
        order = rng.permutation(len(sizes))
        windows = [order[i : i + WINDOW] for i in range(0, len(order), WINDOW)]
        return np.concatenate(
            [rng.permutation(np.concatenate([starts[b] + np.arange(sizes[b]) for b in w])) for w in windows]
        )
