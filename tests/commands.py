"""Commands of the engine in the test's own process: their exit code, and what they say."""

import contextlib
import io
import os
from typing import NamedTuple
from unittest import mock

import torch

from engine.cli import main
from engine.runtime.distributed import World, shutdown

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Said(NamedTuple):
    code: int
    out: str
    errors: str


def flags(**settings) -> list[str]:
    """The settings as they stand on a command line; a list gives all its values."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [str(word) for name, values in lists.items() for word in (f"--{name}", *values)]


def command(name: str, *words: object, **settings) -> Said:
    """`higgs-engine NAME WORDS --SETTING VALUE ...`, of no launcher; what a failed run leaves is cleared away."""
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | {"DS_ACCELERATOR": "cpu"}
    out, errors = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, alone, clear=True):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = main([name, *map(str, words), *flags(**settings)])
            except SystemExit as exit:  # of argparse
                code = exit.code
            finally:
                shutdown(World(0, 0, 1, torch.device("cpu")))
    return Said(code, out.getvalue(), errors.getvalue())


def done(name: str, *words: object, **settings) -> str:
    """What a command says that must succeed."""
    said = command(name, *words, **settings)
    assert said.code == 0, said.errors
    return said.out
