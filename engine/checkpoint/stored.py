"""The weights within a checkpoint, tensor by tensor, read by one process without those that wrote it."""

import math
from pathlib import Path

import torch

from engine.backends.tensors import Reader
from engine.checkpoint.manifest import Manifest
from engine.errors import CheckpointError


class StoredWeights:
    """What a checkpoint holds of the model: fp32 masters of what was trained, the rest as it was.

    Attributes:
        shapes: parameter name, as in training (so PEFT-wrapped in LoRA runs) -> full shape.

    Raises:
        CheckpointError: the table of contents is damaged, or of other tensors than the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.shapes = {name: tuple(shape) for name, shape in manifest.shapes.items()}
        self._reader = Reader(Path(folder))
        stored = self._reader.metadata.state_dict_metadata
        sizes = {name: stored[f"model.{name}"].size.numel() if f"model.{name}" in stored else 0 for name in self.shapes}
        if problems := [
            f"{name}: {sizes[name]:,} elements are stored, its shape {list(shape)} has {math.prod(shape):,}"
            for name, shape in self.shapes.items()
            if math.prod(shape) != sizes[name]
        ]:
            raise CheckpointError(
                f"{folder}: tensors are not as the manifest says → take another checkpoint:", problems
            )

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor in the stored dtype."""
        return self._reader.tensor(f"model.{name}").view(self.shapes[name])
