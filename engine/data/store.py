"""The prepared store: a data set as memory-mapped arrays, from which an exact sample is cut in O(its length).

A folder with a `header.json` and one folder a part, each of plain `.npy` files::

    samples    [n] a record a sample: where its text and clips end, its length, its targets, row, speaker
    text_ids   int32 [tokens]      with one placeholder for each clip
    trained    bool [tokens]       whether the token is its own label
    clip_ids   int32 [uses]        the clips of each sample, in the order of their placeholders
    clip_use   uint8 [uses]        whether the clip is trained, and whether Whisper features stand before it
    codes      int16 [frames, C]   of each distinct clip, as the codec gave them: delay and labels are made on reading
    clip_ends  int64 [clips]       and clip_keys uint8 [clips, 32], the content keys
    mels       float16 [mel frames, bins], mel_ends int64 [clips]; only with Whisper conditioning

A clip is there once, however many samples use it as reference. Nothing is read when a store is opened but the header,
so it opens in milliseconds and any number of processes share its pages. The header holds what the samples were made
with (tokenizer, codec, layout, normalisation, ...): a store that does not fit is refused, never reinterpreted.

With several parts each sample is in one drawn at random: a plan that goes part by part (engine/data/mixture.py) reads
a network file system in long runs and still mixes well.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.data.labels import Sample, StreamIds, merge
from engine.data.npy import NpyAppender
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.errors import DataError

FORMAT_VERSION = 1
HEADER = "header.json"
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


def is_store(path: str | Path) -> bool:
    return (Path(path) / HEADER).is_file()


class StoreWriter:
    """Writes the parts of a store into an empty folder; `close` makes it a store.

    Args:
        folder: a draft, which the caller renames when all is done.
        identity: what the samples are made with; a run compares it with its own.
        mel_bins: with Whisper conditioning.
    """

    def __init__(self, folder: Path, identity: dict, special: SpecialTokens, stream: StreamIds, parts: int = 1,
                 mel_bins: int | None = None):  # fmt: skip
        self.folder, self.identity, self.special, self.stream = folder, identity, special, stream
        self.mel_bins = mel_bins
        self._speakers: dict[str, int] = {}
        self._parts = [_PartWriter(folder / f"part-{i:05d}", stream.codebooks, mel_bins) for i in range(parts)]

    def add(
        self, prompt: Prompt, clips: list[tuple[str, np.ndarray, np.ndarray | None]], row: int, speaker: str | None,
        part: int = 0,
    ) -> int:  # fmt: skip
        """Adds a sample and returns its length.

        Args:
            clips: content key (hex), codes int16 [C, T] and mels [frames, bins] or None, for each clip of the prompt.
        """
        sample = merge(
            prompt, [codes for _, codes, _ in clips], self.special, self.stream, row, [mel for *_, mel in clips]
        )
        number = -1 if speaker is None else self._speakers.setdefault(speaker, len(self._speakers))
        self._parts[part].add(prompt, clips, sample, number)
        return len(sample)

    def close(self, **about) -> None:
        """Ends the files and writes the header; `about` is kept in it for people and tools."""
        (self.folder / "speakers.json").write_text(json.dumps(list(self._speakers)))
        digest = hashlib.sha256()
        parts = []
        for part in self._parts:
            counts = part.close()
            if counts["samples"]:
                parts.append({"folder": part.folder.name, **counts})
                digest.update(counts["sha256"].encode())
            else:
                shutil.rmtree(part.folder)
        header = {
            "format_version": FORMAT_VERSION,
            "samples": sum(part["samples"] for part in parts),
            "fingerprint": digest.hexdigest(),
            "identity": self.identity,
            "special": asdict(self.special),
            "stream": asdict(self.stream),
            "parts": parts,
            **about,
        }
        (self.folder / HEADER).write_text(json.dumps(header, indent=1))  # ASCII: right in any locale


class _PartWriter:
    def __init__(self, folder: Path, codebooks: int, mel_bins: int | None):
        self.folder = folder
        folder.mkdir(parents=True)
        columns = {
            "samples": (RECORD, ()), "text_ids": ("<i4", ()), "trained": ("?", ()), "clip_ids": ("<i4", ()),
            "clip_use": ("u1", ()), "codes": ("<i2", (codebooks,)), "clip_ends": ("<i8", ()),
            "clip_keys": ("u1", (32,)),
        }  # fmt: skip
        if mel_bins is not None:
            columns |= {"mels": ("<f2", (mel_bins,)), "mel_ends": ("<i8", ())}
        self._files = {name: NpyAppender(folder / f"{name}.npy", *kind) for name, kind in columns.items()}
        self._clips: dict[tuple[bytes, bool], int] = {}

    def add(self, prompt: Prompt, clips: list, sample: Sample, speaker: int) -> None:
        files = self._files
        files["text_ids"].append(prompt.input_ids)
        files["trained"].append(prompt.labels != IGNORED)
        for (key, codes, mel), trained in zip(clips, prompt.trained, strict=True):
            files["clip_ids"].append(np.array([self._clip(bytes.fromhex(key), codes, mel)], "<i4"))
            files["clip_use"].append(np.array([TRAINED * trained + HAS_MEL * (mel is not None)], "u1"))
        record = np.zeros(1, RECORD)
        record[0] = (
            files["text_ids"].length, files["clip_ids"].length, len(sample), len(sample.audio_ids),
            sample.text_targets, sample.audio_targets[0], sample.row, speaker,
        )  # fmt: skip
        files["samples"].append(record)

    def _clip(self, key: bytes, codes: np.ndarray, mel: np.ndarray | None) -> int:
        """Number of the clip in this part, written unless it is there already."""
        number = self._clips.setdefault((key, mel is not None), len(self._clips))
        if number == self._files["clip_ends"].length:
            files = self._files
            files["codes"].append(codes.T)
            files["clip_ends"].append(np.array([files["codes"].length], "<i8"))
            files["clip_keys"].append(np.frombuffer(key, "u1")[None])
            if "mels" in files:
                if mel is not None:
                    files["mels"].append(mel)
                files["mel_ends"].append(np.array([files["mels"].length], "<i8"))
        return number

    def close(self) -> dict:
        digest = hashlib.sha256()
        for name, file in sorted(self._files.items()):
            digest.update(f"{name} {file.close()}\n".encode())
        return {
            "samples": self._files["samples"].length,
            "clips": self._files["clip_ends"].length,
            "frames": self._files["codes"].length,
            "mel_frames": self._files["mels"].length if "mels" in self._files else 0,
            "sha256": digest.hexdigest(),
        }


class Store:
    """A prepared store, read only. May be sent to other processes, which open the files themselves.

    Attributes:
        folder: where it is.
        header: as written; `fingerprint` is equal for equal samples in equal order.
        parts: each with its arrays.

    Raises:
        DataError: no store, one of another version of the format, or not all of it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.header = json.loads((self.folder / HEADER).read_text(encoding="utf-8"))
            version = self.header.get("format_version")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self.folder}: not a prepared store ({error}) → `higgs-engine prepare` makes one."
            ) from None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{self.folder}: the store has format version {version}, this engine reads {FORMAT_VERSION} → "
                "prepare it again from the data file; codes come from the cache."
            )
        try:
            self.special = SpecialTokens(**self.header["special"])
            self.stream = StreamIds(**self.header["stream"])
            self.parts = [_Part(self.folder / part["folder"], part) for part in self.header["parts"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.folder / HEADER}: damaged ({error}) → prepare the store again.") from None

    def __reduce__(self):
        return Store, (self.folder,)

    def __len__(self) -> int:
        return self.header["samples"]

    @property
    def fingerprint(self) -> str:
        return self.header["fingerprint"]

    @property
    def is_heard(self) -> bool:
        """Whether any clip has what Whisper hears of it."""
        return any(part["mel_frames"] for part in self.header["parts"])

    @property
    def records(self) -> np.ndarray:
        """The records of all samples, RECORD [n], in memory."""
        return np.concatenate([np.asarray(part.samples) for part in self.parts])

    @property
    def part_of_sample(self) -> np.ndarray:
        """int32 [n]."""
        return np.repeat(np.arange(len(self.parts), dtype=np.int32), [len(part.samples) for part in self.parts])

    def speakers(self) -> list[str]:
        """Names of the numbers in the records."""
        file = self.folder / "speakers.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _unreadable(file, error) from None

    def sample(self, index: int) -> Sample:
        """The exact sample: streams, delays and labels of engine/data/labels.py."""
        for part in self.parts:
            if index < len(part.samples):
                return part.sample(index, self.special, self.stream)
            index -= len(part.samples)
        raise IndexError(index)

    def first_clips(self) -> tuple[list[bytes | None], list[bytes | None]]:
        """Content key of each sample's first context clip, and of its first trained clip; None where it has none."""
        pairs = [part.first_clips(trained) for trained in (False, True) for part in self.parts]
        contexts, trained = pairs[: len(self.parts)], pairs[len(self.parts) :]
        return [key for keys in contexts for key in keys], [key for keys in trained for key in keys]


class _Part:
    def __init__(self, folder: Path, about: Mapping):
        self.samples = _open(folder / "samples.npy", about["samples"])
        self.text_ids, self.trained = _open(folder / "text_ids.npy"), _open(folder / "trained.npy")
        self.clip_ids, self.clip_use = _open(folder / "clip_ids.npy"), _open(folder / "clip_use.npy")
        self.codes = _open(folder / "codes.npy", about["frames"])
        self.clip_ends, self.clip_keys = (
            _open(folder / "clip_ends.npy", about["clips"]),
            _open(folder / "clip_keys.npy"),
        )
        self.mels = self.mel_ends = None
        if about["mel_frames"]:
            self.mels = _open(folder / "mels.npy", about["mel_frames"])
            self.mel_ends = _open(folder / "mel_ends.npy", about["clips"])

    def _uses(self, index: int) -> slice:
        return slice(self.samples["use_end"][index - 1] if index else 0, self.samples["use_end"][index])

    def sample(self, index: int, special: SpecialTokens, stream: StreamIds) -> Sample:
        record = self.samples[index]
        text = slice(self.samples["text_end"][index - 1] if index else 0, record["text_end"])
        uses = self._uses(index)
        ids, trained = np.array(self.text_ids[text]), self.trained[text]
        use = self.clip_use[uses].tolist()
        clips = self.clip_ids[uses].tolist()
        prompt = Prompt(ids, np.where(trained, ids, IGNORED).astype(np.int32), (), tuple(u & TRAINED != 0 for u in use))
        mels = [self._mel(clip) if u & HAS_MEL else None for clip, u in zip(clips, use, strict=True)]
        return merge(prompt, [self._clip(clip) for clip in clips], special, stream, int(record["row"]), mels)

    def _clip(self, clip: int) -> np.ndarray:
        return self.codes[self.clip_ends[clip - 1] if clip else 0 : self.clip_ends[clip]].T

    def _mel(self, clip: int) -> np.ndarray:
        return np.array(self.mels[self.mel_ends[clip - 1] if clip else 0 : self.mel_ends[clip]])

    def first_clips(self, trained: bool) -> list[bytes | None]:
        chosen = np.flatnonzero((np.asarray(self.clip_use) & TRAINED != 0) == trained)
        ends = self.samples["use_end"]
        first = np.searchsorted(chosen, np.concatenate([[0], ends[:-1]]))
        keys = self.clip_keys
        return [
            keys[self.clip_ids[chosen[at]]].tobytes() if at < len(chosen) and chosen[at] < end else None
            for at, end in zip(first.tolist(), ends.tolist(), strict=True)
        ]


def _open(file: Path, length: int | None = None) -> np.ndarray:
    """A memory-mapped array.

    Raises:
        DataError: it is missing, damaged, or shorter than the header says.
    """
    try:
        # As a plain array, still mapped: np.memmap runs Python code for every slice.
        array = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(file, error) from None
    if length is not None and len(array) != length:
        raise DataError(f"{file}: has {len(array)} rows, the header says {length} → prepare the store again.")
    return array


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: cannot be read ({error}) → prepare the store again, or copy all of it.")


def publish_store(draft: Path, out: Path) -> None:
    """Gives a closed store its name, in place of what stood there."""
    if out.exists():
        shutil.rmtree(out)
    os.replace(draft, out)
