"""The weights of a checkpoint that DeepSpeed wrote, of any program: a model folder out of them.

Universal checkpoints hold a file for each parameter. ZeRO's shards are put together by DeepSpeed's own zero_to_fp32.
Both are pickles, which could run any code when they are read: torch reads them as data, with exactly those classes
of DeepSpeed that it puts into them, and whatever else is in a file makes it refused.
"""

import contextlib
import io
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.checkpoint.manifest import MANIFEST
from engine.errors import CheckpointError
from engine.export.model_folder import DTYPES, copy_side_files, require_free, write_model_folder
from engine.model.keys import native_name
from engine.model.weights import WeightFiles

Read = Callable[[], torch.Tensor]
FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
PREFIXES = ("module.", "model.")
"""What trainers' wrappers put before every name."""


def to_model(checkpoint: Path, base: WeightFiles, out: Path, dtype: str = "auto") -> None:
    """Writes a model folder into the new folder `out`: weights of a DeepSpeed checkpoint, the rest of its base model.

    Args:
        checkpoint: the folder that save_checkpoint was given, or the one of a tag in it.
        base: the model that was trained. What the program froze, and its checkpoint lacks, is taken from it.
        dtype: of DTYPES; auto: that of the base model.

    Raises:
        CheckpointError: the folder is no DeepSpeed checkpoint, holds code, or is of another model.
        ConfigError: `out` holds something already.
    """
    require_free(out)
    found = dict(_named(checkpoint, base))
    chosen = {name: DTYPES.get(dtype) or base.read(name, 0, 1).dtype for name in base.shapes}

    def read(name: str) -> torch.Tensor:
        return found[name]() if name in found else base.read(name)

    with tempfile.TemporaryDirectory() as side:
        copy_side_files(base, Path(side))
        print(f"{len(found)} weights of {checkpoint}, {len(base.shapes) - len(found)} of {base.folder}")
        write_model_folder(out, Path(side), base.shapes, read, chosen)


def _named(checkpoint: Path, base: WeightFiles) -> Iterator[tuple[str, Read]]:
    """Native name of each weight, and how to read it.

    Raises:
        CheckpointError: weights that are not the base model's, by name or shape; all are listed.
    """
    folder = _tagged(checkpoint)
    stored = _universal(folder) if (folder / "zero").is_dir() else _shards(folder)
    names = {name: _native(name, base) for name in stored}
    problems = [f"{name} is no weight of {base.folder}" for name, native in names.items() if native is None]
    for name, native in names.items():
        shape = stored[name][0]
        if native is not None and shape != base.shapes[native]:
            problems.append(f"{name} has shape {shape}, {base.shapes[native]} in {base.folder}")
    if problems:
        hint = "merge its adapters with PEFT first" if any(".lora_" in name for name in stored) else "give its own base"
        raise CheckpointError(f"{folder}: not a checkpoint of this base model → {hint}:", problems)
    return ((names[name], read) for name, (_, read) in stored.items())


def _native(name: str, base: WeightFiles) -> str | None:
    """A program's name of a weight, of either format and perhaps wrapped, as transformers' model has it."""
    candidates = [name] + [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    for candidate in candidates:
        for native in (candidate, native_name(candidate)):
            if native in base.shapes:
                return native
    return None


def _tagged(checkpoint: Path) -> Path:
    """The folder of the tag that a checkpoint folder names, or that folder itself."""
    if (checkpoint / MANIFEST).is_file():
        raise CheckpointError(f"{checkpoint}: of this engine, not of DeepSpeed → higgs-engine consolidate or export.")
    for name in ("latest_universal", "latest"):
        if (checkpoint / name).is_file():
            tag = (checkpoint / name).read_text().strip()
            if (checkpoint / tag).is_dir() and tag == Path(tag).name != "..":
                return checkpoint / tag
    if (checkpoint / "zero").is_dir() or list(checkpoint.glob("*_optim_states.pt")):
        return checkpoint
    raise CheckpointError(
        f"{checkpoint}: no DeepSpeed checkpoint of ZeRO there → give the folder that save_checkpoint wrote to."
    )


Stored = dict[str, tuple[tuple[int, ...], Read]]


def _universal(folder: Path) -> Stored:
    """Parameter name -> shape and how to read it, of a universal checkpoint."""
    stored: Stored = {}
    for file in sorted((folder / "zero").glob("*/fp32.pt")):
        shape = tuple(_tensor_of(file).shape)  # mapped, so nothing but its head is read
        stored[file.parent.name] = (shape, lambda file=file: _tensor_of(file))
    if not stored:
        raise CheckpointError(f"{folder}: zero/ holds no <parameter>/fp32.pt → convert it again by ds_to_universal.")
    return stored


def _tensor_of(file: Path) -> torch.Tensor:
    with _as_data(file):
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return content["param"] if isinstance(content, dict) else content


def _shards(folder: Path) -> Stored:
    """Likewise of ZeRO's shards, which stay on the disk until they are read."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with _as_data(folder), contextlib.redirect_stdout(io.StringIO()):
        tensors = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    floating = {name: tensor for name, tensor in tensors.items() if tensor.dtype.is_floating_point}
    return {name: (tuple(t.shape), t.contiguous) for name, t in floating.items() if not name.endswith("inv_freq")}


@contextlib.contextmanager
def _as_data(source: Path) -> Iterator[None]:
    """Within, torch.load runs no code, whoever calls it with whatever arguments.

    Raises:
        CheckpointError: a file holds something else than DeepSpeed puts there, or cannot be read.
    """
    was = os.environ.get(FORCE)
    os.environ[FORCE] = "1"  # also where DeepSpeed's own code asks for the contrary
    try:
        with torch.serialization.safe_globals(_deepspeed_records()):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's words is how to run it all the same
        raise CheckpointError(
            f"{source}: holds more than tensors and DeepSpeed's own records, and reading that could run any code"
            f"{f' ({named[1]})' if named else ''} → have the program that wrote it save its weights alone."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{source}: not a checkpoint that can be read ({error}) → take another.") from None
    finally:
        if was is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = was


def _deepspeed_records() -> list:
    """The classes of DeepSpeed whose instances its checkpoints hold."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:  # of universal checkpoints most hold none
        return []

    def member(enumeration: type, name: str):
        if enumeration is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"GLOBAL {enumeration}.{name}")
        return enumeration[name]

    # Python 3.11.0 to 3.11.3 pickles a member of an enumeration as an attribute: this one's may be asked for, no other
    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address, (member, "builtins.getattr")]
