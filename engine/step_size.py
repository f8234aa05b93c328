"""How much is in an optimizer step, over all processes: known to the host from the plan, no process asks another."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.data.batches import Step
from engine.data.dataset import Dataset
from engine.higgs_engine import Targets


@dataclass(frozen=True)
class StepSize:
    """Of one step, or of several together.

    Attributes:
        targets: labelled targets of text and of each codebook.
        tokens: positions, text and audio.
        squares: sum of the squares of the sample lengths, which attention costs.
        audio_frames: positions that are audio, of reference and target.
        audio_rows: positions at which the audio head runs.
    """

    targets: Targets
    tokens: int = 0
    squares: int = 0
    audio_frames: int = 0
    audio_rows: int = 0

    @classmethod
    def of(cls, data: Dataset, step: Step) -> "StepSize":
        return cls.of_samples(data, np.array([i for batch in step.micro_batches for i in batch], np.int64))

    @classmethod
    def of_samples(cls, data: Dataset, samples: np.ndarray) -> "StepSize":
        lengths, audio = data.lengths[samples].astype(np.int64), data.audio_targets[samples]
        # by the delay a clip's last codebook ends C - 1 frames after its first; a sample trains one clip as a rule
        rows = int(audio.sum()) + (data.codebooks - 1) * int((audio > 0).sum())
        text = int(data.text_targets[samples].sum())
        return cls(
            targets=Targets(text, (int(audio.sum()),) * data.codebooks),
            tokens=int(lengths.sum()),
            squares=int((lengths**2).sum()),
            audio_frames=int(data.audio_frames[samples].sum()),
            audio_rows=rows,
        )


def total(sizes: Iterable[StepSize], codebooks: int) -> StepSize:
    """Of all of them together."""
    sizes = list(sizes)
    books = tuple(sum(size.targets.codebooks[book] for size in sizes) for book in range(codebooks))
    sums = {name: sum(getattr(size, name) for size in sizes) for name in ("tokens", "squares", "audio_frames")}
    rows = sum(size.audio_rows for size in sizes)
    return StepSize(Targets(sum(size.targets.text for size in sizes), books), **sums, audio_rows=rows)
