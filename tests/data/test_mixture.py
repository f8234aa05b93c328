"""The mixture: each data set gives an epoch its share, no sample falls behind, and parts are passed through in turn."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.mixture import WINDOW, Mixture

quick = settings(max_examples=60, deadline=None, derandomize=True)
parts = st.lists(st.integers(1, 12), min_size=1, max_size=9)
seeds = st.integers(0, 2**32 - 1)
weights = st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.7]) | st.floats(0.01, 4)


@dataclass(frozen=True)
class Case:
    blocks: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.blocks, self.weights, self.seed)

    @property
    def ranges(self) -> list[range]:
        """The sample numbers of each data set."""
        ends = np.cumsum([sum(sizes) for sizes in self.blocks]).tolist()
        return [range(end - sum(sizes), end) for end, sizes in zip(ends, self.blocks, strict=True)]


@st.composite
def cases(draw, weights=weights):
    blocks = draw(st.lists(parts, min_size=1, max_size=4))
    drawn = draw(st.lists(weights, min_size=len(blocks), max_size=len(blocks)))
    return Case(tuple(map(tuple, blocks)), tuple(drawn), draw(seeds))


@quick
@given(st.lists(parts, min_size=1, max_size=4), seeds, st.integers(0, 5))
def test_without_weights_an_epoch_has_every_sample_once(blocks, seed, epoch):
    drawn = Mixture(blocks, None, seed).epoch(epoch)
    assert drawn.dtype == np.int64
    assert sorted(drawn.tolist()) == list(range(sum(map(sum, blocks))))


@quick
@given(cases(), st.integers(1, 6))
def test_each_data_set_gives_its_share_and_none_of_its_samples_falls_behind(case, epochs):
    mixture, seen = case.mixture, Counter()
    for epoch in range(epochs):
        drawn = mixture.epoch(epoch).tolist()
        for numbers, weight in zip(case.ranges, case.weights, strict=True):
            wanted = max(1, round(weight * len(numbers)))
            assert sum(number in numbers for number in drawn) == wanted
        seen.update(drawn)
        for numbers in case.ranges:
            counts = [seen[number] for number in numbers]
            assert max(counts) - min(counts) <= 1, "one sample is seen more often than another"


@quick
@given(cases(), st.integers(0, 4))
def test_an_epoch_depends_on_its_arguments_only(case, epoch):
    mixture = case.mixture
    order = mixture.epoch(epoch).tolist()
    for other in range(3):
        mixture.epoch(other)
    np.random.seed(0)
    assert mixture.epoch(epoch).tolist() == order == case.mixture.epoch(epoch).tolist()


def test_seeds_epochs_and_data_sets_have_their_own_order():
    orders = [Mixture([[50], [50]], None, seed).epoch(epoch) for seed in (1, 2) for epoch in (0, 1)]
    orders = [order[order // 50 == source] % 50 for order in orders for source in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


@quick
@given(parts, seeds, st.integers(0, 5))
def test_parts_are_passed_through_a_few_at_a_time(sizes, seed, epoch):
    order = Mixture([sizes], None, seed).epoch(epoch)
    part = np.repeat(np.arange(len(sizes)), sizes)[order].tolist()
    passed: set[int] = set()
    while part:  # as the parts of a window are mixed, the first ones to come are those of the window
        window = set(list(dict.fromkeys(part))[:WINDOW])
        size = sum(sizes[p] for p in window)
        assert set(part[:size]) == window and not passed & window
        passed, part = passed | window, part[size:]
    assert passed == set(range(len(sizes)))


def test_samples_mix_within_a_window():
    sizes = [100] * WINDOW
    order = Mixture([sizes], None, 0).epoch(0)
    halves = np.bincount(order[: 50 * WINDOW] // 100, minlength=WINDOW)
    assert (halves > 30).all(), "one part after the other, not mixed"


def test_parts_come_in_another_order_each_epoch():
    mixture = Mixture([[1] * 40], None, 0)
    assert mixture.epoch(0).tolist() != mixture.epoch(1).tolist() != list(range(40))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.2, 1.0), (3.0, 0.5)])
def test_data_sets_are_spread_evenly_over_the_epoch(weights):
    mixture = Mixture([[500], [100, 100]], weights, 3)
    first = mixture.epoch(1) < 500
    share = first.mean()
    for stretch in np.array_split(first, 5):
        assert abs(stretch.sum() - share * len(stretch)) <= 2


def test_a_small_data_set_with_a_small_weight_still_comes():
    assert Mixture([[3], [50]], [0.01, 1.0], 0).share(0) == 1
    seen = [[n for n in Mixture([[3], [50]], [0.01, 1.0], 0).epoch(e).tolist() if n < 3] for e in range(3)]
    assert sorted(n for epoch in seen for n in epoch) == [0, 1, 2]
