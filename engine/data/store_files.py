"""The files of a prepared store as its header describes them, or a DataError: a store may come from anywhere.

A header leads to no file outside of the store's folder, and its arrays have the kinds and lengths it says. What is in
the arrays is looked at sample by sample, when one is cut (store_part.py): opening reads no more than headers.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.labels import StreamIds
from engine.data.prompts import SpecialTokens
from engine.errors import DataError
from engine.untrusted import name_within

RECORD = np.dtype(
    [
        ("text_end", "<i8"),
        ("use_end", "<i8"),
        ("length", "<i4"),  # positions
        ("audio_frames", "<i4"),  # positions that are audio frames
        ("text_targets", "<i4"),
        ("audio_targets", "<i4"),  # of each codebook
        ("row", "<i8"),  # of the data
        ("speaker", "<i4"),  # number in speakers.json, -1 if the row names none
    ]
)
TRAINED, HAS_MEL = 1, 2


def columns_of(codebooks: int, mel_bins: int | None) -> dict[str, tuple[Any, tuple[int | None, ...]]]:
    """Name of each file -> dtype, and shape of a row; the mels are there with Whisper conditioning only."""
    return {
        "samples": (RECORD, ()), "text_ids": ("<i4", ()), "trained": ("?", ()), "clip_ids": ("<i4", ()),
        "clip_use": ("u1", ()), "codes": ("<i2", (codebooks,)), "clip_ends": ("<i8", ()), "clip_keys": ("u1", (32,)),
        "mels": ("<f2", (mel_bins,)), "mel_ends": ("<i8", ()),
    }  # fmt: skip


COUNTS = ("samples", "clips", "frames", "mel_frames")


def require_sound(header: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError, KeyError, TypeError: the header is not one that a StoreWriter writes.
    """
    for name, kind in (("special", SpecialTokens), ("stream", StreamIds)):
        given = header[name]
        if set(given) != {field.name for field in fields(kind)} or not all(map(_is_count, given.values())):
            raise ValueError(f"{name} is {given!r}")
    for part in header["parts"]:
        name_within(part["folder"])
        for name in COUNTS:
            if not _is_count(part[name]):
                raise ValueError(f"{name} of {part['folder']} is {part[name]!r}")
    if not _is_count(header["samples"]) or header["samples"] != sum(part["samples"] for part in header["parts"]):
        raise ValueError("its parts do not have as many samples as it says")
    if not isinstance(header["fingerprint"], str) or not isinstance(header["identity"], dict):
        raise ValueError("fingerprint is no text, or identity no object")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def open_array(file: Path, dtype: Any, row_shape: tuple[int | None, ...] = (), length: int | None = None) -> np.ndarray:
    """A memory-mapped array.

    Args:
        row_shape: of a row, None where any size will do.
        length: number of rows; None: any.

    Raises:
        DataError: it is missing, damaged, of another kind, or not as long as the header says.
    """
    try:
        # As a plain array, still mapped: np.memmap runs Python code for every slice.
        array = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # numpy reads a damaged header as Python, and raises whatever that stumbles over
        raise unreadable(file, error) from None
    fits = len(array.shape) == 1 + len(row_shape) and all(
        wanted in (None, found) for wanted, found in zip(row_shape, array.shape[1:], strict=True)
    )
    if array.dtype != np.dtype(dtype) or not fits:
        raise unreadable(file, f"holds {array.dtype} {list(array.shape)}")
    if length is not None and len(array) != length:
        raise DataError(f"{file}: has {len(array)} rows, the header says {length} → prepare the store again.")
    return array


def unreadable(file: Path, error: Exception | str) -> DataError:
    return DataError(f"{file}: cannot be read ({error}) → prepare the store again, or copy all of it.")
