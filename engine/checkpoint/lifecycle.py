"""A checkpoint is complete or absent: reserve a hidden folder, write, verify, rename into place, point, prune.

    checkpoint-100/
      manifest.json         every file with its size; step, backend, number of processes, data and batch plan
      config.yaml           the resolved settings
      model_files/          config, tokenizer and so on of the model: what an export needs beside the weights
      adapter_config.json   LoRA runs
      whisper_conditioning/ runs with a Whisper encoder: its configurations
      tensors/ | deepspeed/ sharded weights and optimizer state
      rng/rank-0.pt …       random state of each process

A killed run leaves at most a hidden `.checkpoint-N.incomplete` or `.removed`, which the next save clears. A folder
that has the final name was whole when it got it.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.runtime.distributed import World, raise_together

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself. `plan`: what fixes the steps; `files`: relative path -> bytes."""

    step: int
    backend: str
    world_size: int
    use_lora: bool
    plan: dict
    tokens_seen: int = 0
    format: int = FORMAT
    files: dict[str, int] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there in full.

    Raises:
        CheckpointError: no manifest, another format, or files that are missing or have another size (all named).
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST} there → it is not a complete checkpoint.") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: damaged ({error}).") from None
    if raw.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {raw.get('format')}, this version reads {FORMAT}.")
    manifest = Manifest(**raw)
    problems = []
    for name, size in manifest.files.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size:,} bytes instead of {size:,}")
    if problems:
        raise CheckpointError(f"{folder}: the checkpoint is damaged:", problems)
    return manifest


def checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [p for p in output_dir.iterdir() if NAME.match(p.name)] if output_dir.is_dir() else []
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(NAME.match(folder.name).group(1))


def find(resume: str, output_dir: Path, log: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: None for `none`, and for `auto` where there is none yet.

    Raises:
        CheckpointError: a checkpoint asked for by path is not complete, or is not the last of the output folder.
    """
    if resume == "none":
        return None
    if resume != "auto":
        step = read_manifest(Path(resume)).step
        if later := [folder.name for folder in checkpoints(output_dir) if _step(folder) > step]:
            raise CheckpointError(
                f"{output_dir} holds checkpoints after {Path(resume).name} ({', '.join(later)}), which this run would "
                "replace → resume with auto, or give another --output_dir to branch off."
            )
        return Path(resume)
    for folder in reversed(checkpoints(output_dir)):
        try:
            read_manifest(folder)
            return folder
        except CheckpointError as error:
            log(f"passed over: {error}")
    return None


def require_same_run(found: Manifest, present: Manifest, folder: Path) -> None:
    """Raises CheckpointError unless resuming would go on exactly: same data, plan, backend and processes."""
    pairs = {
        "backend": (found.backend, present.backend, "resume with that backend"),
        "processes": (found.world_size, present.world_size, "start as many"),
        "use_lora": (found.use_lora, present.use_lora, "resume with the same"),
    }
    for key, was in found.plan.items():
        pairs[key] = (was, present.plan.get(key), "resume with the same")
    problems = [f"{key}: was {was}, is {now} → {remedy}" for key, (was, now, remedy) in pairs.items() if was != now]
    if problems:
        raise CheckpointError(
            f"{folder} cannot be resumed by this run (to train on from its weights, `higgs-engine consolidate` it "
            "and give the result as model_path):",
            problems,
        )


def save(
    output_dir: Path,
    manifest: Manifest,
    world: World,
    *,
    write_shards: Callable[[Path], None],
    write_once: Callable[[Path], None],
    keep: int | None,
) -> Path:
    """Saves one checkpoint; every process calls it. A failure on any process is raised on all.

    Args:
        write_shards: writes this process's part of model and optimizer into the folder (collective).
        write_once: writes what belongs to the run as a whole (main process only).
        keep: how many of the newest checkpoints to keep; None keeps all.
    """
    final = output_dir / f"checkpoint-{manifest.step}"
    draft = output_dir / f".checkpoint-{manifest.step}.incomplete"

    def reserve() -> None:
        for left in [*output_dir.glob(".checkpoint-*.incomplete"), *output_dir.glob(".checkpoint-*.removed")]:
            shutil.rmtree(left)
        (draft / "rng").mkdir(parents=True)

    def publish() -> None:
        write_once(draft)
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        sizes = {str(p.relative_to(draft)): p.stat().st_size for p in files}
        for file in files:
            _sync(file)
        write_atomically(draft / MANIFEST, json.dumps(asdict(manifest) | {"files": sizes}, indent=1))
        read_manifest(draft)
        if final.exists():  # damaged, or the run would have resumed from it
            _remove(final)
        os.rename(draft, final)
        _sync(output_dir)
        write_atomically(output_dir / "latest", final.name)
        others = [folder for folder in checkpoints(output_dir) if folder != final]
        for old in others[: max(0, len(others) + 1 - keep)] if keep else []:
            _remove(old)

    _together(world, reserve if world.is_main else None)
    _together(world, lambda: (write_shards(draft), torch.save(_random_state(world), draft / "rng" / _rng_file(world))))
    _together(world, publish if world.is_main else None)
    return final


def _together(world: World, action: Callable[[], object] | None) -> None:
    """Runs an action where there is one; all processes go on, or all fail."""
    error = None
    try:
        if action is not None:
            action()
    except OSError as disk:
        error = CheckpointError(f"Saving failed: {disk} → the last checkpoint is untouched.")
    except Exception as other:
        error = other
    raise_together(world, error)


def _remove(folder: Path) -> None:
    """Renamed first: a removal that is cut short leaves no half checkpoint under a final name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def write_atomically(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(text)
    _sync(draft)
    os.replace(draft, file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rng_file(world: World) -> str:
    return f"rank-{world.rank}.pt"


def _random_state(world: World) -> dict[str, torch.Tensor]:
    """torch's generators, the only ones that training draws from (dropout); the plan has its own, by seed and epoch."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def restore_random_state(folder: Path, world: World) -> None:
    state = torch.load(folder / "rng" / _rng_file(world), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)
