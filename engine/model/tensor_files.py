"""Tensors in safetensors files under names of our own, read by rows, one file or shards, parts put together."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from engine.errors import ModelError
from engine.model.keys import is_second_part
from engine.untrusted import path_within, read_object


class TensorFiles:
    """Safetensors files shown as one set of named tensors. Slices come from memory-mapped files.

    A file is mapped anew for each tensor, which takes 0.1 ms, and unmapped when the tensor goes: what was read of a
    model would else stay resident, 11.5 GB of the released one.

    Args:
        files: the files, in order.
        rename: name here of a stored tensor, None for one that is not wanted.

    Attributes:
        shapes: name -> shape of each tensor.

    Raises:
        ModelError: a file is damaged.
    """

    def __init__(self, files: Iterable[Path], rename: Callable[[str], str | None]):
        self._parts: dict[str, list[tuple[str, str]]] = {}
        for file in files:
            self._index(file, rename)
        self.shapes = {name: self._shape(name) for name in self._parts}

    def _index(self, file: Path, rename: Callable[[str], str | None]) -> None:
        try:
            with safe_open(str(file), framework="pt") as opened:
                keys = opened.keys()
        except Exception as error:  # safetensors raises its own untyped error for damaged headers
            raise ModelError(f"{file}: not a readable safetensors file ({error}) → download it again.") from None
        for key in keys:
            name = rename(key)
            if name is not None:
                parts = self._parts.setdefault(name, [])
                parts.insert(len(parts) if is_second_part(key) else 0, (str(file), key))

    def _slices(self, name: str) -> list:
        return [safe_open(file, framework="pt").get_slice(key) for file, key in self._parts[name]]

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [tuple(part.get_shape()) for part in self._slices(name)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if all(shapes) else ()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (dim 0) of a tensor, in the stored dtype."""
        stop = self.shapes[name][0] if stop is None else stop
        rows, offset = [], 0
        for part in self._slices(name):
            size = part.get_shape()[0]
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                rows.append(part[low:high])
            offset += size
        if not rows:
            return self._slices(name)[0][0:0]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def weight_files(folder: Path, remedy: str) -> list[Path]:
    """The safetensors files of a folder as transformers writes them.

    Args:
        remedy: what to do if they are not there.

    Raises:
        ModelError: there are none, shards are missing (all named), or their names lead out of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index, remedy).get("weight_map")
        try:
            files = sorted({folder / path_within(name) for name in dict(names).values()})
        except (TypeError, ValueError) as error:
            raise ModelError(f"{index}: damaged, its weight_map names no files here ({error}) → {remedy}.") from None
        missing = [f"{f.name} is missing" for f in files if not f.is_file()]
        if missing:
            raise ModelError(f"{folder}: shards named in {index.name} are not there → {remedy}:", missing)
        return files
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json → {remedy}.")


def read_json(file: Path, remedy: str) -> dict:
    """A JSON file of a model folder.

    Raises:
        ModelError: it is not there (with the remedy), or no JSON object.
    """
    if not file.is_file():
        raise ModelError(f"{file.parent}: no {file.name} there → {remedy}.")
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not valid JSON ({error}) → download it again.") from None
