"""From a checkpoint to weights that load everywhere: no GPU, no processes, a tensor in memory at a time.

A full run's checkpoint becomes a model folder, a LoRA run's an adapter folder (merge it with `higgs-engine merge`).
Either gets the run's Whisper conditioning, if it had one, as a folder of its own. What a LoRA run did not train of it
is not in its checkpoints and is read, as its base is, from where the run had it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint.manifest import Manifest, read_manifest
from engine.checkpoint.stored import StoredWeights
from engine.config import Settings
from engine.errors import CheckpointError
from engine.export.adapters import write_adapter
from engine.export.export import write_native
from engine.export.model_folder import DTYPES, drafted
from engine.export.model_source import checkpoint_source, write_conditioning
from engine.export.shards import MAX_SHARD_SIZE, parse_size
from engine.model import whisper_source
from engine.model.keys import WHISPER, base_name
from engine.model.weights import WeightFiles


def consolidate(
    checkpoint: Path,
    out: Path,
    dtype: str | None = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    say: Callable[[str], None] = print,
) -> str:
    """Writes the weights of a checkpoint and verifies them; replaces what stands at `out`.

    Args:
        dtype: float32, bfloat16 or float16; auto: what the run computed in; None: bfloat16. For adapters, which are
            small and merged in fp32, both mean float32. The fp32 masters are rounded to it once, to nearest.
        max_shard_size: of a file of a model, as 5GB.
        say: is told what is written and what was verified.

    Returns:
        What was written: "model" or "adapter".

    Raises:
        CheckpointError: the checkpoint is not complete, or what was written is not what it holds.
        ConfigError: `max_shard_size` is no size.
        ModelError: the Whisper encoder of a LoRA run is no longer where the run had it.
    """
    max_bytes = parse_size(max_shard_size)
    manifest = read_manifest(checkpoint)
    if not manifest.use_lora:
        write_native(checkpoint_source(checkpoint), out, dtype, max_bytes, say)
        return "model"
    settings = Settings.from_yaml(checkpoint / "config.yaml")
    _write_adapter(checkpoint, manifest, settings, out, DTYPES.get(dtype, torch.float32), say)
    return "adapter"


def _write_adapter(
    checkpoint: Path, manifest: Manifest, settings: Settings, out: Path, dtype: torch.dtype, say: Callable[[str], None]
) -> None:
    weights = StoredWeights(checkpoint, manifest)
    with drafted(out) as draft:
        summary = write_adapter(weights, draft, checkpoint / "adapter_config.json", settings, dtype)
        if (checkpoint / whisper_source.FOLDER).is_dir():
            _write_whisper(checkpoint, weights, settings, dtype, draft)
    say(f"verified: {summary}")


def _write_whisper(
    checkpoint: Path, weights: StoredWeights, settings: Settings, dtype: torch.dtype, draft: Path
) -> None:
    """The conditioning beside an adapter: what was trained of it in `dtype`, the rest as it was."""
    trained = {base_name(name): name for name in weights.shapes if base_name(name).startswith(WHISPER)}
    elsewhere = _untrained_whisper(settings)
    shapes = elsewhere.shapes | {name: weights.shapes[stored] for name, stored in trained.items()}
    dtypes = {name: dtype if name in trained else elsewhere.read(name, 0, 0).dtype for name in shapes}

    def read(name: str) -> torch.Tensor:
        return weights.read(trained[name]) if name in trained else elsewhere.read(name)

    shutil.copytree(checkpoint / whisper_source.FOLDER, draft / whisper_source.FOLDER)
    write_conditioning(draft / whisper_source.FOLDER, shapes, read, dtypes)


def _untrained_whisper(settings: Settings) -> whisper_source.WhisperSource:
    setting, base = settings.whisper_conditioning, settings.model_path
    source, why = whisper_source.resolve(setting, WeightFiles(base))
    if source is None:
        raise CheckpointError(f"{base}: the run had its Whisper encoder from there ({why}) → put it back there.")
    return source
