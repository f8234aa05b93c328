"""The weights of a model folder as transformers writes them: one safetensors file, or shards with an index."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.safetensors_writer import Spec, write_safetensors

MAX_SHARD_SIZE = "5GB"
INDEX = "model.safetensors.index.json"
UNITS = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)}


def parse_size(text: str) -> int:
    """Bytes of a size as transformers writes it: 5GB, 500MB, 2GiB.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if not size:
        raise ConfigError(f"max_shard_size: {text!r} is no size → write it as 5GB, 500MB or 2GiB.")
    return size


def write_shards(
    folder: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], torch.Tensor],
    max_bytes: int,
    stored_name: Callable[[str], str] = lambda name: name,
) -> dict[str, int]:
    """Writes all tensors into `folder`, one in memory at a time. On a terminal a bar shows how far it is.

    Args:
        specs: name -> shape and dtype; their order is that of the files.
        read: gives one tensor by its name in `specs`.
        max_bytes: of a file; a larger tensor gets one of its own.
        stored_name: name in the files.

    Returns:
        name -> checksum of what was written.
    """
    shards = plan_shards(specs, max_bytes)
    total = sum(spec.bytes for spec in specs.values())
    index, checksums = {}, {}
    with tqdm(total=total, desc="write", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shown = {stored_name(name): name for name in names}

            def read_shown(stored: str, shown: dict[str, str] = shown) -> torch.Tensor:
                bar.update(specs[shown[stored]].bytes)
                return read(shown[stored])

            stored = {key: specs[name] for key, name in shown.items()}
            written = write_safetensors(folder / file, stored, read_shown)
            checksums |= {name: written[key] for key, name in shown.items()}
            index |= dict.fromkeys(shown, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=1))
    return checksums


def plan_shards(specs: Mapping[str, Spec], max_bytes: int) -> list[list[str]]:
    """Names of each file's tensors, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.bytes
    return shards
