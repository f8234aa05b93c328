"""What a model is evaluated on, and its metrics there: the same on any number of processes, in whatever rows.

Sums over targets are added up over all processes and divided by the number of all targets, so no sample counts more
for the row or the process that it is in. Every process runs as many rows, empty ones at the end where need be, so
none waits for a collective that another does not enter.
"""

import math
from collections.abc import Iterator

import torch.distributed as dist

from engine.config import Settings
from engine.data.batches import BatchPlan, Step
from engine.data.dataset import Dataset
from engine.data.packing import PackedBatch
from engine.higgs_engine import HiggsEngine, Targets
from engine.observe.metrics import head_metrics
from engine.rows import Rows
from engine.runtime.distributed import World


class HeldOut:
    """
    Attributes:
        data: the samples.
        targets: of all of them.
    """

    def __init__(self, data: Dataset, settings: Settings, world: World, rows: Rows):
        self.data, self.settings, self.world = data, settings, world
        self.targets = Targets(int(data.text_targets.sum()), (int(data.audio_targets.sum()),) * data.codebooks)
        self._own = rows
        plan = BatchPlan(
            data.lengths, max_tokens=settings.max_tokens_per_micro_batch, micro_batches_per_step=1, epochs=1,
            max_samples=settings.per_device_eval_batch_size or settings.per_device_train_batch_size,
            mixture=data.mixture(0),
        )  # fmt: skip
        self._rows = tuple(batch for step in plan.epoch(0) for batch in step)

    def batches(self) -> Iterator[PackedBatch]:
        """This process's rows."""
        rounds = -(-len(self._rows) // self._own.readers)
        return self._own.packed(self.data, Step(0, 0, self._rows).share(self._own.reader, self._own.readers, rounds))

    def evaluate(self, engine: HiggsEngine) -> dict:
        """`head_metrics` of the held-out data, the same on all processes, which all have to ask.

        What is not finite is None.
        """
        tallies = engine.evaluate(self.batches())
        if self.world.size > 1:
            dist.all_reduce(tallies)
        metrics = head_metrics(tallies.tolist(), self.targets, self.settings)
        return {name: _known(value) for name, value in metrics.items()}


def _known(value: float | list | None) -> float | list | None:
    if isinstance(value, list):
        return [_known(item) for item in value]
    return value if value is not None and math.isfinite(value) else None
