"""What a run has left in its output folder, read for the report.

A run may still be going on, may have been killed in the middle of a line, or be older than some of its files: what is
missing or cannot be read becomes a line of `notes`, never an error. The folder may be somebody else's: what it says
is plain text, and leads to no file outside of it.
"""

import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from engine.checkpoint.manifest import MANIFEST, load_manifest
from engine.errors import CheckpointError, DataError
from engine.observe.schema import BY_NAME
from engine.report.series import Point, cleaned
from engine.untrusted import parse_object, read_object

METRICS, STARTS, SKIPPED, SAMPLES = "metrics.jsonl", "starts.jsonl", "skipped_steps.jsonl", "samples/samples.jsonl"
CONFIG, STATE = "config.yaml", "trainer_state.json"
CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


class Metrics:
    """`metrics.jsonl` by columns: a line of a long run, as a dict, would take fifty times the memory.

    Attributes:
        last: the newest line of training; {} if there is none.
        alarms: (step, line), in their order.
    """

    def __init__(self) -> None:
        self._columns: dict[str, tuple[array, array]] = {}
        self.last: dict = {}
        self.alarms: list[tuple[float, str]] = []

    def add(self, line: dict) -> None:
        step = _finite(line.get("step"))
        if step is None:
            return
        for name, value in line.items():
            if name.removeprefix("eval_") not in BY_NAME:
                continue
            if isinstance(value, list):
                for i, item in enumerate(value[:64]):
                    self._append(f"{name}/{i}", step, item)
            else:
                self._append(name, step, value)
        alarms = line.get("alarm")
        self.alarms += [(step, str(alarm)) for alarm in alarms] if isinstance(alarms, list) else []
        if _finite(line.get("seconds_per_step")) is not None or "loss" in line:
            self.last = line

    def _append(self, name: str, step: float, value: object) -> None:
        number = _finite(value)
        if number is not None:
            steps, values = self._columns.setdefault(name, (array("d"), array("d")))
            steps.append(step)
            values.append(number)

    def points(self, name: str) -> tuple[Point, ...]:
        """Of a metric, or with `/N` of one of its values; () if it was never known."""
        return cleaned(*self._columns.get(name, ((), ())))

    def members(self, name: str) -> list[str]:
        """The columns of a metric that is a list, in their order."""
        found = [column for column in self._columns if column.rpartition("/")[0] == name]
        return sorted(found, key=lambda column: int(column.rpartition("/")[2]))

    def seconds(self) -> float:
        """Time that the steps took, all starts together."""
        points = self.points("seconds_per_step")
        steps = [0.0, *(step for step, _ in points)]
        return sum(value * (step - before) for (step, value), before in zip(points, steps, strict=False))


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        bytes: of all its files.
        eval_loss: held-out loss at its step; None if it was not measured.
    """

    name: str
    step: int
    bytes: int
    eval_loss: float | None
    world_size: int
    backend: str


@dataclass
class RunFolder:
    """
    Attributes:
        name: of the run, for headings.
        settings: config.yaml, unchecked.
        starts, skipped, samples: lines of the files of these names.
        dropped: samples left out of `train` and `eval`, as dropped_*_samples.json has them.
        notes: what could not be read, in words.
    """

    folder: Path
    name: str = ""
    settings: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    starts: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    dropped: dict[str, list] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    pointers: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> tuple[int, int | None]:
        """Steps done, and steps of the whole run if that is known."""
        done = [_finite(self.metrics.last.get("step")), _finite(self.state.get("step"))]
        total = _finite(self.state.get("total_steps"))
        if self.starts:
            total = _finite(self.starts[-1].get("total_steps")) or total
        return int(max((value for value in done if value is not None), default=0)), total and int(total)

    @property
    def resumed_at(self) -> list[int]:
        steps = (_finite(start.get("step")) for start in self.starts)
        return sorted({int(step) for step in steps if step})


def read_run(folder: Path) -> RunFolder:
    """
    Raises:
        DataError: it is no folder of a run.
    """
    folder = folder.resolve()
    if not folder.is_dir() or not any((folder / name).is_file() for name in (METRICS, CONFIG, STARTS)):
        raise DataError(f"{folder}: holds neither {METRICS} nor {CONFIG} → give the output_dir of a run.")
    run = RunFolder(folder)
    run.settings = _settings(run)
    run.name = str(run.settings.get("run_name") or folder.name)
    for line in _lines(run, METRICS):
        run.metrics.add(line)
    run.starts = list(_lines(run, STARTS))
    run.skipped = list(_lines(run, SKIPPED, expected=False))
    run.samples = list(_lines(run, SAMPLES, expected=bool(run.settings.get("sample_every"))))
    run.state = _object(run, STATE)
    run.dropped = {name: _dropped(run, f"dropped_{name}_samples.json") for name in ("train", "eval")}
    run.checkpoints = list(_checkpoints(run))
    run.pointers = {name: text for name in ("latest", "best") if (text := _pointer(folder / name))}
    return run


def _finite(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _settings(run: RunFolder) -> dict:
    try:
        found = yaml.safe_load((run.folder / CONFIG).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        run.notes.append(f"{CONFIG} is missing: the settings are not known")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        run.notes.append(f"{CONFIG} cannot be read: {type(error).__name__}")
    return {}


def _lines(run: RunFolder, name: str, expected: bool = True) -> Iterator[dict]:
    """The objects of a file of JSON lines; of those that are none, as one that is being written, the number."""
    damaged = 0
    try:
        with (run.folder / name).open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    yield parse_object(line)
                except ValueError:
                    damaged += bool(line.strip())
    except FileNotFoundError:
        if expected:
            run.notes.append(f"{name} is missing, so what it would say is not shown")
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror}")
    if damaged:
        run.notes.append(f"{name}: {damaged:,} line(s) cannot be read and are left out (cut off while being written?)")


def _object(run: RunFolder, name: str) -> dict:
    try:
        return read_object(run.folder / name)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        run.notes.append(f"{name} cannot be read: {error}")
        return {}


def _dropped(run: RunFolder, name: str) -> list:
    try:
        found = json.loads((run.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{name} cannot be read: {error}")
        return []
    return found if isinstance(found, list) else []


def _checkpoints(run: RunFolder) -> Iterator[Checkpoint]:
    folders = [path for path in run.folder.iterdir() if CHECKPOINT.match(path.name)]
    for folder in sorted(folders, key=lambda path: int(CHECKPOINT.match(path.name).group(1))):
        try:
            found = load_manifest(folder)
            size = sum(file.bytes for file in found.files.values()) + (folder / MANIFEST).stat().st_size
        except (CheckpointError, OSError) as error:
            run.notes.append(f"{folder.name} is not shown: {error}")
            continue
        yield Checkpoint(folder.name, found.step, size, found.eval_loss, found.world_size, found.backend)


def _pointer(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if CHECKPOINT.match(text) else None
