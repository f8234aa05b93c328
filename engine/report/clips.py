"""Recordings inside the page: losslessly packed (FLAC, half the size of a wav), with a picture of their loudness.

Lossless, for what is heard has to be the model's doing. A page holds so many bytes of sound; what is beyond is linked
where it lies, and the page says so.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.report.html import text
from engine.untrusted import path_within

BUDGET = 16 << 20
"""Bytes of sound in a page, as they stand in it: a mail can still take it."""

LARGEST = 64 << 20
"""Bytes of a file that is looked at."""

COLUMNS = 72
"""Of the picture."""


@dataclass(frozen=True)
class Clip:
    """
    Attributes:
        address: the sound itself, as a `data:` address.
        peaks: highest absolute value of each of `COLUMNS` stretches, 0 to 1.
    """

    address: str
    seconds: float
    peaks: tuple[float, ...]

    def picture(self) -> str:
        drawn = "".join(
            f"M{i} {50 - 49 * max(p, 0.02):.0f}V{50 + 49 * max(p, 0.02):.0f}" for i, p in enumerate(self.peaks)
        )
        view = f"-1 0 {COLUMNS + 1} 100"
        about = f'viewBox="{view}" preserveAspectRatio="none" aria-hidden="true"'
        return f'<svg class="wave" {about}><path d="{drawn}"/></svg>'


@lru_cache(maxsize=512)
def _packed(file: Path, size: int, changed: int) -> Clip:
    """A report is written at every save: what was packed for the last one is kept."""
    import soundfile

    sound, rate = soundfile.read(file, dtype="int16", always_2d=True)
    stretches = np.array_split(np.abs(sound.astype(np.int32)).max(axis=1), COLUMNS) if len(sound) else []
    peaks = tuple(float(part.max()) / 32768 if len(part) else 0.0 for part in stretches)
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, rate, format="FLAC", subtype="PCM_16")
    address = "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Clip(address, len(sound) / rate, peaks)


class Clips:
    """The recordings of a page.

    Args:
        budget: bytes of sound that it may hold.

    Attributes:
        left_out: files that are only linked, for the budget is spent.
        notes: files that cannot be played, and why.
    """

    def __init__(self, budget: int = BUDGET):
        self.left = budget
        self.left_out: list[str] = []
        self.notes: list[str] = []
        self._held: dict[Path, Clip | None] = {}

    def take(self, folder: Path, names: Iterable[str | None]) -> None:
        """Files below `folder`, the most important ones first."""
        for name in names:
            if not name:
                continue
            try:
                file = (folder / path_within(name)).resolve()
                if file not in self._held:
                    self._held[file] = self._clip(folder.resolve(), file, name)
            except Exception as error:  # whatever a library makes of a damaged file
                self._held[folder / str(name)] = None
                self.notes.append(f"{name} cannot be played: {error}")

    def _clip(self, folder: Path, file: Path, name: str) -> Clip | None:
        if not file.is_relative_to(folder):
            raise ValueError("it leads out of the run's folder")
        found = file.stat()
        clip = _packed(file, found.st_size, found.st_mtime_ns) if found.st_size <= LARGEST else None
        if clip is None or len(clip.address) > self.left:
            self.left_out.append(name)
            return None
        self.left -= len(clip.address)
        return clip

    def player(self, folder: Path, name: str | None, link: str, label: str) -> str:
        """HTML that plays a file, or links to it.

        Args:
            link: where it lies, seen from the page.
            label: for who hears the page.
        """
        clip = self._held.get((folder / name).resolve()) if name else None
        if clip is None:
            return (
                f'<p class="gone"><a href="{text(link)}">{text(Path(link).name)}</a>, not in this page</p>'
                if name
                else ""
            )
        return (
            f'{clip.picture()}<audio controls preload="none" src="{clip.address}" aria-label="{text(label)}"></audio>'
        )
