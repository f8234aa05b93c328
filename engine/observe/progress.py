"""What a user sees while a run goes on: one line a logged step, and below them a bar where there is a terminal.

Without a terminal (a file, a pipe, a launcher's log) the lines are plain text, without control characters.
"""

import os
import stat
import sys
import time
from typing import TYPE_CHECKING, TextIO

from engine.callbacks import Callback
from engine.observe.lines import duration, format_evaluation, format_step, thousands
from engine.runtime.distributed import World

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

REDRAW_S = 0.2
"""Between two drawings of the bar: steps may be much shorter."""


class Progress(Callback):
    """The main process's voice; silent on all others. `say` may be called at any time, from any thread."""

    def __init__(self, world: World):
        self.speaks = world.is_main
        self._terminal: TextIO | None = None
        self._bar: Bar | None = None
        self._told: list[str] = []  # of the last logged step
        self._end: float | None = None  # of the run, by time.monotonic
        self._drawn = 0.0

    def say(self, line: str = "") -> None:
        if not self.speaks:
            return
        bar = self._bar  # another thread may stop it meanwhile
        if bar is not None and sys.stdout.isatty():
            # above the bar; the terminal breaks what is too long, so that it can be copied as one line
            bar.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def on_start(self, run, step):
        self._terminal = _terminal() if self.speaks else None

    def on_step(self, run, step, result):
        if time.monotonic() - self._drawn > REDRAW_S or step == run.total:
            self._draw(run, step)

    def on_log(self, run, step, values):
        speed, left, loss = (values.get(name) for name in ("tokens_per_second", "eta_seconds", "loss"))
        told = ["" if loss is None else f"loss {loss:.3f}", "" if speed is None else f"{thousands(speed)} tok/s"]
        self._told, self._end = told, None if left is None else time.monotonic() + left
        self.say(format_step(values, run.total))
        self._draw(run, step)

    def _draw(self, run, step: int) -> None:
        if self._terminal is None:
            return
        if self._bar is None:  # not before: what others print when the run starts would be written into it
            self._bar = _bar(self._terminal, run.total)
        self._drawn = time.monotonic()
        left = [] if self._end is None else [f"eta {duration(max(0.0, self._end - self._drawn))}"]
        told = "  ".join(filter(None, self._told + left))
        self._bar.update(self._bar.task_ids[0], completed=step, told=told, refresh=True)

    def on_evaluate(self, run, step, values):
        self.say(format_evaluation(values, step, run.total))

    def on_end(self, run, step, code):
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was, below the bar; after a failure too."""
        self._terminal = None
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()


def _terminal() -> TextIO | None:
    """Where a bar can be drawn: where the lines go, or beside them if they go to a file."""
    if os.environ.get("TERM") == "dumb":
        return None
    if sys.stdout.isatty():
        return sys.stdout
    # lines that go through a pipe (tee) may come out on the same terminal, and would be written into the bar
    return sys.stderr if sys.stderr.isatty() and _is_file(sys.stdout) else None


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # a stream without a file, closed or in memory
        return False


def _bar(terminal: TextIO, total: int) -> "Bar":
    """One that is drawn by `update` only: a thread that draws might hold its lock when a worker process is forked."""
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[told]}", table_column=Column(no_wrap=True)),
        console=Console(file=terminal), expand=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    bar.add_task("train", total=total, told="")
    bar.start()
    bar.console.show_cursor(True)  # a process that is killed could not bring it back
    return bar
