"""What is measured while training, and `metrics.jsonl`: one line a logged step, always.

Sums of cross-entropies stay on the device; numbers are read (which waits for the GPU) only at a logged step.
Losses are means over all targets since the last logged step, over all processes.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from engine.checkpoint.manifest import write_atomically
from engine.config import Settings
from engine.higgs_engine import StepResult, Targets
from engine.runtime.distributed import World


def losses(sums: list[float], text_targets: int, audio_targets: Iterable[int], settings: Settings) -> dict:
    """Mean losses from sums over all processes.

    Args:
        sums: [1 + C]: text, then each codebook.

    Returns:
        loss (as it is minimised), text_loss, audio_loss (weighted mean of codebooks), codebook_losses. A loss
        without any target is None, and counts nothing in `loss`.
    """
    text = sums[0] / text_targets if text_targets else None
    books = [s / n if n else None for s, n in zip(sums[1:], audio_targets, strict=True)]
    weights = settings.codebook_weights or [1.0] * len(books)
    audio = sum(w * b for w, b in zip(weights, books, strict=True) if b is not None) / sum(weights)
    audio = None if all(b is None for b in books) else audio
    total = settings.text_loss_weight * (text or 0.0) + settings.audio_loss_weight * (audio or 0.0)
    return {"loss": total, "text_loss": text, "audio_loss": audio, "codebook_losses": books}


class Meter:
    """Adds up steps until the next logged one.

    Args:
        tokens_seen: of the run so far (from the checkpoint, when resumed).
    """

    def __init__(self, settings: Settings, world: World, codebooks: int, tokens_seen: int = 0):
        self.settings, self.world, self.codebooks = settings, world, codebooks
        self.tokens_seen = tokens_seen
        self._reset()

    def _reset(self) -> None:
        self.sums = torch.zeros(1 + self.codebooks, device=self.world.device)
        self.text_targets, self.audio_targets = 0, [0] * self.codebooks
        self.tokens = self.steps = 0
        self.audio_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, result: StepResult, targets: Targets, tokens: int, audio_seconds: float) -> None:
        self.sums += result.sums
        self.text_targets += targets.text
        self.audio_targets = [a + b for a, b in zip(self.audio_targets, targets.codebooks, strict=True)]
        self.tokens += tokens
        self.tokens_seen += tokens
        self.audio_seconds += audio_seconds
        self.steps += 1
        self.grad_norm = result.grad_norm

    def read(self) -> dict:
        """Metrics since the last reading; every process must ask at the same step."""
        if self.world.size > 1:
            dist.all_reduce(self.sums)
        values = losses(self.sums.tolist(), self.text_targets, self.audio_targets, self.settings)
        seconds = time.perf_counter() - self.started
        values |= {
            "grad_norm": self.grad_norm.item(),
            "tokens_per_second": self.tokens / seconds,
            "audio_seconds_per_second": self.audio_seconds / seconds,
            "seconds_per_step": seconds / self.steps,
            "tokens_seen": self.tokens_seen,
        }
        self._reset()
        return values


class MetricsFile:
    """`metrics.jsonl`, one JSON object a line. Resuming drops the lines after the step resumed from."""

    def __init__(self, file: Path, resumed_step: int):
        self.file = file
        kept = []
        if resumed_step and file.exists():
            lines = file.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
        write_atomically(file, "".join(line + "\n" for line in kept))

    def write(self, values: dict) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(values) + "\n")
