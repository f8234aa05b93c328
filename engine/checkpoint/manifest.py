"""What a checkpoint says of itself: what it is of, and every file with its size and hash.

The manifest is written last. A checkpoint whose files agree with it is complete; the hashes, ordinary SHA-256, tell
a flipped bit from what was saved, and `sha256sum` can recheck them without this engine.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from engine import __version__
from engine.errors import CheckpointError
from engine.untrusted import MOST_BYTES, parse_object, path_within

FORMAT = 2
MANIFEST = "manifest.json"
SEAL = "sha256"
"""Under this name a manifest keeps the hash of all else that it says."""
CHUNK = 1 << 22


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's description.

    Attributes:
        step: optimizer steps done; with `plan`, which fixes the steps, it is the position in the data.
        epoch: of the last step done.
        backend, world_size: what wrote it; neither limits what can read it.
        base: fingerprint of the base model, whose weights a LoRA checkpoint does not hold.
        plan: what fixes the order of the data and the size of the steps.
        settings: those of the run, resolved.
        shapes: of every weight stored, by parameter name.
        versions: of the engine and of the libraries.
        eval_loss: measured on the held-out data at this step, if it was.
        files: path within the checkpoint -> size and hash.
    """

    step: int
    epoch: int
    tokens_seen: int
    backend: str
    world_size: int
    use_lora: bool
    base: str
    plan: dict
    settings: dict
    versions: dict[str, str]
    eval_loss: float | None = None
    shapes: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """Sealed with a hash of itself, for nothing else tells whether the manifest is what was written."""
        content = asdict(self)
        return _text(content | {SEAL: _seal(content)})


def _text(content: dict) -> str:
    return json.dumps(content, indent=1, default=str)


def _seal(content: dict) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def parse_manifest(text: str, source: Path) -> Manifest:
    """Raises CheckpointError: not a manifest, or of another format than this version reads."""
    try:
        raw = parse_object(text)
    except ValueError as error:
        raise CheckpointError(f"{source}: damaged ({error}) → take another checkpoint.") from None
    found = raw.get("format")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "update the engine" if newer else "take a checkpoint of this version, or the version that wrote it"
        raise CheckpointError(f"{source.parent}: checkpoint format {found}, this version reads {FORMAT} → {remedy}.")
    if raw.pop(SEAL, None) != _seal(raw):
        raise CheckpointError(
            f"{source}: changed since it was saved (its SHA-256 is another) → take another checkpoint."
        )
    known = {entry.name: entry.type for entry in fields(Manifest)}
    problems = [f"{name} is unknown" for name in raw.keys() - known.keys()]
    problems += [f"{name} is missing" for name in known.keys() - raw.keys()]
    try:
        raw["files"] = {path_within(name): File(**entry) for name, entry in raw["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problems.append(f"files: {error}")
    else:
        problems += [f"{name} is of another kind" for name in raw.keys() & known if not _fits(raw[name], known[name])]
    if problems:
        raise CheckpointError(f"{source}: damaged → take another checkpoint:", sorted(problems))
    return Manifest(**raw)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a field's type. Numbers of things are not below 0, and fit into 64 bits."""
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 63
    if kind is float:
        return type(value) in (int, float)
    if kind is File:
        return _fits(value.bytes, int) and _fits(value.sha256, str)
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in inner)
    if get_origin(kind) is list:
        return type(value) is list and all(_fits(one, inner[0]) for one in value)
    if get_origin(kind) is dict:
        return type(value) is dict and all(_fits(one, inner[1]) for one in value.values())
    return type(value) is kind


def load_manifest(folder: Path) -> Manifest:
    """The manifest alone, without a look at the files.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    file = Path(folder) / MANIFEST
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise CheckpointError(f"{file}: larger than {MOST_BYTES >> 20} MiB, so it is no manifest.")
        return parse_manifest(text, file)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST} there → it is not a complete checkpoint.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}).") from None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there in full (their content is not read).

    Raises:
        CheckpointError: as load_manifest; or files are missing or have another size (named).
    """
    manifest = load_manifest(folder)
    raise_damaged(folder, size_problems(folder, manifest))
    return manifest


def raise_damaged(folder: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{folder}: the checkpoint is damaged:", problems)


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, entry in manifest.files.items():
        file = Path(folder) / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry.bytes:
            problems.append(f"{name} has {file.stat().st_size:,} bytes instead of {entry.bytes:,}")
    return problems


def content_problems(
    folder: Path, manifest: Manifest, names: Iterable[str] | None = None, read: Callable[[int], object] = lambda n: None
) -> list[str]:
    """Files whose content is not what was saved.

    Args:
        names: which to look at; None: all.
        read: told of every stretch of bytes read, for a progress bar.
    """
    problems = []
    for name in manifest.files if names is None else names:
        try:
            if hash_file(Path(folder) / name, read) != manifest.files[name].sha256:
                problems.append(f"{name} has changed since it was saved (its SHA-256 is another)")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest does not know."""
    found = {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}
    return sorted(found - manifest.files.keys() - {MANIFEST})


def versions() -> dict[str, str]:
    """Of the engine, of Python, and of the libraries on which numbers depend."""
    found = {"higgs-engine": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hash_file(file: Path, read: Callable[[int], object] = lambda n: None) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(view[:count])
            read(count)
    return digest.hexdigest()


def describe_files(folder: Path, names: Collection[str]) -> dict[str, File]:
    """Sizes and hashes of files just written, which are also brought safely to the disk."""
    described = {}
    for name in sorted(names):
        sync(folder / name)
        described[name] = File((folder / name).stat().st_size, hash_file(folder / name))
    return described


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}.tmp")
    draft.write_text(text)
    sync(draft)
    os.replace(draft, file)
