"""Writes model folders that unmodified transformers loads: safetensors shards, config, and everything beside them.

Folders are written under a hidden name, reopened and compared with what the configuration asks for, and only then
renamed: a folder that exists is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, HiggsAudioV2Config

from engine.errors import CheckpointError, ConfigError
from engine.model.initial import build_on_meta
from engine.model.weights import WeightFiles

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9


def copy_side_files(files: WeightFiles, folder: Path) -> None:
    """Tokenizer, processor, chat template, licence and configurations of the base model, in the native format."""
    for file in sorted(files.folder.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
            shutil.copyfile(file, folder / file.name)  # not its mode: a base model is often read-only
    files.config.architectures = ["HiggsAudioV2ForConditionalGeneration"]
    files.config.save_pretrained(folder)
    if files.format == "original" or not (folder / "generation_config.json").is_file():
        generation_defaults(files.config).save_pretrained(folder)


def generation_defaults(config: HiggsAudioV2Config) -> GenerationConfig:
    """How the released native model generates (its generation_config.json), with this model's ids."""
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=50, top_p=0.95, ras_win_len=7, ras_win_max_num_repeat=2,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
        _from_model_config=False,  # else loading it drops the ras_* settings
    )  # fmt: skip


def write_model_folder(
    out: Path,
    side_files: Path,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    add: Callable[[Path], None] | None = None,
) -> None:
    """A complete model folder at `out`, a shard in memory at a time; replaces what stands there.

    Args:
        side_files: folder with config.json and the rest; all of it is copied.
        shapes: name -> shape of all weights, native names.
        read: gives one weight, in any floating dtype; it is rounded once, to `dtype`.
        add: puts further files into the folder before it gets its final name.
    """
    draft = reserve(out)
    for file in side_files.iterdir():
        shutil.copyfile(file, draft / file.name)
    _set_dtype(draft / "config.json", dtype)
    shards = _plan_shards(shapes, dtype)
    index = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read(name).to(dtype).contiguous() for name in names}
        save_file(tensors, draft / file, metadata={"format": "pt"})
        shutil.copymode(draft / "config.json", draft / file)  # safetensors shuts out everybody but the owner
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(_numel(shape) for shape in shapes.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (draft / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    if add is not None:
        add(draft)
    _check(draft)
    publish(draft, out)


def require_free(out: Path) -> None:
    """Raises ConfigError if `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty → give another output folder, or remove it.")


def reserve(out: Path) -> Path:
    """An empty hidden folder beside `out`, to be published as `out` when it is complete."""
    draft = out.with_name(f".{out.name}.incomplete")
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    return draft


def publish(draft: Path, out: Path) -> None:
    """Gives a complete folder its final name; one that stood there before goes only now."""
    old = out.with_name(f".{out.name}.replaced")
    if out.exists():
        os.rename(out, old)
    os.rename(draft, out)
    shutil.rmtree(old, ignore_errors=True)


def _plan_shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = _numel(shape) * dtype.itemsize
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _numel(shape: Iterable[int]) -> int:
    return torch.Size(shape).numel()


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2))


def _check(folder: Path) -> None:
    """Reopens what was written and compares every name and shape with what its config.json asks for."""
    files = WeightFiles(folder)
    try:
        files.check({name: tuple(p.shape) for name, p in build_on_meta(files.config).named_parameters()})
    except Exception as error:
        raise CheckpointError(f"{folder}: what was written is not what the model needs: {error}") from None
