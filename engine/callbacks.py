"""What a run tells others while it goes on. Ours (trackers, samples, report, ...) use it, and so may yours:

    # my_hooks.py, used with --callbacks my_hooks.py:Bell
    from engine.callbacks import Callback

    class Bell(Callback):
        def on_log(self, run, step, values):
            if values["loss"] is not None and values["loss"] < 2:
                run.say("ding")
                run.ask_to_stop("the loss is below 2")

Every hook is called on every process, with the same numbers and in the same order (yours before ours), so a hook may
use collectives, and one that acts alone asks `run.world.is_main`. What a hook raises ends the run like any error.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.higgs_engine import StepResult
    from engine.train import Run


class Callback:
    """Hooks that do nothing; override what you need.

    `run` is the Run of engine/train.py. Meant for hooks are its `settings`, `world`, `output_dir`, `total` (steps),
    `data` (RunData), `engine` (HiggsEngine), `say(line)`, which prints on the main process, and `ask_to_stop(why)`:
    the run then saves and ends after this step as if it were complete. All processes have to ask alike. What takes
    long belongs into `with run.meter.paused():`, and is not counted as time of the steps then.
    """

    def on_start(self, run: "Run", step: int) -> None:
        """Before the first step; `step` have been done by the run that is resumed, 0 of a new one."""

    def on_step(self, run: "Run", step: int, result: "StepResult") -> None:
        """Each optimizer step, counted from 1. `result` is on the device: to read a number waits for it."""

    def on_log(self, run: "Run", step: int, values: dict) -> None:
        """Each logged step, with the metrics of engine/observe/schema.py. What a hook adds to them is logged too."""

    def on_evaluate(self, run: "Run", step: int, values: dict) -> None:
        """Each evaluation: metrics of the held-out data, without their `eval_`; None where they are not finite."""

    def on_sample(self, run: "Run", step: int, samples: Sequence[dict]) -> None:
        """Each round of generated speech: lines of `samples/samples.jsonl` (engine/evaluate/sampler.py)."""

    def on_save(self, run: "Run", step: int, folder: Path) -> None:
        """A checkpoint is complete under its name; when saved in the background, some steps later."""

    def on_end(self, run: "Run", step: int, code: int) -> None:
        """The last thing of a run that ends by itself or was stopped; `code`: engine/exit_codes.py."""

    def close(self) -> None:
        """Always at last, after an error too: lets go of files, threads, connections. Not the place for collectives."""


class Callbacks(Callback):
    """Several as one, in their order."""

    def __init__(self, members: Iterable[Callback]):
        self.members = list(members)

    def on_start(self, run, step):
        for member in self.members:
            member.on_start(run, step)

    def on_step(self, run, step, result):
        for member in self.members:
            member.on_step(run, step, result)

    def on_log(self, run, step, values):
        for member in self.members:
            member.on_log(run, step, values)

    def on_evaluate(self, run, step, values):
        for member in self.members:
            member.on_evaluate(run, step, values)

    def on_sample(self, run, step, samples):
        for member in self.members:
            member.on_sample(run, step, samples)

    def on_save(self, run, step, folder):
        for member in self.members:
            member.on_save(run, step, folder)

    def on_end(self, run, step, code):
        for member in self.members:
            member.on_end(run, step, code)

    def close(self):
        with contextlib.ExitStack() as all_of_them:  # whatever one of them raises
            for member in reversed(self.members):
                all_of_them.callback(member.close)


def load(specs: Sequence[str]) -> list[Callback]:
    """A user's callbacks, from `path.py:Class`; each class is made without arguments.

    Raises:
        ConfigError: a file, a class in it, or what it makes is not what it should be; all in one message.
    """
    found, problems = [], []
    for spec in specs:
        try:
            found.append(_load(spec))
        except _NotUsable as error:
            problems.append(f"callbacks: {spec}: {error}")
    if problems:
        raise ConfigError("the settings cannot be used", problems)
    return found


class _NotUsable(Exception):
    pass


def _load(spec: str) -> Callback:
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not name or path.suffix != ".py" or not path.is_file():
        raise _NotUsable("there is no such file → give path.py:Class")
    module_name = f"higgs_engine_callbacks_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
        made = getattr(module, name)() if hasattr(module, name) else None
    except Exception as error:
        raise _NotUsable(f"{type(error).__name__}: {error} → mend the file") from error
    if made is None:
        raise _NotUsable(f"{path.name} has no {name} → one of its classes")
    if not isinstance(made, Callback):
        raise _NotUsable("is no engine.callbacks.Callback → let the class inherit from it")
    return made
