"""What many numbers look like, in few: quantiles, and a histogram whose bins are round numbers."""

import math
from typing import Any

import numpy as np

BINS = 40


def describe(values: np.ndarray) -> dict[str, Any]:
    """Count, mean, quantiles and histogram; only the count, 0, if there are no values."""
    if not len(values):
        return {"count": 0}
    p5, median, p95 = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
    low, high = values.min().item(), values.max().item()
    found = {"count": len(values), "mean": values.mean().item(), "min": low, "p5": p5, "median": median}
    return found | {"p95": p95, "max": high, "histogram": histogram(values)}


def histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts in bins [start + i * width, start + (i + 1) * width), and of the values `above` them all.

    The width is a round number. A long tail, the last hundredth over half of the range, is counted as `above`: one
    clip of ten minutes would else leave all the others in one bin.
    """
    low, most, high = np.quantile(values, (0, 0.99, 1)).tolist()
    top = most if high - low > 2 * (most - low) > 0 else high
    width = round_step((top - low) / BINS) if top > low else 1.0
    if values.dtype.kind == "i":
        width = max(width, 1.0)
    first = np.floor(low / width + 1e-9)
    bins = np.floor(values / width + 1e-9) - first
    used = int(np.floor(top / width + 1e-9) - first) + 1
    counts = np.bincount(bins[bins < used].astype(np.int64), minlength=used)
    return {"start": first * width, "width": width, "counts": counts.tolist(), "above": int((bins >= used).sum())}


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least` > 0: a step that reads well."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
