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
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.data.labels import Sample, StreamIds, merge
from engine.data.npy import NpyAppender
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.data.store_files import HAS_MEL, RECORD, TRAINED, columns_of, require_sound, unreadable
from engine.data.store_part import Part
from engine.errors import DataError
from engine.untrusted import read_object

FORMAT_VERSION = 1
HEADER = "header.json"


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
        columns = columns_of(codebooks, mel_bins)
        if mel_bins is None:
            del columns["mels"], columns["mel_ends"]
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
            self.header = read_object(self.folder / HEADER)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.folder}: not a prepared store ({error}) → `higgs-engine prepare` makes one."
            ) from None
        if (version := self.header.get("format_version")) != FORMAT_VERSION:
            raise DataError(
                f"{self.folder}: the store has format version {version}, this engine reads {FORMAT_VERSION} → "
                "prepare it again from the data file; codes come from the cache."
            )
        try:
            require_sound(self.header)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.folder / HEADER}: damaged ({error}) → prepare the store again.") from None
        self.special = SpecialTokens(**self.header["special"])
        self.stream = StreamIds(**self.header["stream"])
        columns = columns_of(self.stream.codebooks, None)
        self.parts = [Part(self.folder / part["folder"], part, columns) for part in self.header["parts"]]

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
        return np.concatenate([np.empty(0, RECORD), *(part.samples for part in self.parts)])

    @property
    def part_of_sample(self) -> np.ndarray:
        """int32 [n]."""
        sizes = np.array([len(part.samples) for part in self.parts], np.int64)
        return np.repeat(np.arange(len(self.parts), dtype=np.int32), sizes)

    def speakers(self) -> list[str]:
        """Names of the numbers in the records."""
        file = self.folder / "speakers.json"
        try:
            names = json.loads(file.read_text(encoding="utf-8"))  # half of a surrogate pair may be in them
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("it is no list of names")
            return names
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable(file, error) from None

    def sample(self, index: int) -> Sample:
        """The exact sample: streams, delays and labels of engine/data/labels.py.

        Raises:
            DataError: it is not what was written.
        """
        place = index
        for part in self.parts:
            if place < len(part.samples):
                try:
                    return part.sample(place, self.special, self.stream)
                except (ValueError, IndexError) as error:
                    raise DataError(
                        f"{self.folder}: sample {index} is damaged ({error}) → prepare the store again."
                    ) from None
            place -= len(part.samples)
        raise IndexError(index)

    def first_clips(self) -> tuple[list[bytes | None], list[bytes | None]]:
        """Content key of each sample's first context clip, and of its first trained clip; None where it has none."""
        try:
            pairs = [part.first_clips(trained) for trained in (False, True) for part in self.parts]
        except IndexError as error:
            raise DataError(f"{self.folder}: damaged ({error}) → prepare the store again.") from None
        contexts, trained = pairs[: len(self.parts)], pairs[len(self.parts) :]
        return [key for keys in contexts for key in keys], [key for keys in trained for key in keys]


def publish_store(draft: Path, out: Path) -> None:
    """Gives a closed store its name, in place of what stood there."""
    if out.exists():
        shutil.rmtree(out)
    os.replace(draft, out)
