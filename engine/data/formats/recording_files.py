"""Where the recordings of written data are: named by the data file, or copied into a folder of data."""

import os
import shutil
from pathlib import Path
from typing import Any

from engine.data.audio import Recording
from engine.data.formats.spoken import Spoken
from engine.errors import DataError


def path_from(folder: Path, recording: Recording) -> str:
    """How a data file in `folder` names a recording: relative if it lies below the folder, else absolute."""
    absolute = os.path.abspath(recording.path)
    try:
        return Path(absolute).relative_to(os.path.abspath(folder)).as_posix()
    except ValueError:
        return absolute


def stem_of(spoken: Spoken) -> Any:
    """The name that the copy of a target has: misc.sample_id, else that of the recording."""
    return spoken.misc.get("sample_id", Path(spoken.recording.path).stem)


def usable(stem: Any) -> bool:
    """Whether a file or folder can have that name everywhere, and is found under it again."""
    return (
        isinstance(stem, str)
        and stem == stem.strip()
        and 0 < len(stem.encode()) <= 200
        and not stem.startswith(".")
        and not set(stem) & set('/\\\0\r\n<>:"|?*')
    )


class Copies:
    """Recordings copied into a folder of data, no two under one name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()

    def add(self, recording: Recording, under: str) -> str:
        """Copies a recording once into the part `under` of the folder; gives its name from the folder.

        Raises:
            DataError: the file cannot be copied.
        """
        source = os.path.abspath(recording.path)
        if source not in self._names:
            self._names[source] = self._copy(source, under, self._free(under, Path(source).stem))
        return self._names[source]

    def add_as(self, spoken: Spoken, under: str) -> str:
        """Copies the target, under its sample_id if it has one, whether it was copied before or not.

        Raises:
            DataError: the file cannot be copied, or another row has this sample_id.
        """
        stem = stem_of(spoken)
        free = self._free(under, stem)
        if "sample_id" in spoken.misc and free != stem:
            raise DataError(
                f"misc.sample_id {stem!r} (in whatever case) is that of two rows, and would name the files of both → "
                "give each its own."
            )
        return self._copy(os.path.abspath(spoken.recording.path), under, free)

    def _free(self, under: str, stem: str) -> str:
        """The stem, with a number if another file there has it; file systems may not tell upper from lower case."""
        free, number = stem, 1
        while (taken := f"{under}/{free}".lower()) in self._taken:
            number += 1
            free = f"{stem}_{number}"
        self._taken.add(taken)
        return free

    def _copy(self, source: str, under: str, stem: str) -> str:
        name = (Path(under) / (stem + Path(source).suffix)).as_posix()
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise DataError(f"{source}: cannot be copied: {error.strerror}.") from None
        return name
