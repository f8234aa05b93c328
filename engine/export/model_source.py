"""A whole model to be written out, wherever it lies: in a full run's checkpoint, or in a folder of either format."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperFeatureExtractor

from engine.checkpoint.lifecycle import MODEL_FILES
from engine.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from engine.checkpoint.stored import StoredWeights
from engine.config import Settings
from engine.errors import CheckpointError, ModelError
from engine.export.model_card import write_card
from engine.export.model_folder import DTYPES, copy_side_files
from engine.export.reopened import verify_tensors
from engine.model import whisper_source
from engine.model.adapter_folder import CONFIG as ADAPTER_CONFIG
from engine.model.adapter_folder import adapter_folder
from engine.model.keys import WHISPER
from engine.model.safetensors_writer import Spec
from engine.model.tensor_files import TensorFiles
from engine.model.weights import WeightFiles
from engine.model.whisper_source import WhisperSource


@dataclass(frozen=True)
class ModelSource:
    """A model to be written out.

    Attributes:
        side_files: folder with what stands beside the weights, in native form.
        shapes: native name -> shape of every weight of transformers' model.
        read: gives one of these, or of `whisper`, as stored.
        stored: dtype of a stored tensor, by name; None for a checkpoint, whose masters are no format to hand over.
        computed: dtype that the run of a checkpoint computed in.
        whisper: the conditioning beside it, if it has one.
        left_out: what of the source is not written, in words; None if all of it is.
        run: manifest and settings of the run, if it is a checkpoint.
    """

    side_files: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    stored: Callable[[str], torch.dtype] | None
    computed: torch.dtype | None
    whisper: WhisperSource | None
    left_out: str | None = None
    run: tuple[Manifest, Settings] | None = None

    def dtypes(self, asked: str | None) -> dict[str, torch.dtype]:
        """Name -> dtype to be written, of the weights and of the conditioning.

        Args:
            asked: of DTYPES; auto: as stored, or for a checkpoint what the run computed in; None: as stored, or for a
                checkpoint bfloat16.
        """
        names = [*self.shapes, *(self.whisper.shapes if self.whisper else ())]
        if asked in DTYPES:
            return dict.fromkeys(names, DTYPES[asked])
        if self.stored is not None:
            return {name: self.stored(name) for name in names}
        return dict.fromkeys(names, self.computed if asked == "auto" else torch.bfloat16)

    def write_card(self, folder: Path, native: bool) -> None:
        """The model card of a checkpoint; a model folder keeps the one it has."""
        if self.run is not None:
            write_card(folder, *self.run, native)

    def write_whisper(self, folder: Path, dtypes: dict[str, torch.dtype]) -> None:
        """The conditioning as a folder of its own within a native model folder."""
        if self.whisper is not None:
            self.whisper.describe(folder / whisper_source.FOLDER)
            write_conditioning(folder / whisper_source.FOLDER, self.whisper.shapes, self.whisper.read, dtypes)


def write_conditioning(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtypes: dict[str, torch.dtype],
) -> None:
    """Writes the tensors of a Whisper conditioning (`whisper.…`) beside its configurations, and reopens them.

    Raises:
        CheckpointError: what was written is not what was read.
    """
    specs = {name: Spec(shape, dtypes[name]) for name, shape in shapes.items()}
    file, checksums = whisper_source.write_weights(folder, specs, read)
    in_file = TensorFiles([file], lambda name: name)
    specs = {name.removeprefix(WHISPER): spec for name, spec in specs.items()}
    verify_tensors(file, in_file.shapes, in_file.read, specs, checksums)


@contextlib.contextmanager
def model_source(source: Path) -> Iterator[ModelSource]:
    """Opens a checkpoint of a full run, or a model folder of either format.

    Raises:
        CheckpointError: a checkpoint that is not complete, or of a LoRA run.
        ModelError: an adapter, or nothing of the kind.
    """
    if (source / MANIFEST).is_file():
        yield checkpoint_source(source)
        return
    if adapter_folder(source) is not None or (source / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{source}: an adapter is no model by itself → `higgs-engine merge` it into its base first.")
    files = WeightFiles(source)
    with tempfile.TemporaryDirectory() as scratch:
        copy_side_files(files, Path(scratch))
        whisper, _ = whisper_source.resolve("auto", files)
        tower = "its audio tower, which it was trained without" if files.tower_shapes and whisper is None else None
        tensors = files if whisper is None else _Both(files, whisper)
        yield ModelSource(
            side_files=Path(scratch), shapes=dict(files.shapes), read=tensors.read,
            stored=lambda name: tensors.read(name, 0, 0).dtype, computed=None, whisper=whisper, left_out=tower,
        )  # fmt: skip


class _Both:
    """Weights and conditioning under one `read`."""

    def __init__(self, files: WeightFiles, whisper: WhisperSource):
        self.files, self.whisper = files, whisper

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return (self.whisper if name in self.whisper.shapes else self.files).read(name, start, stop)


def checkpoint_source(checkpoint: Path) -> ModelSource:
    """The model within the checkpoint of a full run.

    Raises:
        CheckpointError: the checkpoint is not complete, or of a LoRA run.
    """
    manifest = read_manifest(checkpoint)
    if manifest.use_lora:
        raise CheckpointError(
            f"{checkpoint}: the checkpoint of a LoRA run holds an adapter, no model → `higgs-engine merge` it first."
        )
    settings = Settings.from_yaml(checkpoint / "config.yaml")
    weights = StoredWeights(checkpoint, manifest)
    own = {name: shape for name, shape in weights.shapes.items() if name.startswith(WHISPER)}
    return ModelSource(
        side_files=checkpoint / MODEL_FILES,
        shapes={name: shape for name, shape in weights.shapes.items() if name not in own},
        read=weights.read,
        stored=None,
        computed=torch.bfloat16 if settings.bf16 else torch.float32,
        whisper=_checkpoint_whisper(checkpoint, weights, own),
        run=(manifest, settings),
    )


def _checkpoint_whisper(
    checkpoint: Path, weights: StoredWeights, shapes: dict[str, tuple[int, ...]]
) -> WhisperSource | None:
    folder = checkpoint / whisper_source.FOLDER
    if not folder.is_dir():
        return None

    def read(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return weights.read(name)[start:stop]

    width = weights.shapes["model.norm.weight"][0]
    config, extractor = WhisperConfig.from_pretrained(folder), WhisperFeatureExtractor.from_pretrained(folder)
    return WhisperSource(str(folder), config, extractor, shapes, read, width)
