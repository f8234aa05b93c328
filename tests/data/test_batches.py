"""The plan: every sample once an epoch, budgets kept, the same steps on any number of processes and from any start."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batches import BatchPlan
from engine.data.mixture import Mixture

STEP_LIMITS = st.none() | st.integers(1, 60)
quick = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    max_tokens: int | None
    max_samples: int | None
    micro_batches_per_step: int
    epochs: int
    max_steps: int | None
    seed: int

    def plan(self, **changes) -> BatchPlan:
        values = vars(self) | changes
        return BatchPlan(values.pop("lengths"), **values)


@st.composite
def cases(draw, max_steps=STEP_LIMITS):
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=120))
    max_tokens = draw(st.none() | st.integers(max(lengths), 150))
    samples = st.integers(1, 9)
    max_samples = draw(samples if max_tokens is None else st.none() | samples)
    return Case(
        tuple(lengths), max_tokens, max_samples, draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(max_steps),
        draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def micro_batches(steps) -> list[tuple[int, ...]]:
    return [row for step in steps for row in step.micro_batches]


@quick
@given(cases(max_steps=st.none()))
def test_every_epoch_has_every_sample_once(case):
    steps = list(case.plan().steps())
    assert {step.epoch for step in steps} == set(range(case.epochs))
    for epoch in range(case.epochs):
        seen = Counter(i for row in micro_batches(s for s in steps if s.epoch == epoch) for i in row)
        assert seen == Counter(range(len(case.lengths)))


@quick
@given(cases())
def test_no_micro_batch_is_empty_or_over_its_budgets(case):
    for row in micro_batches(case.plan().steps()):
        assert 1 <= len(row) <= (case.max_samples or len(case.lengths))
        assert sum(case.lengths[i] for i in row) <= (case.max_tokens or sum(case.lengths))


@quick
@given(cases())
def test_steps_are_numbered_and_only_the_last_of_an_epoch_is_shorter(case):
    plan = case.plan()
    steps = list(plan.steps())
    assert [s.number for s in steps] == list(range(plan.total_steps))
    assert [s.epoch for s in steps] == sorted(s.epoch for s in steps)
    for step, following in zip(steps, steps[1:], strict=False):
        size = len(step.micro_batches)
        assert 1 <= size <= case.micro_batches_per_step
        assert size == case.micro_batches_per_step or following.epoch == step.epoch + 1


@quick
@given(cases(), st.integers(1, 9))
def test_shares_of_any_number_of_processes_together_are_the_step(case, world_size):
    plan = case.plan()
    rounds = plan.rounds(world_size)
    for step in plan.steps():
        shares = [step.share(rank, world_size, rounds) for rank in range(world_size)]
        assert {len(share) for share in shares} == {rounds}, "the processes would wait for each other forever"
        together = [row for turn in zip(*shares, strict=True) for row in turn]
        assert tuple(row for row in together if row) == step.micro_batches
        assert len(together) < case.micro_batches_per_step + world_size, "a whole round is idle"


@quick
@given(cases(), st.data())
def test_starting_anywhere_is_the_tail_of_the_whole(case, data):
    whole = list(case.plan().steps())
    borders = [s.number for s, t in zip(whole[1:], whole, strict=False) if s.epoch != t.epoch]
    starts = st.integers(0, len(whole) + 2) | (st.sampled_from(borders) if borders else st.nothing())
    start = data.draw(starts)
    assert list(case.plan().steps(start)) == whole[start:]


@quick
@given(cases(max_steps=st.none()), st.integers(1, 200))
def test_max_steps_cuts_or_prolongs_the_same_run(case, max_steps):
    whole, limited = list(case.plan().steps()), list(case.plan(max_steps=max_steps).steps())
    assert len(limited) == max_steps
    shared = min(len(whole), max_steps)
    assert limited[:shared] == whole[:shared]


@quick
@given(cases())
def test_rows_of_an_epoch_depend_on_seed_and_epoch_and_on_nothing_else(case):
    def rows(plan: BatchPlan, epoch: int) -> list[tuple[int, ...]]:
        return [row for step in plan.epoch(epoch) for row in step]

    plan, other = case.plan(), case.plan(micro_batches_per_step=5, epochs=7, max_steps=3)
    later = rows(plan, 2)  # asked for before the others
    np.random.seed(case.seed)
    assert [rows(other, epoch) for epoch in range(3)] == [rows(plan, 0), rows(plan, 1), later]


def test_seeds_and_epochs_give_other_orders():
    case = Case(tuple(range(1, 101)), 200, None, 4, 2, None, 1)
    orders = [case.plan(seed=seed).epoch(epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])


def test_lengths_do_not_decide_which_samples_meet():
    lengths = [100] * 50 + [900] * 50
    plan = BatchPlan(lengths, max_tokens=2000, max_samples=None, micro_batches_per_step=1, epochs=1)
    rows = micro_batches(plan.steps())
    mixed = [row for row in rows if len({lengths[i] for i in row}) == 2]
    assert len(mixed) > len(rows) / 2


def test_rows_are_full_for_a_realistic_mix():
    lengths = np.random.default_rng(0).integers(200, 901, 2000)
    plan = BatchPlan(lengths, max_tokens=4096, max_samples=None, micro_batches_per_step=8, epochs=1)
    rows = micro_batches(plan.steps())
    assert lengths.sum() / (len(rows) * 4096) > 0.9


def test_a_sample_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="a sample of 9 tokens cannot go into a row of 8"):
        BatchPlan([3, 9], max_tokens=8, max_samples=None, micro_batches_per_step=1, epochs=1)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_shuffled_by_other_numbers_than_their_samples(seed):
    order = Mixture([[40]], seed=seed).epoch(1)
    plan = BatchPlan([1] * 40, max_tokens=None, max_samples=1, micro_batches_per_step=1, epochs=2, seed=seed)
    shuffled = [row[0] for (row,) in plan.epoch(1)]
    assert shuffled not in ([*order], [*order[order]]), "the order of samples is applied twice"


# ---- with a mixture of data sets


@st.composite
def mixed(draw, max_steps):
    """A case with the parts of its samples and the weights of its data sets."""
    case = draw(cases(max_steps=max_steps))
    cuts = sorted(draw(st.sets(st.integers(1, len(case.lengths)), max_size=6)) | {0, len(case.lengths)})
    parts = np.diff(cuts).tolist()
    first = draw(st.integers(1, len(parts)))
    blocks = [sizes for sizes in (parts[:first], parts[first:]) if sizes]
    weights = draw(st.none() | st.lists(st.floats(0.1, 3), min_size=len(blocks), max_size=len(blocks)))
    return case, lambda: Mixture(blocks, weights, case.seed)


@quick
@given(mixed(st.none()))
def test_an_epoch_has_what_the_mixture_gives(given_case):
    case, mixture = given_case
    plan, drawn = case.plan(mixture=mixture()), mixture()
    for epoch in range(case.epochs):
        seen = Counter(i for step in plan.epoch(epoch) for row in step for i in row)
        assert seen == Counter(drawn.epoch(epoch).tolist())
        if drawn.weights == [1.0] * len(drawn.sizes):
            assert seen == Counter(range(len(case.lengths)))


@quick
@given(mixed(STEP_LIMITS), st.integers(0, 70))
def test_budgets_hold_and_resuming_is_the_tail_with_a_mixture(given_case, start):
    case, mixture = given_case
    whole = list(case.plan(mixture=mixture()).steps())
    for row in micro_batches(whole):
        assert 1 <= len(row) <= (case.max_samples or len(row))
        assert sum(case.lengths[i] for i in row) <= (case.max_tokens or sum(case.lengths) * len(row))
    assert list(case.plan(mixture=mixture()).steps(start)) == whole[start:]


def test_a_store_in_parts_is_read_nearly_part_by_part():
    parts, size = 40, 500
    lengths = np.random.default_rng(0).integers(1000, 3000, parts * size)
    plan = BatchPlan(lengths, max_tokens=4096, max_samples=None, micro_batches_per_step=1, epochs=1,
                     mixture=Mixture([[size] * parts]))  # fmt: skip
    part_of_row = [{i // size for i in row} for row in micro_batches(plan.steps())]
    for start in range(0, len(part_of_row), 100):
        assert len(set().union(*part_of_row[start : start + 100])) <= 16, "reading jumps over the whole store"


@quick
@given(cases(), st.data())
def test_what_lies_before_a_step_is_what_the_steps_had(case, data):
    """Samples seen by a run that is resumed there, and the share of epochs that each step leaves behind."""
    plan = case.plan()
    steps = list(plan.steps())
    start = data.draw(st.integers(0, len(steps)))
    seen = [int(i) for part in plan.samples_before(start) for i in part]
    assert seen == [i for step in steps[:start] for row in step.micro_batches for i in row]
    for before, step in zip(steps, steps[1:], strict=False):
        assert before.epochs_done < step.epochs_done <= step.epoch + 1
    for epoch in {step.epoch for step in steps}:
        of_epoch = [step for step in steps if step.epoch == epoch]
        if len(of_epoch) == len(plan.epoch(epoch)):
            assert of_epoch[-1].epochs_done == epoch + 1
