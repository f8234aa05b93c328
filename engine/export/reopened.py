"""Opens what was just written and compares it with what was to be written; nothing leaves without that.

First names, shapes, dtypes and every tensor's bits by checksum; then the logits of one batch, computed by transformers'
own forward from the source and from the files. The one finds what the disk or the writer did to the tensors, the
other a tensor under a wrong name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.model.initial import build_on_meta
from engine.model.safetensors_writer import Spec, checksum_of
from engine.model.streamed import probe_batch, streamed_logits
from engine.model.weights import WeightFiles

Read = Callable[[str], torch.Tensor]


def verify_model(folder: Path, specs: Mapping[str, Spec], checksums: Mapping[str, int], read: Read | None) -> str:
    """Compares a model folder of either format with its source.

    Args:
        specs: native name (`whisper.…`: the audio tower of the original format) -> what was to be written.
        checksums: of what was written.
        read: gives a tensor of the source, in any dtype; None: there are no logits to compare with.

    Returns:
        What was compared, in a line.

    Raises:
        CheckpointError: something differs; names the first tensor of which that is true.
    """
    files = WeightFiles(folder)
    needed = {name: tuple(p.shape) for name, p in build_on_meta(files.config).named_parameters()}
    try:
        files.check(needed)
    except Exception as error:
        raise CheckpointError(f"{folder}: what was written is not what the model needs: {error}") from None
    verify_tensors(folder, files.shapes | files.tower_shapes, files.read, specs, checksums)
    said = f"verified: {len(specs)} tensors"
    return said if read is None else f"{said}, {_verify_logits(files, specs, read)}"


def verify_tensors(
    where: Path, shapes: Mapping[str, tuple[int, ...]], read: Read, specs: Mapping[str, Spec],
    checksums: Mapping[str, int],
) -> None:  # fmt: skip
    """Compares files with what was written: count, names, shapes, dtypes, bits.

    Args:
        shapes: of the tensors in the files.
        read: gives one of these.

    Raises:
        CheckpointError: something differs.
    """
    problems = [f"{name} is missing" for name in specs if name not in shapes]
    problems += [f"{name} should not be there" for name in shapes if name not in specs]
    if problems:
        raise CheckpointError(f"{where}: not the {len(specs)} tensors that were written:", problems)
    for name, spec in specs.items():
        tensor = read(name)
        found, wanted = (tuple(tensor.shape), tensor.dtype), (tuple(spec.shape), spec.dtype)
        if found == wanted and checksum_of(tensor) == checksums[name]:
            continue
        how = "other values than" if found == wanted else f"{found} in place of {wanted} that"
        raise CheckpointError(
            f"{where}: {name} has {how} were written → the disk may be failing; write it again elsewhere."
        )


def _verify_logits(files: WeightFiles, specs: Mapping[str, Spec], read: Read) -> str:
    def source(name: str) -> torch.Tensor:
        return read(name).to(specs[name].dtype)

    model, batch = build_on_meta(files.config), probe_batch(files.config)
    wanted, found = (streamed_logits(model, reader, batch) for reader in (source, files.read))
    if not all(_same_bits(*pair) for pair in zip(wanted, found, strict=True)):
        first = next((name for name in files.shapes if not _same_bits(source(name), files.read(name))), None)
        what = f"{first} is not what the source holds" if first else "the tensors do not"
        raise CheckpointError(
            f"{files.folder}: logits differ from those of the source; {what} → the source changed while it was read, "
            "or the disk is failing; write it again."
        )
    text, audio = (len(logits) for logits in found)
    return f"logits of {text} text and {audio} audio positions equal"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also true of two NaNs, which a diverged model has and equality denies."""
    return one.dtype == other.dtype and one.shape == other.shape and checksum_of(one) == checksum_of(other)
