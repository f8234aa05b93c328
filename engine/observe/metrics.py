"""What is measured while training, and `metrics.jsonl`: one line a logged step, always.

Sums of cross-entropies stay on the device; numbers are read (which waits for the GPU) only at a logged step.
Losses are means over all targets since the last logged step, over all processes, but for those of skipped steps.
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


def eos_loss(total: float, targets: float) -> dict:
    """Mean loss over the audio targets that end a clip, from their sum and number; None without any."""
    return {"eos_loss": total / targets if targets else None, "eos_targets": round(targets)}


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
        self.sums = torch.zeros(3 + self.codebooks, device=self.world.device)
        self.targets: list[Targets] = []
        self.verdicts: list[torch.Tensor] = []
        self.tokens = self.steps = 0
        self.audio_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, result: StepResult, targets: Targets, tokens: int, audio_seconds: float) -> None:
        # what is skipped is left out without a look at it: its sums may be no numbers
        self.sums += torch.where(result.skipped > 0, 0.0, torch.cat([result.sums, result.eos]))
        self.targets.append(targets)
        self.verdicts.append(torch.stack([result.skipped, result.grad_norm]))
        self.tokens += tokens
        self.tokens_seen += tokens
        self.audio_seconds += audio_seconds
        self.steps += 1

    def read(self) -> dict:
        """Metrics since the last reading, `grad_norm` of the last step that counted; every process must ask."""
        if self.world.size > 1:
            dist.all_reduce(self.sums)
        verdicts = torch.stack(self.verdicts).tolist()
        counted = [targets for targets, (skipped, _) in zip(self.targets, verdicts, strict=True) if not skipped]
        norms = [norm for skipped, norm in verdicts if not skipped]
        values = self._losses(self.sums.tolist(), counted)
        seconds = time.perf_counter() - self.started
        values |= {
            "grad_norm": norms[-1] if norms else None,
            "skipped_since": self.steps - len(counted),
            "tokens_per_second": self.tokens / seconds,
            "audio_seconds_per_second": self.audio_seconds / seconds,
            "seconds_per_step": seconds / self.steps,
            "tokens_seen": self.tokens_seen,
        }
        self._reset()
        return values

    def _losses(self, sums: list[float], counted: list[Targets]) -> dict:
        """Of the steps that counted; None if none did. And how many targets are behind them."""
        *sums, eos, eos_targets = sums
        text = sum(targets.text for targets in counted)
        books = [sum(targets.codebooks[book] for targets in counted) for book in range(self.codebooks)]
        values = losses(sums, text, books, self.settings)
        if not counted:
            values["loss"] = None
        return values | eos_loss(eos, eos_targets) | {"text_targets": text, "audio_targets": max(books)}


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
