"""A part of a prepared store: its arrays, from which samples are cut.

Nothing of the arrays is taken on trust, for an index beyond them would be another sample's data, or the end of a GPU's
kernel: places are checked as they are used, which takes some microseconds a sample.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.data.labels import Sample, StreamIds, merge
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.data.store_files import HAS_MEL, TRAINED, open_array


class Part:
    """The arrays of a part, mapped.

    Args:
        about: of the part, from the header.
        columns: see `columns_of`.
    """

    def __init__(self, folder: Path, about: Mapping, columns: Mapping[str, tuple]):
        def open_column(name: str, length: int | None = None) -> np.ndarray:
            return open_array(folder / f"{name}.npy", *columns[name], length)

        self.samples = open_column("samples", about["samples"])
        self.text_ids = open_column("text_ids")
        self.trained = open_column("trained", len(self.text_ids))
        self.clip_ids = open_column("clip_ids")
        self.clip_use = open_column("clip_use", len(self.clip_ids))
        self.codes = open_column("codes", about["frames"])
        self.clip_ends = open_column("clip_ends", about["clips"])
        self.clip_keys = open_column("clip_keys", about["clips"])
        self.mels = self.mel_ends = None
        if about["mel_frames"]:
            self.mels = open_column("mels", about["mel_frames"])
            self.mel_ends = open_column("mel_ends", about["clips"])

    def sample(self, index: int, special: SpecialTokens, stream: StreamIds) -> Sample:
        """
        Raises:
            ValueError, IndexError: the arrays do not fit together there.
        """
        record = self.samples[index]
        sample = self._merged(index, record, special, stream)
        if len(sample) != record["length"] or len(sample.audio_ids) != record["audio_frames"]:
            raise ValueError(f"{len(sample)} positions, its record says {record['length']}")
        return sample

    def _merged(self, index: int, record: np.void, special: SpecialTokens, stream: StreamIds) -> Sample:
        text = _span(self.samples["text_end"], index, len(self.text_ids))
        uses = _span(self.samples["use_end"], index, len(self.clip_ids))
        ids, trained = np.array(self.text_ids[text]), self.trained[text]
        use = self.clip_use[uses].tolist()
        clips = self.clip_ids[uses].tolist()
        spans = [_span(self.clip_ends, clip, len(self.codes)) for clip in clips]
        if sum(span.stop - span.start for span in spans) > record["length"]:
            raise ValueError("its clips are longer than itself")  # before they are put together, which takes memory
        codes = [self.codes[span].T for span in spans]
        if any(not 0 <= clip.min(initial=0) <= clip.max(initial=0) < min(stream.bos, stream.eos) for clip in codes):
            raise ValueError("it holds codes that no codec gives")
        prompt = Prompt(ids, np.where(trained, ids, IGNORED).astype(np.int32), (), tuple(u & TRAINED != 0 for u in use))
        mels = [self._mel(clip) if u & HAS_MEL else None for clip, u in zip(clips, use, strict=True)]
        return merge(prompt, codes, special, stream, int(record["row"]), mels)

    def _mel(self, clip: int) -> np.ndarray:
        if self.mels is None:
            raise ValueError("it has no mels")
        return np.array(self.mels[_span(self.mel_ends, clip, len(self.mels))])

    def first_clips(self, trained: bool) -> list[bytes | None]:
        chosen = np.flatnonzero((np.asarray(self.clip_use) & TRAINED != 0) == trained)
        ends = self.samples["use_end"]
        first = np.searchsorted(chosen, np.concatenate([[0], ends[:-1]]))
        keys = self.clip_keys
        return [
            keys[self.clip_ids[chosen[at]]].tobytes() if at < len(chosen) and chosen[at] < end else None
            for at, end in zip(first.tolist(), ends.tolist(), strict=True)
        ]


def _span(ends: np.ndarray, index: int, length: int) -> slice:
    """From the end of what comes before `index` to its own, within `length` rows.

    Raises:
        ValueError: there is no such place, or its ends are not in order.
    """
    if not 0 <= index < len(ends):
        raise ValueError(f"number {index} of {len(ends)}")
    first, end = int(ends[index - 1]) if index else 0, int(ends[index])
    if not 0 <= first <= end <= length:
        raise ValueError(f"rows {first} to {end} of {length}")
    return slice(first, end)
