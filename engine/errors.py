"""What the engine raises when a user's setting, data or checkpoint is wrong.

Every message says where (setting, file, row), what, and the remedy. Several mistakes travel in one
exception, so that a user mends them all before the next attempt.
"""

from collections.abc import Iterable

from engine.exit_codes import DIVERGED, FAILED, MISTAKE


class EngineError(Exception):
    """A mistake that its reader can mend; the command line prints it without a traceback.

    Args:
        heading: what was being done or read.
        problems: one line for each mistake; at most `shown` are printed, the rest are counted.

    Attributes:
        code: the exit code of a process that ends with it.
    """

    shown = 25
    code = MISTAKE

    def __init__(self, heading: str, problems: Iterable[str] = ()):
        self.heading = heading
        self.problems = list(problems)
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [f"  - {problem}" for problem in self.problems[: self.shown]]
        if len(self.problems) > self.shown:
            lines.append(f"  … and {len(self.problems) - self.shown} more")
        return "\n".join([self.heading, *lines])

    def __reduce__(self):
        return type(self), (self.heading, self.problems)


class ConfigError(EngineError):
    """A setting, or a combination of settings, that cannot be used."""


class DataError(EngineError):
    """A data file, row or recording that cannot be trained on."""


class ModelError(EngineError):
    """A model or codec directory that cannot be loaded."""


class CheckpointError(EngineError):
    """A checkpoint that is incomplete, foreign to this run, or cannot be written."""


class Interrupted(EngineError):
    """A run that was cut short by what a restart may mend: a process or a machine that is gone, a disk that failed."""

    code = FAILED


class Diverged(EngineError):
    """Too many optimizer steps in a row whose numbers went wrong."""

    code = DIVERGED
