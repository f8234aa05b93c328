"""Writes one safetensors file tensor by tensor, so that a file of 5 GB needs the memory of its largest tensor.

The library's own save_file wants all tensors at once, and makes files that nobody but their owner may read. The
format lets the header come first: eight bytes of its length, JSON with every tensor's dtype, shape and place, and then
the tensors' bytes, little-endian, one after the other. All of it is known before the first tensor is.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
METADATA = {"format": "pt"}
"""What transformers asks of a file before it loads it."""


@dataclass(frozen=True)
class Spec:
    """What a tensor will be."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(file: Path, specs: Mapping[str, Spec], read: Callable[[str], torch.Tensor]) -> dict[str, int]:
    """Writes the tensors in the order given, and returns when they are safely on the disk.

    Args:
        specs: name -> shape and dtype of every tensor.
        read: gives one, in any dtype; it is rounded once, to the dtype of its spec.

    Returns:
        name -> checksum (checksum_of) of what was written.

    Raises:
        CheckpointError: a tensor has another shape than its spec says.
    """
    checksums = {}
    with open(file, "wb") as out:
        out.write(_header(specs))
        for name, spec in specs.items():
            tensor = read(name)
            if tuple(tensor.shape) != tuple(spec.shape):
                raise CheckpointError(
                    f"{file}: {name} was to have shape {tuple(spec.shape)} and has {tuple(tensor.shape)} → the source "
                    "changed while it was read; start again."
                )
            content = _content(tensor.to(spec.dtype))
            del tensor  # of another dtype, it need not stay beside its rounded self
            out.write(content)
            checksums[name] = zlib.crc32(content)
        out.flush()
        os.fsync(out.fileno())
    return checksums


def checksum_of(tensor: torch.Tensor) -> int:
    """Of a tensor's bytes: equal for tensors that are equal bit for bit."""
    return zlib.crc32(_content(tensor))


def _content(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _header(specs: Mapping[str, Spec]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": METADATA}
    start = 0
    for name, spec in specs.items():
        end = start + spec.bytes
        entries[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight, as the format asks
    return len(text).to_bytes(8, "little") + text
