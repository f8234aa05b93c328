"""Consolidates a checkpoint whose tensors are made up when they are read, and tells the most memory that it took.

memory_worker.py CHECKPOINT OUT        prints: MiB of the tensors, of the largest, most MiB above the start
"""

import re
import sys
from pathlib import Path

import torch

import engine  # noqa: F401  (installs the torchaudio hook)
from engine.export import model_source
from engine.export.consolidate import consolidate

MiB = 2**20


class MadeUp:
    """Stands for StoredWeights: fp32 tensors that are nowhere until they are read."""

    def __init__(self, folder: Path, manifest):
        self.shapes = {name: tuple(shape) for name, shape in manifest.shapes.items()}

    def read(self, name: str) -> torch.Tensor:
        return torch.full(self.shapes[name], 1 / (3 + len(name)))


def status(field: str) -> float:
    """MiB that the kernel says of this process."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, out = map(Path, sys.argv[1:])
    model_source.StoredWeights = MadeUp
    sizes = [4 * torch.Size(s).numel() for s in model_source.read_manifest(checkpoint).shapes.values()]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of the imports, is forgotten
    start = status("VmRSS")
    consolidate(checkpoint, out, dtype="bfloat16", max_shard_size="200MB")
    print(f"{sum(sizes) / MiB:.0f} {max(sizes) / MiB:.0f} {status('VmHWM') - start:.0f}")


if __name__ == "__main__":
    main()
