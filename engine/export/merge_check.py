"""Is the merged model base + adapter, and another than the base? Asked of the files, before they get their name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.errors import CheckpointError, ModelError
from engine.export.merged import MergedWeights
from engine.model.initial import build_on_meta
from engine.model.streamed import ProbeBatch, streamed_logits
from engine.model.weights import WeightFiles

EXACT = 1e-4
"""Of the largest logit: what two orders of the same fp32 operations may differ by."""
ROUNDED = 3e-2
"""Likewise when the weights were rounded to 8 or 11 bits. A rounded weight is off by up to 2^-9 (bf16), at random, so
that a layer's output is off by about 1e-3 of itself, and 2 x 28 of them by under 1e-2. It only catches wrecks; that the
merge is right is seen in fp32, and that the files hold its rounding, by checksum."""
SHOWN = 10


class Changes:
    """Reads merged weights, and remembers how much each differs from the base's.

    Attributes:
        dtype: in which they are written.
        by: name -> norm of the difference / norm of the base's weight, after rounding; of touched weights only.
    """

    def __init__(self, merged: MergedWeights, dtype: torch.dtype):
        self._merged, self.dtype = merged, dtype
        self.by: dict[str, float] = {}

    def read(self, name: str) -> torch.Tensor:
        """A merged weight, fp32.

        Raises:
            ModelError: it is not finite.
        """
        weight = self._merged.read(name)
        if name in self._merged.touched:
            self._note(name, weight)
        return weight

    def _note(self, name: str, weight: torch.Tensor) -> None:
        written = weight.to(self.dtype)
        if not written.isfinite().all():
            raise ModelError(f"{self._merged.adapter.folder}: {name} is not finite in {self.dtype} → another --dtype.")
        base = self._merged.base(name)
        changed = (written.float() - base.to(self.dtype).float()).norm() / base.norm().clamp(min=1e-30)
        self.by[name] = changed.item()

    @property
    def count(self) -> int:
        return sum(change > 0 for change in self.by.values())

    def require_some(self) -> None:
        """Raises ModelError if the adapter changed no weight, or has no effect in the dtype that is written."""
        if not self.count:
            raise ModelError(
                f"{self._merged.adapter.folder}: merging it changes nothing in {self.dtype} → --dtype float32, or "
                "train for longer."
            )

    def line(self) -> str:
        line = f"changed: {self.count} of {len(self.by)} weights that have an adapter or were saved whole"
        same = [name for name, change in self.by.items() if not change]
        return line + (f"; the same as before: {', '.join(same[:3])}{' …' * (len(same) > 3)}" if same else "")

    def table(self) -> list[str]:
        """The most changed weights, relative to their size."""
        most = sorted(self.by.items(), key=lambda item: -item[1])[:SHOWN]
        width = max(len(name) for name, _ in most)
        return [f"  {'most changed':<{width}}   |change| / |weight|"] + [
            f"  {name:<{width}}   {change:.3%}" for name, change in most
        ]


@dataclass(frozen=True)
class Difference:
    """Of logits, of one head: the largest and the mean absolute difference, and the largest logit."""

    largest: float
    mean: float
    scale: float

    @classmethod
    def of(cls, found: torch.Tensor, wanted: torch.Tensor) -> "Difference":
        gap = (found - wanted).abs()
        return cls(gap.max().item(), gap.mean().item(), wanted.abs().max().item())

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-30)

    def within(self, limit: float) -> bool:
        return self.relative <= limit  # false for NaN


@dataclass(frozen=True)
class Verified:
    """Differences of what was written from base and adapter side by side."""

    text: Difference
    audio: Difference

    def line(self) -> str:
        heads = ", ".join(f"{head} {d.largest:.1e} ({d.relative:.1e})" for head, d in vars(self).items())
        return f"verified: largest difference of logits from base and adapter side by side (of the largest): {heads}"

    def numbers(self) -> dict[str, dict[str, float]]:
        return {
            head: {"largest_difference": d.largest, "relative": d.relative, "largest_logit": d.scale}
            for head, d in vars(self).items()
        }


@dataclass(frozen=True)
class Compared:
    """Differences of what was written from the base."""

    text: Difference
    audio: Difference

    def lines(self, said: str) -> list[str]:
        lines = [f"compared with the base on {said!r}: mean |difference| of the logits"]
        return lines + [
            f"  {head:<6} {d.mean:.6f} (largest {d.largest:.6f}, largest logit {d.scale:.4f})"
            for head, d in vars(self).items()
        ]

    def numbers(self) -> dict[str, float]:
        return {f"{head}_mean_difference": d.mean for head, d in vars(self).items()}


def verify(merged: MergedWeights, written: WeightFiles, dtype: torch.dtype, batch: ProbeBatch) -> Verified:
    """Compares with base and adapter unmerged: the fp32 merge closely, and the files as far as their dtype allows.

    Raises:
        CheckpointError: they compute something else.
    """
    wanted = streamed_logits(merged.model, merged.unmerged, batch)
    found = _logits(merged, written.read, batch)
    exact = found if dtype == torch.float32 else _logits(merged, merged.read, batch)
    _require_near("the merged weights", exact, wanted, EXACT)
    return _require_near(f"{written.folder}", found, wanted, EXACT if dtype == torch.float32 else ROUNDED)


def compare(merged: MergedWeights, written: WeightFiles, batch: ProbeBatch) -> Compared:
    """How far the base and the merged model are from each other.

    Raises:
        ModelError: not at all.
    """
    found, base = _logits(merged, written.read, batch), _logits(merged, merged.base, batch)
    compared = Compared(*(Difference.of(*pair) for pair in zip(found, base, strict=True)))
    if not compared.text.largest and not compared.audio.largest:
        raise ModelError(f"{merged.adapter.folder}: the merged model says what the base says → a longer training.")
    return compared


def _logits(merged: MergedWeights, read: Callable[[str], torch.Tensor], batch: ProbeBatch):
    return streamed_logits(build_on_meta(merged.files.config), read, batch)


def _require_near(what: str, found, wanted, limit: float) -> Verified:
    verified = Verified(*(Difference.of(*pair) for pair in zip(found, wanted, strict=True)))
    if not all(difference.within(limit) for difference in vars(verified).values()):
        raise CheckpointError(
            f"{what}: not what base and adapter compute, nothing was kept ({verified.line()}; at most {limit:g} is "
            "allowed) → report this, with the adapter_config.json."
        )
    return verified
