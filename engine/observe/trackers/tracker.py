"""What a tracker is told; one that tells nobody is the base of those that do.

A tracker is one file of this folder. What it raises while it is made ends the run, in words; what it raises later
switches it off (background.py).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

PROJECT = "higgs-engine"
"""What trackers file a run under, unless their own environment variables say otherwise."""


@dataclasses.dataclass(frozen=True)
class Start:
    """
    Attributes:
        name: of the run.
        output_dir: of the run.
        folder: for the files of a tracker that keeps them on this machine.
        settings: name -> value, resolved.
        step: steps done by the run that is resumed, 0 of a new one.
        known_as: what the tracker called the run that is resumed; None of a new one.
    """

    name: str
    output_dir: Path
    folder: Path
    settings: Mapping[str, object]
    step: int
    known_as: str | None


@dataclasses.dataclass(frozen=True)
class Sound:
    """A recording to listen to: `samples/00/generated`, its file, and what is said in it, with its scores."""

    tag: str
    file: Path
    caption: str


class NullTracker:
    """Tells nobody. Others are made from a Start, in the main process, and override all methods.

    Attributes:
        known_as: what the tracker calls the run, needed to go on with it; None if it needs nothing.
        where: one line, where or how to look at the run.
    """

    known_as: str | None = None
    where = "nowhere"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by tag (`group/name`)."""

    def sounds(self, step: int, sounds: Sequence[Sound]) -> None:
        """Recordings of a step."""

    def close(self, code: int) -> None:
        """All is written when this returns; `code`: engine/exit_codes.py."""


def in_words(value: object) -> str | int | float | bool:
    """A setting as trackers take it: a number, or text."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
