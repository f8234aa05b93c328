"""A checkpoint is complete or absent: reserve a hidden folder, write, verify, rename into place, point, prune.

    checkpoint-100/
      manifest.json         every file with size and hash; step, settings, data plan, versions
      config.yaml           the resolved settings
      model_files/          config, tokenizer and so on of the model: what an export needs beside the weights
      lora_adapters/        LoRA runs: the adapter as PEFT loads it
      whisper_conditioning/ runs with a Whisper encoder: its configurations
      tensors/              weights and optimizer state, each process's part
      rng/rank-0.pt …       random state of each process
    latest, best            names of the newest checkpoint, and of the one with the lowest held-out loss

A killed run leaves at most a hidden `.checkpoint-N.incomplete` or `.checkpoint-N.removed`, which the next save
clears. A folder that has the final name was whole when it got it. Who writes what, and when, is saver.py's part.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    content_problems,
    load_manifest,
    raise_damaged,
    read_manifest,
    sync,
    write_atomically,
)
from engine.config import FIELDS
from engine.errors import CheckpointError
from engine.runtime.distributed import World, on_main

MODEL_FILES = "model_files"
NAME = re.compile(r"^checkpoint-(\d+)$")
FREE = ("lora_adapter_path", "lora_dropout")
"""Settings of what is trained that a resumed run may change: where adapters started, and how they are regularised."""
SPARE_BYTES = 64 << 20
"""Room for what lies beside the tensors: tokenizer, configurations, manifest."""


def checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [p for p in output_dir.iterdir() if NAME.match(p.name)] if output_dir.is_dir() else []
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(NAME.match(folder.name).group(1))


# ---------------------------------------------------------------- finding one


def find(
    resume: str, output_dir: Path, world: World, log: Callable[[str], None], again: bool = False
) -> Path | None:  # fmt: skip
    """The checkpoint to resume from; every process calls it and gets the same answer.

    Its files are read in full, each process a part of them, and compared with their hashes.

    Args:
        resume: `none`; `auto`: the newest complete one of the output folder, if there is any; or a folder.
        again: this process was started again by its launcher; if any was, the run goes on as with `auto`.

    Raises:
        CheckpointError: the one asked for is damaged, or not the last of the output folder; or there are some,
            but none is complete.
    """
    candidates = on_main(world, lambda: checkpoints(output_dir))
    if candidates and _any(world, again):
        resume = "auto"
    if resume == "none":
        return None
    if resume != "auto":
        raise_damaged(Path(resume), _problems_of(Path(resume), world))
        step = load_manifest(Path(resume)).step
        if later := [folder.name for folder in candidates if step_of(folder) > step]:
            raise CheckpointError(
                f"{output_dir} holds checkpoints after {Path(resume).name} ({', '.join(later)}), which this run would "
                "replace → resume with auto, or give another --output_dir to branch off."
            )
        return Path(resume)
    for folder in reversed(candidates):
        problems = _problems_of(folder, world)
        if not problems:
            return folder
        log(f"passed over {folder.name}: " + "; ".join(problems))
    if candidates:
        raise CheckpointError(
            f"{output_dir}: none of its {len(candidates)} checkpoint(s) is complete (see above) → move them away to "
            "start afresh, or restore their files."
        )
    return None


def _any(world: World, flag: bool) -> bool:
    votes = torch.tensor(int(flag))
    if world.size > 1:
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
    return bool(votes)


def _problems_of(folder: Path, world: World) -> list[str]:
    """What all processes together find wrong with a checkpoint."""
    try:
        manifest = read_manifest(folder)
        problems = content_problems(folder, manifest, sorted(manifest.files)[world.rank :: world.size])
    except CheckpointError as error:
        problems = error.problems or [error.heading]
    if world.size > 1:
        everywhere: list[list[str]] = [[] for _ in range(world.size)]
        torch.distributed.all_gather_object(everywhere, problems)
        problems = [problem for found in everywhere for problem in found]
    return list(dict.fromkeys(problems))


def require_same_run(found: Manifest, present: Manifest, folder: Path) -> None:
    """Raises CheckpointError unless resuming goes on with the same steps of the same training.

    The number of processes and the backend may differ, and so may how it is optimised (see `changes`).
    """
    pairs = {"use_lora": (found.use_lora, present.use_lora)}
    pairs |= {key: (was, present.plan.get(key)) for key, was in found.plan.items()}
    pairs |= {name: pair for name, pair in changes(found, present, "Trained parameters") if name not in FREE}
    problems = [f"{key}: was {was}, is {now} → resume with the same" for key, (was, now) in pairs.items() if was != now]
    if found.use_lora and found.base != present.base:
        problems.append("model_path: holds other weights than the base of this adapter → give that base")
    if problems:
        raise CheckpointError(
            f"{folder} cannot be resumed by this run (to train on from its weights, `higgs-engine consolidate` it "
            "and give the result as model_path, or an adapter as lora_adapter_path):",
            problems,
        )


def changes(found: Manifest, present: Manifest, group: str) -> Iterator[tuple[str, tuple[object, object]]]:
    """Settings of a group that are not those of the checkpoint: name, what it was, what it is."""
    for name, field in FIELDS.items():
        was, now = (manifest.settings.get(name) for manifest in (found, present))
        if field.metadata["group"] == group and was != now:
            yield name, (was, now)


# ---------------------------------------------------------------- writing one (main process)


def reserve(output_dir: Path, step: int, needed: int) -> Path:
    """An empty hidden folder for a checkpoint of `needed` bytes; what killed saves left is cleared away.

    Raises:
        CheckpointError: the disk has no room for it.
        OSError: the output folder is gone or cannot be written.
    """
    for left in [*output_dir.glob(".checkpoint-*.incomplete"), *output_dir.glob(".checkpoint-*.removed")]:
        shutil.rmtree(left)
    free = shutil.disk_usage(output_dir).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            f"{output_dir}: a checkpoint needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free → make room, "
            "or lower save_total_limit."
        )
    draft = output_dir / f".checkpoint-{step}.incomplete"
    draft.mkdir()
    return draft


def publish(draft: Path, manifest: Manifest, output_dir: Path) -> Path:
    """Writes the manifest of a whole draft, checks the draft against it, gives it its name and moves the pointers."""
    (draft / MANIFEST).write_text(manifest.to_json())
    sync(draft / MANIFEST)
    read_manifest(draft)
    for folder in {draft, *(p for p in draft.rglob("*") if p.is_dir())}:
        sync(folder)
    final = output_dir / f"checkpoint-{manifest.step}"
    if final.exists():  # damaged, or the run would have resumed from it
        remove(final)
    os.rename(draft, final)
    sync(output_dir)
    write_atomically(output_dir / "latest", final.name)
    if best := _best(output_dir):
        write_atomically(output_dir / "best", best.name)
    return final


def _best(output_dir: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, the later of equals; None if none was evaluated."""
    losses = {}
    for folder in checkpoints(output_dir):
        try:
            manifest = load_manifest(folder)
        except CheckpointError:
            continue  # a damaged one is nobody's best
        if manifest.eval_loss is not None:
            losses[folder] = (manifest.eval_loss, -manifest.step)
    return min(losses, key=losses.get) if losses else None


def pointer(output_dir: Path, name: str) -> str | None:
    """The checkpoint that `latest` or `best` names."""
    file = output_dir / name
    return file.read_text().strip() if file.is_file() else None


def prune(output_dir: Path, limit: int | None, keep_every: int | None) -> list[Path]:
    """Removes all but the newest `limit`; never one that a pointer names or whose step `keep_every` divides.

    Call it when a new one was just published: that one, which `latest` names, is complete.
    """
    if limit is None:
        return []
    kept = {pointer(output_dir, name) for name in ("latest", "best")}
    free_to_go = [
        folder
        for folder in checkpoints(output_dir)
        if folder.name not in kept and not (keep_every and step_of(folder) % keep_every == 0)
    ]
    doomed = free_to_go[: max(0, len(free_to_go) + 1 - limit)]
    for folder in doomed:
        remove(folder)
    return doomed


def remove(folder: Path) -> None:
    """Renamed first: a removal that is cut short leaves no half checkpoint under a final name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


# ---------------------------------------------------------------- random state


def random_state(world: World) -> dict[str, torch.Tensor]:
    """torch's generators, the only ones that training draws from (dropout); the plan has its own, by seed and epoch."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def random_state_file(world: World) -> str:
    return f"rng/rank-{world.rank}.pt"


def restore_random_state(folder: Path, manifest: Manifest, world: World) -> bool:
    """Whether it was restored: only the same number of processes can draw the same numbers again."""
    if manifest.world_size != world.size:
        return False
    state = torch.load(folder / random_state_file(world), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)
    return True
