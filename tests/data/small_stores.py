"""Small stores for tests: samples of any turns whose clips are made of their number."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from engine.data.labels import Sample, StreamIds, merge
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.data.store import Store, StoreWriter

SPECIAL, STREAM, MEL_BINS = SpecialTokens(100, 101), StreamIds(codebooks=3, bos=1024, eos=1025), 4

Clip = tuple[str, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Added:
    """What a store is given for one sample."""

    prompt: Prompt
    clips: tuple[Clip, ...]
    row: int
    speaker: str | None
    part: int

    @property
    def sample(self) -> Sample:
        codes, mels = [codes for _, codes, _ in self.clips], [mel for *_, mel in self.clips]
        return merge(self.prompt, codes, SPECIAL, STREAM, self.row, mels)


def made(kinds: str, seed: int, clips: list[int], row=0, speaker=None, part=0, mels=False, trained=True) -> Added:
    """A sample of `t` text, `h` heard clip, `s` spoken clip; `clips` numbers them, equal numbers are equal clips.

    Text and spoken clips are trained from the first `s` on.
    """
    rng, ids, labels, kept, is_trained = np.random.default_rng(seed), [], [], [], []
    for kind in kinds:
        trains = trained and "s" in kinds and len(ids) >= kinds.index("s")
        ids.append({"t": int(rng.integers(0, 100)), "h": SPECIAL.audio_in, "s": SPECIAL.audio_out}[kind])
        labels.append(ids[-1] if trains and kind != "h" else IGNORED)
        if kind != "t":
            kept.append(clip(clips[len(kept)], mel=mels and kind == "h"))
            is_trained.append(trains and kind == "s")
    prompt = Prompt(np.array(ids, np.int32), np.array(labels, np.int32), (None,) * len(kept), tuple(is_trained))
    return Added(prompt, tuple(kept), row, speaker, part)


def clip(number: int, mel: bool = False) -> Clip:
    rng = np.random.default_rng([number, 7])
    frames = int(rng.integers(1, 12))
    codes = rng.integers(0, 1024, (STREAM.codebooks, frames)).astype(np.int16)
    heard = rng.standard_normal((int(rng.integers(1, 40)), MEL_BINS)).astype(np.float16)
    return f"{number:064x}", codes, heard if mel else None


def write(folder: Path, added: list[Added], parts: int = 1, mels: bool = False, **about) -> Store:
    folder.mkdir(parents=True)
    writer = StoreWriter(folder, {"made": "so"}, SPECIAL, STREAM, parts, MEL_BINS if mels else None)
    for one in added:
        assert writer.add(one.prompt, list(one.clips), one.row, one.speaker, one.part) == len(one.sample)
    writer.close(**about)
    return Store(folder)


def assert_equal(one: Sample, other: Sample) -> None:
    for field in fields(Sample):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "mels":
            assert len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))  # noqa: B905
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=field.name)
            assert a.dtype == b.dtype, field.name
        else:
            assert a == b, field.name


EXAMPLE = [
    made("tthtts", 1, [0, 1], row=4, speaker="Ann"),
    made("thtsts", 2, [0, 2, 3], row=5, speaker="Bo", part=1),
    made("ttt", 3, [], row=7, part=1),
    made("thhs", 4, [0, 1, 1], row=8, speaker="Ann"),
]
