"""What is inside a checkpoint, a model folder or an adapter folder, as a table.

Of a checkpoint first what its manifest says: how far, of what, by what. Then the tensors, layers added up, or one by
one with what their values look like. Tensors are read one at a time.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from engine.backends.tensors import Reader
from engine.backends.torch_optimizer import MOMENTS
from engine.checkpoint.manifest import MANIFEST, Manifest, load_manifest, size_problems
from engine.config import Settings
from engine.errors import CheckpointError
from engine.model.adapter_folder import adapter_folder
from engine.observe.sizes import binary_size


@dataclass(frozen=True)
class Tensor:
    """A stored tensor.

    Attributes:
        moments: bytes of the optimizer's moments beside it.
        parts: what is stored of it: the tensor itself and, in a checkpoint, its moments; name -> how to read it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    moments: int
    parts: dict[str, Callable[[], torch.Tensor]]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def inspect(path: Path, each: bool = False) -> Iterator[str]:
    """Lines that show what is inside.

    Args:
        each: every tensor, read and measured, instead of groups.

    Raises:
        CheckpointError: it is none of the three, or cannot be read.
    """
    if (path / MANIFEST).is_file():
        manifest = load_manifest(path)
        yield from _header(path, manifest)
        yield ""
        tensors = _stored(path, manifest)
    else:
        tensors = _safetensors(path)
    yield from _measured(tensors) if each else _grouped(tensors)
    yield ""
    yield _total(tensors)


# ---------------------------------------------------------------- the run


def _header(folder: Path, manifest: Manifest) -> Iterator[str]:
    size = sum(entry.bytes for entry in manifest.files.values()) + (folder / MANIFEST).stat().st_size
    loss = "not evaluated" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}"
    rows = {
        "checkpoint": folder,
        "step": f"{manifest.step:,}, in epoch {manifest.epoch + 1}",
        "tokens seen": f"{manifest.tokens_seen:,}",
        "held-out loss": loss,
        "trained": "LoRA adapters" if manifest.use_lora else "weights of the model",
        "base": f"{manifest.settings.get('model_path')} (fingerprint {manifest.base[:12]})",
        "written by": f"{manifest.backend}, {manifest.world_size} process(es)",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "size": f"{binary_size(size)} in {len(manifest.files) + 1} files",
    }
    yield from (f"{name + ':':<15}{value}" for name, value in rows.items())
    if problems := size_problems(folder, manifest):
        yield f"{'DAMAGED:':<15}{'; '.join(problems[:3])}{' …' if problems[3:] else ''} → higgs-engine verify {folder}"
    yield ""
    yield "settings other than the defaults:"
    yield from _settings(manifest.settings)


def _settings(values: dict) -> Iterator[str]:
    """Those that a run was given or that were resolved for it."""
    defaults = json.loads(json.dumps(dataclasses.asdict(Settings()), default=str))
    for name, value in values.items():
        if value != defaults.get(name):
            yield f"  {name}: {json.dumps(value, ensure_ascii=False)}"


# ---------------------------------------------------------------- the tensors


def _stored(folder: Path, manifest: Manifest) -> list[Tensor]:
    reader = Reader(folder)
    stored = reader.metadata.state_dict_metadata
    missing = [f"{name} is not in it" for name in manifest.shapes if f"model.{name}" not in stored]
    if missing:
        raise CheckpointError(
            f"{folder}: tensors of the manifest are not stored → higgs-engine verify {folder}", missing
        )
    tensors = []
    for name, shape in manifest.shapes.items():
        keys = [key for key in (f"{kind}.{name}" for kind in ("model", *MOMENTS)) if key in stored]
        sizes = [stored[key].size.numel() * stored[key].properties.dtype.itemsize for key in keys]
        shown = [name, *keys[1:]]
        parts = {label: _reading(reader.tensor, key) for label, key in zip(shown, keys, strict=True)}
        tensors.append(Tensor(name, tuple(shape), stored[keys[0]].properties.dtype, sum(sizes[1:]), parts))
    return tensors


def _reading(read: Callable[[str], torch.Tensor], name: str) -> Callable[[], torch.Tensor]:
    return lambda: read(name)


def _safetensors(path: Path) -> list[Tensor]:
    """Those of a model folder of either format, under the names in its files, or of an adapter."""
    folder = adapter_folder(path) or path
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path}: neither {MANIFEST} nor *.safetensors there → give a checkpoint-N, a model or an adapter folder."
        )
    return [tensor for file in files for tensor in _of_file(file)]


def _of_file(file: Path) -> Iterator[Tensor]:
    try:
        with safe_open(str(file), framework="pt") as opened:
            heads = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            for name, head in heads.items():
                dtype = DTYPES.get(head.get_dtype())
                if dtype is None:
                    raise ValueError(f"{name} is of dtype {head.get_dtype()}")
                yield Tensor(name, tuple(head.get_shape()), dtype, 0, {name: _reading(_one_of(file), name)})
    except Exception as error:  # safetensors raises its own untyped error for damaged headers
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}) → take another copy.") from None


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _one_of(file: Path) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        with safe_open(str(file), framework="pt") as opened:  # anew, so that what was read is unmapped
            return opened.get_tensor(name)

    return read


# ---------------------------------------------------------------- the tables


def _grouped(tensors: list[Tensor]) -> Iterator[str]:
    """A line for the tensors that differ in nothing but the number of their layer."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        key = (re.sub(r"\.\d+(?=\.)", ".*", tensor.name), tensor.shape, tensor.dtype_name)
        groups.setdefault(key, []).append(tensor)
    rows = [("group", "count", "shape", "dtype", "parameters", "weights", "moments")]
    for (name, shape, dtype), members in groups.items():
        count, weights, moments = _sums(members)
        sizes = (binary_size(weights), binary_size(moments) if moments else "-")
        rows.append((name, f"{len(members)}", _shape(shape), dtype, f"{count:,}", *sizes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) if i in (0, 2, 3) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def _measured(tensors: list[Tensor]) -> Iterator[str]:
    """A line for every tensor as it has been read, and then those whose values are no numbers."""
    width = max((len(label) for tensor in tensors for label in tensor.parts), default=4)
    shapes = max((len(_shape(tensor.shape)) for tensor in tensors), default=5)
    numbers = "".join(f"{name:>11}" for name in ("min", "max", "mean", "std", "not finite"))
    yield f"{'tensor':<{width}}  {'shape':<{shapes}}  {'dtype':<9}{numbers}"
    broken = []
    for shape, label, read in ((tensor.shape, *part) for tensor in tensors for part in tensor.parts.items()):
        values = read()
        line, not_finite = _statistics(values)
        dtype = str(values.dtype).removeprefix("torch.")
        yield f"{label:<{width}}  {_shape(shape):<{shapes}}  {dtype:<9}{line}"
        if not_finite:
            broken.append(f"  {label}: {not_finite:,} of {values.numel():,} values")
    if broken:
        yield ""
        yield f"NOT FINITE, {len(broken)} tensor(s) → the run has diverged, go on from an earlier checkpoint:"
        yield from broken


def _statistics(values: torch.Tensor) -> tuple[str, int]:
    """Numbers over what is finite, and how many values are not."""
    flat = values.reshape(-1).float()
    finite = flat.isfinite()
    not_finite = flat.numel() - int(finite.sum())
    if not_finite:
        flat = flat[finite]
    if not flat.numel():
        return f"{'-':>11}" * 4 + f"{not_finite:>11,}", not_finite
    low, high = flat.aminmax()
    std = flat.std(correction=0)
    numbers = "".join(f"{float(number):>11.3g}" for number in (low, high, flat.mean(), std))
    return f"{numbers}{not_finite or '-':>11}", not_finite


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one"


def _sums(tensors: list[Tensor]) -> tuple[int, int, int]:
    """Parameters, bytes of weights, bytes of moments."""
    return sum(t.numel for t in tensors), sum(t.bytes for t in tensors), sum(t.moments for t in tensors)


def _total(tensors: list[Tensor]) -> str:
    parameters, weights, moments = _sums(tensors)
    beside = f", moments of the optimizer {binary_size(moments)}" if moments else ""
    return f"{len(tensors):,} tensors, {parameters:,} parameters: weights {binary_size(weights)}{beside}"
