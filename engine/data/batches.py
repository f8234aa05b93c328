"""The plan of packed batches: which samples make which micro-batch of which optimizer step.

A pure function of sample lengths, mixture, seed, epoch and batch settings, never of the number of processes: one GPU
and sixty-four see the same steps, and resuming is a jump to a step number. An epoch has the samples that the mixture
(engine/data/mixture.py) gives it: each exactly once, unless data sets are weighted.

A micro-batch is one packed row. It closes when `max_tokens` or `max_samples` is reached, whichever is given.
Samples are shuffled, then each goes into the fullest of a few open rows that still has room (best fit), so that
rows are nearly full while any sample can meet any other.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np

from engine.data.mixture import Mixture

OPEN_ROWS = 64
"""Rows filled side by side: more rows waste fewer tokens, fewer rows mix more freely."""

SHUFFLED_ROWS = 1024
"""Rows that change places with each other."""

MicroBatch = tuple[int, ...]
"""Indices of the samples of one packed row."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number over the whole run, its epoch, and its micro-batches over all processes.

    `epochs_done`: passes over the data that lie behind it, itself included.
    """

    number: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    epochs_done: float = 0.0

    def share(self, rank: int, world_size: int, rounds: int) -> list[MicroBatch]:
        """The `rounds` micro-batches of one process; an empty one stands where the step has none left."""
        mine = list(self.micro_batches[rank::world_size])
        return mine + [()] * (rounds - len(mine))


class _Steps(Sequence):
    """The steps of an epoch, each a tuple of micro-batches, made when it is asked for.

    Kept as two arrays. As Python objects a sample would take 50 bytes, and those not once a machine but once a loader
    worker: looking at an object writes its reference count, and so copies the page that a fork had shared.
    """

    def __init__(self, rows: list[MicroBatch], size: int):
        self._samples = np.fromiter(chain.from_iterable(rows), np.int64)
        self._starts = np.cumsum([0, *map(len, rows)])
        self._firsts = range(0, len(rows), size)  # row that begins each step

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, number: int) -> tuple[MicroBatch, ...]:
        first = self._firsts[number]
        starts = self._starts[first : first + self._firsts.step + 1].tolist()
        return tuple(tuple(self._samples[a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def samples(self, number: int) -> np.ndarray:
        """int64; of the first `number` steps, in their order."""
        return self._samples[: self._starts[min(number * self._firsts.step, len(self._starts) - 1)]]


class BatchPlan:
    """All steps of a run.

    Args:
        lengths: tokens of each sample.
        max_tokens: token budget of a micro-batch, or None.
        max_samples: samples of a micro-batch, or None; at least one of the two is given.
        micro_batches_per_step: micro-batches of one optimizer step over all processes.
        epochs: passes over the data; `max_steps`, if given, ends the run instead.
        mixture: the order of the samples in each epoch; None: all of them, shuffled by `seed`.

    Raises:
        ValueError: a sample is longer than the budget.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        max_tokens: int | None,
        max_samples: int | None,
        micro_batches_per_step: int,
        epochs: int,
        max_steps: int | None = None,
        seed: int = 0,
        mixture: Mixture | None = None,
    ):
        self.lengths = np.asarray(lengths, np.int64)
        self.max_tokens, self.max_samples = max_tokens, max_samples
        self.micro_batches_per_step = micro_batches_per_step
        self.epochs, self.max_steps, self.seed = epochs, max_steps, seed
        self.mixture = mixture or Mixture([[len(self.lengths)]], seed=seed)
        if max_tokens is not None and self.lengths.max() > max_tokens:
            raise ValueError(f"a sample of {self.lengths.max()} tokens cannot go into a row of {max_tokens}")

    @lru_cache(maxsize=2)  # noqa: B019  (a run holds one plan; the current and the next epoch are enough)
    def epoch(self, epoch: int) -> Sequence[tuple[MicroBatch, ...]]:
        """The steps of one epoch, each a tuple of micro-batches; the last step may be shorter."""
        rows = self._rows(self.mixture.epoch(epoch).tolist())
        rows = self._shuffled(rows, np.random.default_rng([self.seed, epoch, 2]))  # 2: not a stream of the mixture
        return _Steps(rows, self.micro_batches_per_step)

    @staticmethod
    def _shuffled(rows: list[MicroBatch], rng: np.random.Generator) -> list[MicroBatch]:
        """Rows in random order within windows: best fit closes long and short rows at different times.

        Not over the whole epoch, for the order of the mixture is one that reads a sharded store part by part.
        """
        starts = range(0, len(rows), SHUFFLED_ROWS)
        windows = (rows[start : start + SHUFFLED_ROWS] for start in starts)
        return [window[i] for window in windows for i in rng.permutation(len(window))]

    def _rows(self, order: list[int]) -> list[MicroBatch]:
        if self.max_tokens is None:
            return [tuple(order[i : i + self.max_samples]) for i in range(0, len(order), self.max_samples)]
        lengths, limit = self.lengths.tolist(), self.max_samples or len(order)
        done: list[MicroBatch] = []
        free: list[tuple[int, int]] = []  # (tokens left, key) of the open rows, fullest first
        rows: dict[int, list[int]] = {}
        for key, sample in enumerate(order):
            at = bisect_left(free, (lengths[sample], -1))
            left, row = free.pop(at) if at < len(free) else (self.max_tokens, key)
            rows.setdefault(row, []).append(sample)
            left -= lengths[sample]
            if left == 0 or len(rows[row]) == limit:
                done.append(tuple(rows.pop(row)))
                continue
            insort(free, (left, row))
            if len(free) > OPEN_ROWS:
                done.append(tuple(rows.pop(free.pop(0)[1])))
        return done + [tuple(row) for row in rows.values()]

    def rounds(self, world_size: int) -> int:
        """Micro-batches that each process runs in every step."""
        return -(-self.micro_batches_per_step // world_size)

    @cached_property
    def total_steps(self) -> int:
        if self.max_steps is not None:
            return self.max_steps
        return sum(len(self.epoch(e)) for e in range(self.epochs))

    def samples_before(self, start: int) -> Iterator[np.ndarray]:
        """int64; samples of the steps before number `start`, an array for each epoch."""
        epoch = 0
        while start > 0:
            steps = self.epoch(epoch)
            yield steps.samples(min(start, len(steps)))
            start, epoch = start - len(steps), epoch + 1

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Steps from number `start` (counted from 0) to the end of the run."""
        first, epoch, total = 0, 0, self.total_steps
        while first < total:
            steps = self.epoch(epoch)
            for i in range(max(0, start - first), min(len(steps), total - first)):
                yield Step(first + i, epoch, steps[i], epochs_done=epoch + (i + 1) / len(steps))
            first, epoch = first + len(steps), epoch + 1
