"""Writes model folders that the inference stacks load: safetensors shards, config, and everything beside them.

Folders are written under a hidden name, reopened and compared with their source, brought safely to the disk, and only
then renamed: a folder that exists is whole. What a killed attempt left behind, the next one clears.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, HiggsAudioV2Config

from engine.checkpoint.manifest import sync
from engine.errors import CheckpointError, ConfigError
from engine.export.original_format import KEPT_CONFIG, KEPT_GENERATION
from engine.export.reopened import verify_model
from engine.export.shards import MAX_SHARD_SIZE, parse_size, write_shards
from engine.model.safetensors_writer import Spec
from engine.model.weights import WeightFiles

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = parse_size(MAX_SHARD_SIZE)


@dataclass(frozen=True)
class Form:
    """How a model folder says what it holds; by itself, as transformers' native model does.

    Attributes:
        stored_name: name in the files of a tensor, by its native name.
        prepare: turns the native side files of a folder into its own.
    """

    stored_name: Callable[[str], str] = lambda name: name
    prepare: Callable[[Path], object] = lambda folder: None


def copy_side_files(files: WeightFiles, folder: Path) -> None:
    """Tokenizer, processor, chat template, licence and configurations of the base model, in the native format.

    Of a base in the original format its own two configurations are kept beside the native ones, for the way back.
    """
    for file in sorted(files.folder.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
            shutil.copyfile(file, folder / file.name)  # not its mode: a base model is often read-only
    if files.format == "original":
        for name, kept in (("config.json", KEPT_CONFIG), ("generation_config.json", KEPT_GENERATION)):
            if (folder / name).is_file():
                (folder / name).rename(folder / kept)
    files.config.architectures = ["HiggsAudioV2ForConditionalGeneration"]
    files.config.save_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
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
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    add: Callable[[Path], None] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    form: Form | None = None,
    logits: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """A complete, verified model folder at `out`, a tensor in memory at a time; replaces what stands there.

    Args:
        side_files: folder with config.json and the rest, native; all files of it are copied.
        shapes: name -> shape of all weights, native names.
        read: gives one weight, in any floating dtype, the same whenever it is asked; it is rounded once.
        dtype: of all weights, or of each.
        add: puts further files into the folder before it gets its final name.
        form: native, if not given.
        logits: compare those of the source with those of what was written; else bits only.
        say: is told what is written and what was verified.

    Raises:
        CheckpointError: no room, or what was written is not what the source holds.
    """
    form = form or Form()
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    specs = {name: Spec(tuple(shape), dtypes[name]) for name, shape in shapes.items()}
    with drafted(out) as draft:
        _require_room(out, specs)
        for file in side_files.iterdir():
            if file.is_file():
                shutil.copyfile(file, draft / file.name)
        form.prepare(draft)
        _set_dtype(draft / "config.json", dtypes["model.norm.weight"])
        say(f"writing {len(specs)} tensors, {sum(spec.bytes for spec in specs.values()) / 1e9:,.2f} GB, to {out}")
        checksums = write_shards(draft, specs, read, max_shard_bytes, form.stored_name)
        if add is not None:
            add(draft)
        say(verify_model(draft, specs, checksums, read if logits else None))


def require_free(out: Path) -> None:
    """Raises ConfigError if `out` holds something already, or is the folder that this is called from."""
    if os.path.abspath(out) == os.getcwd():
        raise ConfigError(f"{out} is the current folder, which cannot be replaced → give the name of a new one.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty → give another output folder, or remove it.")


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, which becomes `out` at the end, or goes if there was an error.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """
    out = Path(os.path.abspath(out))  # names may end in . or ..
    draft = out.with_name(f".{out.name}.incomplete")
    try:
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
        yield draft
        publish(draft, out)
    except OSError as error:
        raise CheckpointError(f"Writing {out} failed: {error} → make room there, or give another folder.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, out: Path) -> None:
    """Gives a complete folder its final name when it is safely on the disk; what stood there before goes only now.

    At every moment `out`, or else `.out.replaced` beside it, is a whole folder.
    """
    for path in [*draft.rglob("*"), draft]:
        sync(path)
    old = out.with_name(f".{out.name}.replaced")
    if out.exists():
        if old.exists():  # of an attempt that was killed when it had already put another in its place
            shutil.rmtree(old)
        os.rename(out, old)
    os.rename(draft, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _require_room(out: Path, specs: Mapping[str, Spec]) -> None:
    needed, free = sum(spec.bytes for spec in specs.values()), shutil.disk_usage(out.parent).free
    if needed > free:
        raise CheckpointError(
            f"{out}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free → make room, or give another "
            "folder or --dtype."
        )


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text())
    key = "dtype" if config["model_type"] == "higgs_audio_v2" else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True))
