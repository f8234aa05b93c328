"""Feeds one process its micro-batches: packed in worker processes, pinned on GPU machines, ahead of the step."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils import data as torch_data

from engine.data.batches import MicroBatch
from engine.data.dataset import Dataset
from engine.data.packing import PackedBatch, empty_sample, pack
from engine.runtime.signals import begin_worker


class _Packer(torch_data.Dataset):
    """Indexed by a micro-batch (a tuple of sample numbers), so that the sampler is the plan itself."""

    def __init__(self, data: Dataset, audio_token_id: int, piece: tuple[int, int]):
        self.data, self.audio_token_id, self.piece = data, audio_token_id, piece
        self.nothing = empty_sample(data.codebooks)

    def __getitem__(self, micro_batch: MicroBatch) -> PackedBatch:
        chosen = [self.data[i] for i in micro_batch] or [self.nothing]
        return pack(chosen, self.audio_token_id, self.piece)


def _begin_worker(_: int) -> None:
    begin_worker()


def packed_batches(
    data: Dataset,
    micro_batches: Iterable[MicroBatch],
    *,
    audio_token_id: int,
    workers: int,
    device: torch.device,
    piece: tuple[int, int] = (0, 1),
) -> Iterator[PackedBatch]:
    """Packed rows in the order of `micro_batches`; an empty one becomes a row that trains nothing.

    Args:
        piece: (number, of): this process's piece of each row, of so many.
    """
    return iter(
        torch_data.DataLoader(
            _Packer(data, audio_token_id, piece),
            batch_size=None,
            sampler=micro_batches,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=_begin_worker,
            # its own, or making an iterator would draw from the generator of dropout, and a resume would differ
            generator=torch.Generator(),
        )
    )
