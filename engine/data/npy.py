"""A .npy file that grows: rows are appended without knowing how many will come."""

import hashlib
from pathlib import Path

import numpy as np

HEADER_BYTES = 256
"""Room for the header, which is written again when the number of rows is known; numpy pads headers as well."""


class NpyAppender:
    """Appends rows of one dtype and shape; after `close`, `np.load(file, mmap_mode="r")` reads them.

    Args:
        row_shape: of one row; () for a vector.
    """

    def __init__(self, file: Path, dtype, row_shape: tuple[int, ...] = ()):
        self.file, self.dtype, self.row_shape = file, np.dtype(dtype), row_shape
        self.length = 0
        self._digest = hashlib.sha256(f"{self.dtype.descr}{row_shape}".encode())
        self._stream = file.open("wb", buffering=1 << 20)
        self._stream.write(bytes(HEADER_BYTES))

    def append(self, rows: np.ndarray) -> None:
        """Adds rows [n, *row_shape]."""
        rows = np.ascontiguousarray(rows, self.dtype)
        if rows.shape[1:] != self.row_shape:
            raise ValueError(f"{self.file.name}: rows have shape {rows.shape[1:]}, not {self.row_shape}")
        data = rows.tobytes()
        self._digest.update(data)
        self._stream.write(data)
        self.length += len(rows)

    def close(self) -> str:
        """Writes the header; returns the sha256 in hex of what the array holds."""
        shape = (self.length, *self.row_shape)
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        text = repr(description).ljust(HEADER_BYTES - 11) + "\n"
        if len(text) != HEADER_BYTES - 10:
            raise ValueError(f"{self.file.name}: the dtype's description does not fit into the header")
        self._stream.seek(0)
        self._stream.write(b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.encode("latin1"))
        self._stream.close()
        return self._digest.hexdigest()
