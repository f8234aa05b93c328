"""Steps that were left out because their numbers went wrong: `skipped_steps.jsonl`, a line for each.

Verdicts stay on the device until a logged step, where all processes read them; the main one writes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.data.batches import Step
from engine.data.dataset import Dataset
from engine.errors import Diverged
from engine.higgs_engine import StepResult
from engine.observe.journal import Journal, forget_after

FILE = "skipped_steps.jsonl"
SEARCHES = 3
"""Skipped steps of a start whose first value that is not finite is searched for: each takes the time of a step."""


@dataclass(frozen=True)
class Skipped:
    """A step that changed nothing.

    Attributes:
        norm: of its gradients.
        limit: above what it was a spike.
    """

    step: Step
    learning_rate: float
    norm: float
    limit: float

    @property
    def is_spike(self) -> bool:
        return math.isfinite(self.norm)

    def record(self, data: Dataset, found: dict | None) -> dict:
        """The line of the report. JSON has no NaN and no infinity: null."""
        return {
            "step": self.step.number + 1,
            "epoch": self.step.epoch,
            "reason": "spike of the gradient norm" if self.is_spike else "loss or gradient not finite",
            "grad_norm": self.norm if self.is_spike else None,
            "limit": self.limit if math.isfinite(self.limit) else None,
            "learning_rate": self.learning_rate,
            "micro_batches": [data.names(samples) for samples in self.step.micro_batches],
            "found": found,
        }


class SkippedSteps:
    """Every process has one and makes the same calls.

    Args:
        most: skipped steps in a row after which the run ends.
        file: where the main process writes; None on the others. Lines after `resumed_step` go.
        say: prints that it cannot.
    """

    def __init__(self, most: int, file: Path | None, resumed_step: int = 0, say: Callable[[str], None] = print):
        self.most, self.journal = most, file and Journal(file, say)
        self.searches_left = SEARCHES
        self._row = self._longest = 0
        self._last: Skipped | None = None
        self._steps: list[tuple[Step, float]] = []
        self._verdicts: list[torch.Tensor] = []
        if file is not None and file.exists():
            forget_after(file, resumed_step)

    def add(self, step: Step, learning_rate: float, result: StepResult) -> None:
        self._steps.append((step, learning_rate))
        self._verdicts.append(torch.stack([result.skipped, result.grad_norm, result.limit]))

    def read(self) -> list[Skipped]:
        """Those since the last reading. Waits for the device."""
        found = []
        verdicts = torch.stack(self._verdicts).tolist() if self._verdicts else []
        for (step, rate), (skipped, norm, limit) in zip(self._steps, verdicts, strict=True):
            self._row = self._row + 1 if skipped else 0
            if skipped:
                found.append(Skipped(step, rate, norm, limit))
            if self._row > self._longest:
                self._longest, self._last = self._row, found[-1]
        self._steps, self._verdicts = [], []
        return found

    def searches(self, skipped: Skipped) -> bool:
        """Whether to look for what was not finite in this one; counts it."""
        if skipped.is_spike or not self.searches_left:
            return False
        self.searches_left -= 1
        return True

    def write(self, records: list[dict]) -> None:
        if self.journal and records:
            self.journal.add(records)

    def require_progress(self, last_good: float | None) -> None:
        """Raises Diverged, the same on all processes, if there were too many in a row.

        Args:
            last_good: norm of the last step that counted; None: there is none.
        """
        if self._longest < self.most:
            return
        last = self._last
        before = "no step before was good" if last_good is None else f"the last good gradient norm was {last_good:.4g}"
        raise Diverged(
            f"step {last.step.number + 1}: {self._longest} step(s) in a row were skipped, {before} (max_skipped_steps: "
            f"{self.most}); training has diverged → resume from the last checkpoint with a lower learning_rate or more "
            f"warmup_steps, and look at the samples in {FILE}",
            ["its gradients were a spike → a higher skip_spikes_sigma lets them through"] * last.is_spike,
        )


def describe(record: dict) -> str:
    """`step 12: skipped, loss or gradient not finite (first in model.layers.3.mlp, row 17)`, for the console."""
    if record["grad_norm"] is not None:
        return (
            f"step {record['step']}: skipped, the gradient norm {record['grad_norm']:.4g} is above "
            f"{record['limit']:.4g} (skip_spikes_sigma)"
        )
    found = record["found"] or {}
    where = found.get("module") or found.get("gradient_of") or found.get("note")
    samples = f", {', '.join(found['samples'][:4])}" if found.get("samples") else ""
    return f"step {record['step']}: skipped, {record['reason']}" + (f" (first in: {where}{samples})" if where else "")
