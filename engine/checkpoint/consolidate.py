"""From a sharded checkpoint of either backend to weights that load everywhere, without the world that wrote it.

A full run's checkpoint becomes a model folder, a LoRA run's an adapter folder (merge it with `higgs-engine merge`).
Either gets the run's Whisper conditioning, if it had one, as a folder of its own. What a LoRA run did not train of it
is not in its checkpoints and is read, as its base is, from where the run had it.
"""

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from engine.backends.tensors import FOLDER as TENSORS
from engine.backends.tensors import failures_in_words
from engine.checkpoint.lifecycle import Manifest, read_manifest
from engine.checkpoint.model_folder import DTYPES, publish, reserve, write_model_folder
from engine.config import Settings
from engine.errors import CheckpointError
from engine.model import whisper_source
from engine.model.keys import WHISPER, adapter_name, base_name
from engine.model.weights import WeightFiles

MODEL_FILES = "model_files"
"""Folder within a checkpoint: config, tokenizer and so on."""


class CheckpointWeights:
    """The fp32 weights of a checkpoint by parameter name, read one at a time where the backend's files allow it."""

    def __init__(self, folder: Path, manifest: Manifest):
        if manifest.backend == "deepspeed":
            from engine.backends.deepspeed import consolidated

            weights = consolidated(folder)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
            self.read: Callable[[str], torch.Tensor] = lambda name: weights[name].contiguous()
        else:
            self._folder = folder / TENSORS
            self._metadata = dcp.FileSystemReader(self._folder).read_metadata().state_dict_metadata
            names = [key.removeprefix("model.") for key in self._metadata if key.startswith("model.")]
            self.shapes = {name: tuple(self._metadata[f"model.{name}"].size) for name in names}
            self.read = self._read

    def _read(self, name: str) -> torch.Tensor:
        stored = self._metadata[f"model.{name}"]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with (
            failures_in_words("reading", self._folder),
            warnings.catch_warnings(),
        ):  # DCP warns that it loads alone, which is the point
            warnings.simplefilter("ignore")
            dcp.load({f"model.{name}": tensor}, storage_reader=dcp.FileSystemReader(self._folder), no_dist=True)
        return tensor


def consolidate(checkpoint: Path, out: Path, dtype: str = "auto") -> str:
    """Writes the weights of a checkpoint; replaces what stands at `out`.

    Args:
        dtype: float32, bfloat16, float16, or auto: float32 for adapters, which are small and merged in fp32; for
            models bfloat16 if the run computed in it, else float32.

    Returns:
        What was written: "model" or "adapter".

    Raises:
        CheckpointError: the checkpoint is not complete.
        ModelError: the Whisper encoder of a LoRA run is no longer where the run had it.
    """
    manifest = read_manifest(checkpoint)
    settings = Settings.from_yaml(checkpoint / "config.yaml")
    weights = CheckpointWeights(checkpoint, manifest)
    if dtype == "auto":
        dtype = "bfloat16" if settings.bf16 and not manifest.use_lora else "float32"
    add_whisper = partial(_write_whisper, checkpoint, weights, settings, DTYPES[dtype])
    if manifest.use_lora:
        _write_adapter(checkpoint, weights, out, settings, DTYPES[dtype], add_whisper)
        return "adapter"
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.startswith(WHISPER)}
    write_model_folder(out, checkpoint / MODEL_FILES, shapes, weights.read, DTYPES[dtype], add_whisper)
    return "model"


def _write_whisper(
    checkpoint: Path, weights: CheckpointWeights, settings: Settings, dtype: torch.dtype, draft: Path
) -> None:
    """Puts the run's Whisper conditioning, if any, into a folder: what was saved in `dtype`, the rest as it was."""
    described = checkpoint / whisper_source.FOLDER
    if not described.is_dir():
        return
    saved = {base_name(n): n for n in weights.shapes if base_name(n).startswith(WHISPER)}
    elsewhere = _untrained_whisper(settings) if settings.use_lora else None
    names = list(elsewhere.shapes | dict.fromkeys(saved) if elsewhere else saved)

    def read(name: str) -> torch.Tensor:
        return weights.read(saved[name]).to(dtype) if name in saved else elsewhere.read(name)

    shutil.copytree(described, draft / whisper_source.FOLDER)
    whisper_source.write_weights(draft / whisper_source.FOLDER, names, read)


def _untrained_whisper(settings: Settings) -> whisper_source.WhisperSource:
    setting, base = settings.whisper_conditioning, settings.model_path
    source, why = whisper_source.resolve(setting, WeightFiles(base))
    if source is None:
        raise CheckpointError(f"{base}: the run had its Whisper encoder from there ({why}) → put it back there.")
    return source


def _write_adapter(
    checkpoint: Path,
    weights: CheckpointWeights,
    out: Path,
    settings: Settings,
    dtype: torch.dtype,
    add: Callable[[Path], None],
) -> None:
    """PEFT's own format."""
    draft = reserve(out)
    names = [name for name in weights.shapes if not base_name(name).startswith(WHISPER)]
    tensors = {adapter_name(name): weights.read(name).to(dtype).contiguous() for name in names}
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty or not tensors:
        raise CheckpointError(f"{checkpoint}: the checkpoint holds no adapter weights:", empty)
    save_file(tensors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(checkpoint / "adapter_config.json", draft / "adapter_config.json")
    shutil.copymode(draft / "adapter_config.json", draft / "adapter_model.safetensors")
    (draft / "README.md").write_text(
        f"# LoRA adapter for Higgs Audio v2\n\nBase model: `{settings.model_path}`. Rank {settings.lora_rank}, alpha "
        f"{settings.lora_alpha:g}, targets {', '.join(settings.lora_target_modules)}.\n\n"
        "Merge: `higgs-engine merge --base_model_path BASE --lora_adapter_path THIS --output_path MERGED`\n"
    )
    add(draft)
    publish(draft, out)
