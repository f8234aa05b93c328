"""The weights within a checkpoint, tensor by tensor, read by one process without those that wrote it."""

from pathlib import Path

import torch

from engine.backends.tensors import Reader
from engine.checkpoint.manifest import Manifest


class StoredWeights:
    """What a checkpoint holds of the model: fp32 masters of what was trained, the rest as it was.

    Attributes:
        shapes: parameter name, as in training (so PEFT-wrapped in LoRA runs) -> full shape.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.shapes = {name: tuple(shape) for name, shape in manifest.shapes.items()}
        self._reader = Reader(Path(folder))

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor in the stored dtype."""
        return self._reader.tensor(f"model.{name}").view(self.shapes[name])
