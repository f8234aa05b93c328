"""The model that `generate` is given, from wherever it lies: a model folder of either format, perhaps with an adapter,
or what a run left behind: its output folder, or a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.checkpoint.manifest import MANIFEST
from engine.config import Settings
from engine.errors import ModelError
from engine.evaluate.whole_model import put, ready
from engine.export.merged import MergedWeights
from engine.export.model_source import checkpoint_source
from engine.model.adapter_files import open_adapter
from engine.model.adapter_folder import SUBFOLDER, adapter_folder
from engine.model.initial import build_on_meta
from engine.model.weights import WeightFiles, load_config

RUN = "config.yaml"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's weights are.

    Attributes:
        base: a model folder, or the checkpoint of a full run.
        adapter: to be merged into it; None without.
        settings: of the run that it is from, if that can be told: they say in which turns it was trained.
    """

    base: Path
    adapter: Path | None = None
    settings: Settings | None = None

    @property
    def side_files(self) -> Path:
        """The folder with tokenizer, config.json and generation_config.json."""
        return checkpoint_source(self.base).side_files if (self.base / MANIFEST).is_file() else self.base

    def load(self, device: torch.device, dtype: torch.dtype) -> HiggsAudioV2ForConditionalGeneration:
        """The model, ready to generate; an adapter is merged in fp32, then rounded. A weight in memory at a time.

        Raises:
            ModelError, CheckpointError: it is not complete, or adapter and base do not belong together.
        """
        model = build_on_meta(load_config(self.side_files))
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        read = self._reader(expected)
        for name in expected:
            put(model, name, read(name).to(device, dtype))
        return ready(model, device)

    def _reader(self, expected: dict[str, tuple[int, ...]]):
        if (self.base / MANIFEST).is_file():
            return checkpoint_source(self.base).read
        files = WeightFiles(self.base)
        if self.adapter is not None:
            return MergedWeights(files, open_adapter(self.adapter)).read
        files.check(expected)
        return files.read


def find(model_path: Path, lora_adapter_path: Path | None = None) -> ModelFiles:
    """What is meant by the two paths; a LoRA run's own folder means its base and its adapter.

    Raises:
        ModelError: there is no model at `model_path`.
    """
    settings = _settings_of(lora_adapter_path or model_path)
    if not (model_path / RUN).is_file():
        return ModelFiles(model_path, lora_adapter_path, settings)
    if (model_path / MANIFEST).is_file() and not settings.use_lora:
        return ModelFiles(model_path, lora_adapter_path, settings)
    if (model_path / "model" / "config.json").is_file():
        return ModelFiles(model_path / "model", lora_adapter_path, settings)
    if adapter_folder(model_path):
        return ModelFiles(Path(settings.model_path), lora_adapter_path or model_path, settings)
    raise ModelError(f"{model_path}: the run has not handed over a model → give one of its checkpoint-N.")


def _settings_of(path: Path) -> Settings | None:
    """Of the run whose output folder, checkpoint, or final weights these are."""
    for folder in (path, path.parent) if path.name in ("model", SUBFOLDER) else (path,):
        if (folder / RUN).is_file():
            return Settings.from_yaml(folder / RUN)
    return None
