"""Files of one JSON object a line that a run adds to: metrics, samples, skipped steps, starts.

A line that a killed run left half-written is nobody's; one that is cut behind an inner brace looks whole, so each is
parsed. A resumed run forgets what came after the step that it goes on from.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.checkpoint.manifest import write_atomically


def read(file: Path) -> list[dict]:
    """The whole lines; none if there is no file."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def add(file: Path, lines: Iterable[dict]) -> None:
    """On lines of their own, also where a full disk has cut the last one.

    Raises:
        OSError: not all of them are written.
    """
    text = "".join(map(_line, lines))
    with file.open("ab+") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            text = text if stream.read() == b"\n" else "\n" + text
        stream.write(text.encode())


class Journal:
    """What a run adds to a file while it goes on; what a full disk does not take is written with the next lines.

    Args:
        say: prints that some could not be written.
    """

    def __init__(self, file: Path, say: Callable[[str], None]):
        self.file, self._say = file, say
        self._waiting: list[dict] = []

    def add(self, lines: Iterable[dict]) -> None:
        self._waiting += lines
        try:
            add(self.file, self._waiting)
        except OSError as error:
            self._say(f"note: {self.file.name} could not be written, its lines wait for the next ones: {error}")
        else:
            self._waiting = []


def forget_after(file: Path, step: int) -> None:
    """Leaves the lines up to `step`; of a new run, step 0, an empty file."""
    kept = [line for line in read(file) if line["step"] <= step] if step else []
    write_atomically(file, "".join(map(_line, kept)))


def _line(values: dict) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
