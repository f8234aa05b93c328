"""The learning rate against hand-computed values."""

import math

import pytest

from engine.config import Settings
from engine.schedule import learning_rate


def rates(kind, warmup, total):
    settings = Settings(learning_rate=1.0, warmup_steps=warmup, lr_scheduler_type=kind)
    return [learning_rate(settings, step, total) for step in range(total)]


def test_the_warmup_rises_from_the_first_step_to_the_peak():
    assert rates("constant", 4, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_towards_zero_and_never_wastes_a_step_at_it():
    assert rates("linear", 1, 5) == [1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine():
    assert rates("cosine", 0, 4) == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])


def test_a_warmup_longer_than_the_run_never_reaches_the_peak():
    assert rates("linear", 10, 2) == [0.1, 0.2]
