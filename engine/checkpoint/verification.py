"""Rechecks checkpoints: is everything there, is it what was saved, would every tensor be found in full.

A checkpoint was whole when it got its name; what may have happened since is a disk, a copy, a hand. So all is read
again and compared with the manifest, and the table of contents of the tensors with what the manifest says is stored.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata
from tqdm import tqdm

from engine.backends.guard import Guard
from engine.backends.tensors import FOLDER as TENSORS
from engine.backends.tensors import GUARD, Reader
from engine.backends.torch_optimizer import MOMENTS
from engine.checkpoint.lifecycle import NAME, pointer, step_of
from engine.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    content_problems,
    extra_files,
    load_manifest,
    raise_damaged,
    read_manifest,
    size_problems,
)
from engine.errors import CheckpointError
from engine.model.keys import WHISPER
from engine.model.weights import WeightFiles
from engine.observe.sizes import binary_size

CONTENTS = f"{TENSORS}/.metadata"
READERS = 4
"""Files that are hashed at once: one core hashes slower than most disks read."""


class Damaged(CheckpointError):
    """Checkpoints that did not pass; every problem of each is printed."""

    shown = sys.maxsize


@dataclass(frozen=True)
class Verdict:
    """What was found of one checkpoint.

    Attributes:
        name: as it is told to the user.
    """

    name: str
    bytes: int
    files: int
    problems: list[str]


def verify(path: Path, base: WeightFiles | None = None, say: Callable[[str], None] = print) -> None:
    """Rechecks a checkpoint, or every checkpoint below a folder. Says a line for each good one.

    Args:
        base: the model that they must be of: for adapters the very weights, for full runs the shapes.

    Raises:
        Damaged: what is wrong with any of them, all of it.
        CheckpointError: there is no checkpoint.
    """
    folders = [path] if _is_checkpoint(path) else sorted(_below(path), key=lambda p: (p.parent, step_of(p)))
    if not folders:
        raise CheckpointError(f"{path}: no checkpoint there or below → give output_dir, or a checkpoint-N in it.")
    manifests = {folder: _manifest(folder) for folder in folders}
    fingerprint = base and base.fingerprint()
    with _bar(manifests) as bar:
        verdicts = [
            _judged(folder, _shown(folder, path), manifest, base, fingerprint, bar.update)
            for folder, manifest in manifests.items()
        ]
    for verdict in verdicts:
        if not verdict.problems:
            say(f"{verdict.name}: complete, {binary_size(verdict.bytes)}, {verdict.files} files")
    if path not in folders:
        for line in _notes(path, folders):
            say(f"note: {line}")
    if problems := [f"{verdict.name}: {problem}" for verdict in verdicts for problem in verdict.problems]:
        bad = sum(1 for verdict in verdicts if verdict.problems)
        raise Damaged(
            f"{bad} of {len(verdicts)} checkpoint(s) cannot be relied on → restore them from a copy, or remove them "
            "and go on from another:",
            problems,
        )


def _is_checkpoint(path: Path) -> bool:
    return bool(NAME.match(path.name)) or (path / MANIFEST).is_file()


def _below(path: Path) -> Iterator[Path]:
    """Published checkpoints at any depth; hidden folders are drafts, and nothing within a checkpoint is one."""
    for folder, names, _ in os.walk(path):
        yield from (Path(folder, name) for name in names if NAME.match(name))
        names[:] = [name for name in names if not name.startswith(".") and not NAME.match(name)]


def _shown(folder: Path, asked: Path) -> str:
    return folder.name if folder == asked else str(folder.relative_to(asked))


def _manifest(folder: Path) -> Manifest | list[str]:
    """What a checkpoint says of itself, or why it says nothing."""
    try:
        return load_manifest(folder)
    except CheckpointError as error:
        text = error.heading.removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
        return [text, *error.problems]


def _bar(manifests: dict[Path, Manifest | list[str]]) -> tqdm:
    total = sum(sum(_intact(folder, m).values()) for folder, m in manifests.items() if isinstance(m, Manifest))
    return tqdm(
        total=total, desc="verify", unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty()
    )


def _intact(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Files that are there in their full size: name -> bytes. Of the others it is known that they are wrong."""
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    return {n: size for n, size in sizes.items() if (folder / n).is_file() and (folder / n).stat().st_size == size}


def _judged(
    folder: Path, name: str, manifest: Manifest | list[str], base: WeightFiles | None, fingerprint: str | None,
    read: Callable[[int], object],
) -> Verdict:  # fmt: skip
    if not isinstance(manifest, Manifest):
        return Verdict(name, 0, 0, manifest)
    problems = size_problems(folder, manifest)
    changed = _changed(folder, manifest, read)
    problems += [problem for found in changed.values() for problem in found]
    extra = extra_files(folder, manifest)
    problems += [f"{file} is not of this checkpoint, the manifest does not know it" for file in extra]
    if NAME.match(folder.name) and step_of(folder) != manifest.step:
        problems.append(f"{MANIFEST} says step {manifest.step} → the folder was renamed")
    if not changed.get(CONTENTS, CONTENTS in manifest.files):  # else it is known already that it cannot be trusted
        problems += _tensor_problems(folder, manifest)
    if base is not None:
        problems += _base_problems(manifest, base, fingerprint)
    size = sum(entry.bytes for entry in manifest.files.values()) + (folder / MANIFEST).stat().st_size
    return Verdict(name, size, len(manifest.files) + 1, problems)


def _changed(folder: Path, manifest: Manifest, read: Callable[[int], object]) -> dict[str, list[str]]:
    """What is wrong with the content of each file that has its full size."""
    names = _intact(folder, manifest)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(lambda n: content_problems(folder, manifest, [n], read), names), strict=True))


def require_intact(checkpoint: Path) -> None:
    """Before anything is made of a checkpoint: every file is there and has its hash.

    Raises:
        CheckpointError: files that have not are named.
    """
    manifest = read_manifest(checkpoint)
    with _bar({checkpoint: manifest}) as bar:
        changed = _changed(checkpoint, manifest, bar.update)
    raise_damaged(checkpoint, [problem for found in changed.values() for problem in found])


# ---------------------------------------------------------------- the tensors


def _tensor_problems(folder: Path, manifest: Manifest) -> list[str]:
    """What of the stored tensors could not be read back: the table of contents against the manifest."""
    try:
        contents = Reader(folder).metadata
    except CheckpointError as error:
        return [error.heading.removeprefix(f"{folder}/")]
    stored = {key: entry.size.numel() for key, entry in contents.state_dict_metadata.items()}
    shapes = {f"model.{name}": shape for name, shape in manifest.shapes.items()}
    problems = [f"{key} is not in {TENSORS}/" for key in shapes if key not in stored]
    if "step" not in stored:
        problems.append(f"step, the optimizer's counter, is not in {TENSORS}/")
    for key, numel in stored.items():
        kind, _, name = key.partition(".")
        wanted = {"step": 1, GUARD: Guard.SIZE}.get(key) or _numel(manifest.shapes.get(name))
        if wanted is None or kind not in ("model", *MOMENTS, "step", GUARD):
            problems.append(f"{key} is in {TENSORS}/, the manifest does not know it")
        elif numel != wanted:
            problems.append(f"{key} has {numel:,} elements instead of {wanted:,}")
        elif kind in MOMENTS and any(f"{other}.{name}" not in stored for other in MOMENTS):
            problems.append(f"{key} has no counterpart: the other of the optimizer's two moments is missing")
        problems += _gaps(key, numel, contents)
    return problems + _misplaced(contents, manifest)


def _numel(shape: list[int] | None) -> int | None:
    return None if shape is None else math.prod(shape)


def _gaps(key: str, numel: int, contents: Metadata) -> Iterator[str]:
    """Elements of a tensor that no chunk holds."""
    reached = 0
    for chunk in sorted(contents.state_dict_metadata[key].chunks, key=lambda chunk: chunk.offsets[0]):
        if chunk.offsets[0] > reached:
            yield f"{key}: elements {reached:,} to {chunk.offsets[0]:,} are stored nowhere"
        reached = max(reached, chunk.offsets[0] + chunk.sizes[0])
    if reached < numel:
        yield f"{key}: elements {reached:,} to {numel:,} are stored nowhere"


def _misplaced(contents: Metadata, manifest: Manifest) -> list[str]:
    """Chunks of which no file of the checkpoint holds all bytes."""
    problems = []
    chunks = {(key, chunk.offsets) for key, entry in contents.state_dict_metadata.items() for chunk in entry.chunks}
    placed = {(index.fqn, index.offset): place for index, place in contents.storage_data.items()}
    for key, offset in sorted(chunks):
        place = placed.get((key, offset))
        file = place and manifest.files.get(f"{TENSORS}/{place.relative_path}")
        if file is None or place.offset + place.length > file.bytes:
            problems.append(f"{key}: no file holds all of its part that begins at element {offset[0]:,}")
    return problems


# ---------------------------------------------------------------- other than itself


def _base_problems(manifest: Manifest, base: WeightFiles, fingerprint: str) -> list[str]:
    """Why a checkpoint is not one of this model."""
    if manifest.use_lora:
        if manifest.base == fingerprint:
            return []
        return [f"its adapters were trained on other weights than those of {base.folder} → give the base of the run"]
    shapes = {name: tuple(shape) for name, shape in manifest.shapes.items() if not name.startswith(WHISPER)}
    problems = [f"{name} is not in {base.folder}" for name in shapes if name not in base.shapes]
    problems += [f"{name} of {base.folder} is not in it" for name in base.shapes if name not in shapes]
    return problems + [
        f"{name} has shape {shape}, {base.shapes[name]} in {base.folder}"
        for name, shape in shapes.items()
        if name in base.shapes and base.shapes[name] != shape
    ]


def _notes(path: Path, folders: list[Path]) -> Iterator[str]:
    """What is no damage, and may be news: pointers that point nowhere, what killed saves left."""
    for parent in sorted({path, *(folder.parent for folder in folders)}):
        for name in ("latest", "best"):
            named = pointer(parent, name)
            if named is not None and not (parent / named).is_dir():
                yield f"{parent / name} names {named}, which is not there"
        for left in sorted([*parent.glob(".checkpoint-*.incomplete"), *parent.glob(".checkpoint-*.removed")]):
            yield f"{left} was left by a save or a removal that was killed; the next save clears it away"
