"""The trackers of a run (`report_to`), told of metrics, evaluations and samples by the main process."""

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.callbacks import Callback
from engine.checkpoint.manifest import write_atomically
from engine.config import Settings
from engine.errors import ConfigError
from engine.exit_codes import FAILED
from engine.observe.schema import scalars
from engine.observe.trackers.background import Background
from engine.observe.trackers.rounds import curves, recordings
from engine.observe.trackers.tracker import Start
from engine.runtime import activity
from engine.runtime.distributed import World, together

if TYPE_CHECKING:
    from engine.train import Run

CLASSES = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio"}
"""Name in `report_to`, of the package to import, and of our module -> the class in our module."""
FILE = "trackers.json"
"""In the output folder: what each tracker calls the run."""


def problems(settings: Settings) -> Iterator[str]:
    """What is asked for and not installed, each with its remedy."""
    for name in settings.report_to:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of the same name, as W&B makes one, is no package
            wanted = "tensorboard" if name == "tensorboard" else "'higgs-engine[trackers]'"
            yield f"report_to: {name} is not installed → pip install {wanted}, or leave {name} out (none: no tracker)"


class Trackers(Callback):
    """All of `report_to`; none on processes that are not the main one.

    Raises:
        ConfigError: one is not installed.
    """

    def __init__(self, settings: Settings, world: World):
        self.settings = settings
        self.names = list(dict.fromkeys(settings.report_to)) if world.is_main else []
        self.members: list[Background] = []
        self._prompts_sent = False
        if self.names and (found := list(problems(settings))):
            raise ConfigError("the settings cannot be used", found)

    def on_start(self, run: "Run", step: int) -> None:
        """Starts them, or raises ConfigError, on all processes."""
        activity.current.outside("start of trackers")
        together(run.world, lambda: self._start(run, step))

    def _start(self, run: "Run", step: int) -> None:
        known, failures = _known(run.output_dir) if step else {}, []
        for name in self.names:
            module = importlib.import_module(f"engine.observe.trackers.{name}")
            try:
                tracker = getattr(module, CLASSES[name])(self._place(name, run.output_dir, step, known.get(name)))
            except Exception as error:  # whatever a tracker's library raises
                failures.append(f"report_to: {name}: {type(error).__name__}: {error} → mend it, or leave {name} out")
                continue
            if tracker.known_as:
                known[name] = tracker.known_as
            self.members.append(Background(name, tracker, run.say))
            run.say(f"tracker: {tracker.where}")
        if failures:
            self.close()
            raise ConfigError("a tracker cannot be started", failures)
        if known:
            write_atomically(run.output_dir / FILE, json.dumps(known, indent=1) + "\n")

    def _place(self, name: str, output_dir: Path, step: int, known_as: str | None) -> Start:
        run_name = self.settings.run_name or output_dir.name
        folder = output_dir / name
        if name == "tensorboard" and self.settings.logging_dir:
            folder = Path(self.settings.logging_dir) / run_name  # several runs may share the folder
        return Start(run_name, output_dir, folder, dataclasses.asdict(self.settings), step, known_as)

    def on_log(self, run: "Run", step: int, values: dict) -> None:
        self._call("scalars", step, dict(scalars(values)))

    def on_evaluate(self, run: "Run", step: int, values: dict) -> None:
        self._call("scalars", step, dict(scalars({f"eval_{name}": value for name, value in values.items()})))

    def on_sample(self, run: "Run", step: int, samples: Sequence[dict]) -> None:
        if not self.members or not samples:
            return
        self._call("scalars", step, dict(curves(samples)))
        self._call("sounds", step, recordings(samples, run.output_dir, with_prompts=not self._prompts_sent))
        self._prompts_sent = True

    def on_end(self, run: "Run", step: int, code: int) -> None:
        self.close(code)

    def _call(self, method: str, *args: object) -> None:
        for member in self.members:
            member.call(method, *args)

    def close(self, code: int = FAILED) -> None:
        """Has everything written; also after a failure, since the process may end without Python's own clearing up."""
        while self.members:
            self.members.pop().close(code)


def _known(output_dir: Path) -> dict[str, str]:
    """What trackers call the run of this folder, from an earlier start."""
    file = output_dir / FILE
    return json.loads(file.read_text()) if file.exists() else {}
