"""Python's garbage collector, at chosen steps instead of whenever it likes.

A full collection walks through every object of the process, some tenths of a second with torch and a model loaded. Left
to itself it comes on one process now and on another then, and each time all of them wait at the next collective.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 100
"""Steps between collections. What waits for one is cycles only; all else is freed at once, as ever."""


@contextmanager
def at_chosen_steps() -> Iterator[Callable[[int], None]]:
    """No collection in here but by `collect(step)`, the same steps on all processes.

    What exists already is set aside, and not looked at again: a collection then costs what was made since.
    """
    automatic = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % EVERY == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if automatic:
            gc.enable()
