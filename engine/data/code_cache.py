"""Codes on disk: append-only shards of recordings that were encoded together, under one folder for each codec.

A shard `<root>/<codec>-<format>/<time>-<random>.safetensors` holds n recordings end to end:

    keys  uint8   [n, 32]              sha256 of each recording's content
    ends  int64   [n]                  frames up to the end of each
    codes int16   [frames, codebooks]
    facts float32 [n, FACTS]           `AudioFacts` of each; NaN where there was no waveform

Invariant: a shard appears under its name only when it is whole and on the disk, and never changes afterwards. So
any number of processes may read and write one cache, and a kill leaves nothing but a hidden file. A recording
that is in several shards has the codes of the oldest.

Opening reads keys and ends alone, 80 bytes a recording in memory; codes stay memory-mapped. The index is arrays
sorted by the first 8 bytes of the keys and not a dictionary, which would take 300 bytes a recording, in each of
the processes of a machine.
"""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engine.data.audio_checks import FACTS, AudioFacts

_logger = logging.getLogger(__name__)

_FORMAT = f"1.{FACTS}"  # part of the folder's name: what is kept in another format is not seen
_KEY = 32  # bytes of a sha256
_DTYPES = {"keys": "U8", "ends": "I64", "codes": "I16", "facts": "F32"}


class Encoded(NamedTuple):
    """A recording as the cache keeps it.

    Attributes:
        key: content key, sha256 in hex.
        codes: int16 [codebooks, frames].
        facts: of its waveform; None if there was none.
    """

    key: str
    codes: np.ndarray
    facts: AudioFacts | None = None


class CodeCache:
    """The encoded recordings of one codec.

    Args:
        root: folder of the caches of all codecs; made at the first `put`.
        codec_identity: of the codec, see `engine.data.codec.codec_identity`.
    """

    def __init__(self, root: str | Path, codec_identity: str):
        self.folder = Path(root) / f"{codec_identity[:16]}-{_FORMAT}"
        self._shards: list = []  # open shards: safetensors maps a file and keeps no descriptor
        self._names: set[str] = set()
        self._keys = np.empty((0, _KEY), np.uint8)
        self._spans = np.empty((0, 3), np.int64)  # of each key: shard, first frame, end
        self._rows = np.empty(0, np.int64)  # of each key: its row in its shard
        self._prefixes, self._order = _sorted_prefixes(self._keys)
        self.refresh()

    def __len__(self) -> int:
        """Recordings over all shards, one that is in two of them twice."""
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def get(self, key: str) -> np.ndarray | None:
        """The codes of a content key, int16 [codebooks, frames], or None."""
        if (at := self._find(key)) is None:
            return None
        shard, first, end = self._spans[at].tolist()
        return self._shards[shard].get_slice("codes")[first:end].T.copy()

    def frames(self, key: str) -> int | None:
        """How many frames the codes have, without reading them, or None."""
        if (at := self._find(key)) is None:
            return None
        return int(self._spans[at, 2] - self._spans[at, 1])

    def facts(self, key: str) -> AudioFacts | None:
        """What was measured on the waveform, or None: the key is unknown, or came as codes."""
        if (at := self._find(key)) is None:
            return None
        row = int(self._rows[at])
        values = self._shards[self._spans[at, 0]].get_slice("facts")[row : row + 1][0]
        return None if np.isnan(values[0]) else AudioFacts.from_array(values)

    def put(self, items: Iterable[Encoded]) -> None:
        """Writes recordings as one shard, which other processes see at their next `refresh`.

        Raises:
            ValueError: codes are not int16 [codebooks, frames] with frames above 0 and one number of codebooks, or
                a key is no sha256; nothing is written then.
            OSError: the disk is full, or the folder cannot be written to; the cache is as it was.
        """
        if items := list(items):
            content = save(_as_tensors(items))
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_durably(self.folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.safetensors", content)
            self.refresh()

    def refresh(self) -> None:
        """Takes in the shards that were written since, by any process.

        A damaged one is removed with a warning: what it held counts as absent and will be encoded again.
        """
        try:
            found = {name for name in os.listdir(self.folder) if name.endswith(".safetensors") and name[0] != "."}
        except FileNotFoundError:
            return
        keys, spans, rows = [self._keys], [self._spans], [self._rows]
        for name in sorted(found - self._names):
            self._names.add(name)
            if (opened := _open_shard(self.folder / name)) is None:
                continue
            shard, shard_keys, ends = opened
            numbers = np.full(len(ends), len(self._shards))
            keys.append(shard_keys)
            spans.append(np.stack([numbers, np.concatenate([[0], ends[:-1]]), ends], axis=1))
            rows.append(np.arange(len(ends)))
            self._shards.append(shard)
        if len(keys) > 1:
            self._keys, self._spans, self._rows = map(np.concatenate, (keys, spans, rows))
            self._prefixes, self._order = _sorted_prefixes(self._keys)

    def _find(self, key: str) -> int | None:
        """Index of the oldest entry with this key."""
        wanted = _key_bytes(key)
        prefix = np.uint64(int.from_bytes(wanted[:8], "big"))
        for at in range(int(np.searchsorted(self._prefixes, prefix)), len(self._prefixes)):
            if self._prefixes[at] != prefix:
                break
            if self._keys[self._order[at]].tobytes() == wanted:
                return int(self._order[at])
        return None


def _key_bytes(key: str) -> bytes:
    found = bytes.fromhex(key)
    if len(found) != _KEY:
        raise ValueError(f"{key!r} is no content key, a sha256 in hex")
    return found


def _sorted_prefixes(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first 8 bytes of keys [n, 32] as sorted uint64 [n], and the order that sorts them; the oldest come first."""
    prefixes = np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    order = np.argsort(prefixes, kind="stable")
    return prefixes[order], order


def _as_tensors(items: list[Encoded]) -> dict[str, np.ndarray]:
    for key, codes, _ in items:
        if codes.dtype != np.int16 or codes.ndim != 2 or not codes.size or len(codes) != len(items[0].codes):
            shape = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"{key}: expected int16 codes [{len(items[0].codes)}, frames], not {shape}")
    unknown = np.full(FACTS, np.nan, np.float32)
    return {
        "keys": np.frombuffer(b"".join(_key_bytes(item.key) for item in items), np.uint8).reshape(-1, _KEY),
        "ends": np.cumsum([item.codes.shape[1] for item in items], dtype=np.int64),
        # Transposed arrays make a transposed whole, which safetensors would write in the order of its memory.
        "codes": np.ascontiguousarray(np.concatenate([item.codes.T for item in items])),
        "facts": np.stack([unknown if item.facts is None else item.facts.to_array() for item in items]),
    }


def _write_durably(path: Path, content: bytes) -> None:
    """The file appears under its name only when all of it is on the disk."""
    partial = path.with_name(f".{path.name}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open_shard(path: Path):
    """The shard with its keys [n, 32] and ends [n], or None if another process removed it or it is damaged."""
    try:
        shard = safe_open(path, "np")
        return shard, *_checked_index(shard)
    except FileNotFoundError:
        return None
    except SafetensorError as damage:
        _logger.warning("removed damaged codes %s (%s); they will be made again", path, damage)
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _checked_index(shard) -> tuple[np.ndarray, np.ndarray]:
    if set(shard.keys()) != set(_DTYPES):
        raise SafetensorError(f"holds {', '.join(shard.keys())}")
    slices = {name: shard.get_slice(name) for name in _DTYPES}
    for name, part in slices.items():
        if part.get_dtype() != _DTYPES[name]:
            raise SafetensorError(f"{name} are {part.get_dtype()}, not {_DTYPES[name]}")
    shapes = {name: list(part.get_shape()) for name, part in slices.items()}
    ends, count = shard.get_tensor("ends"), shapes["keys"][0]
    whole = shapes["keys"] == [count, _KEY] and shapes["ends"] == [count] and shapes["facts"] == [count, FACTS]
    if not (whole and count and len(shapes["codes"]) == 2 and shapes["codes"][0] == ends[-1]):
        raise SafetensorError(f"its shapes do not fit together: {shapes}")
    if ends[0] <= 0 or (ends[1:] <= ends[:-1]).any():  # differences could overflow
        raise SafetensorError("a recording in it has no frames")
    return shard.get_tensor("keys"), ends
