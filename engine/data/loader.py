"""Feeds one process its micro-batches: packed in worker processes, pinned on GPU machines, ahead of the step."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.batches import MicroBatch
from engine.data.labels import Sample
from engine.data.packing import PackedBatch, empty_sample, pack


class _Packer(Dataset):
    """Indexed by a micro-batch (a tuple of sample numbers), so that the sampler is the plan itself."""

    def __init__(self, samples: list[Sample], audio_token_id: int):
        self.samples, self.audio_token_id = samples, audio_token_id
        self.nothing = empty_sample(samples[0].audio_ids.shape[1])

    def __getitem__(self, micro_batch: MicroBatch) -> PackedBatch:
        chosen = [self.samples[i] for i in micro_batch] or [self.nothing]
        return pack(chosen, self.audio_token_id)


def packed_batches(
    samples: list[Sample],
    micro_batches: Iterable[MicroBatch],
    *,
    audio_token_id: int,
    workers: int,
    device: torch.device,
) -> Iterator[PackedBatch]:
    """Packed rows in the order of `micro_batches`; an empty one becomes a row that trains nothing."""
    return iter(
        DataLoader(
            _Packer(samples, audio_token_id),
            batch_size=None,
            sampler=micro_batches,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if workers else None,
            # its own, or making an iterator would draw from the generator of dropout, and a resume would differ
            generator=torch.Generator(),
        )
    )
