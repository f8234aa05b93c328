"""This process's packed rows of any samples: which of them are its own, and how they are made."""

from collections.abc import Iterable, Iterator

from engine.config import Settings
from engine.data.batches import MicroBatch
from engine.data.dataset import Dataset
from engine.data.loader import packed_batches
from engine.data.packing import PackedBatch
from engine.runtime.distributed import World


class Rows:
    """
    Attributes:
        reader, readers: this process, or its group of those that share a row, among all of them.
    """

    def __init__(self, settings: Settings, world: World, audio_token_id: int):
        self._settings, self._world, self._audio_token_id = settings, world, audio_token_id
        self.reader, self.readers = world.in_groups(of=settings.processes_per_row)

    def packed(self, data: Dataset, micro_batches: Iterable[MicroBatch], workers: int = 0) -> Iterator[PackedBatch]:
        """In the order of `micro_batches`, made ahead by so many worker processes."""
        pieces = self._settings.sequence_parallel_size
        return packed_batches(
            data, micro_batches, audio_token_id=self._audio_token_id, workers=workers,
            device=self._world.device, piece=(self._world.rank % pieces, pieces),
        )  # fmt: skip
