"""Garbage is collected at chosen steps of a run, and as before when it is over."""

import gc
import weakref

import pytest

from engine.runtime.garbage import EVERY, at_chosen_steps


class Cycle:
    def __init__(self):
        self.me = self


def test_cycles_go_at_chosen_steps_only():
    with at_chosen_steps() as collect:
        assert not gc.isenabled()
        gone = weakref.ref(Cycle())
        collect(EVERY + 1)
        assert gone() is not None
        collect(2 * EVERY)
        assert gone() is None
    assert gc.isenabled() and not gc.get_freeze_count()


def test_a_run_that_fails_leaves_the_collector_as_it_was():
    with pytest.raises(ValueError), at_chosen_steps():
        raise ValueError
    assert gc.isenabled()
