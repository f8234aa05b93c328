"""`validation_split`: something on both sides, nothing on both, near the share, and the same again."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.data.dataset import Dataset
from engine.data.split import split
from engine.errors import DataError
from tests.data.small_stores import made, write

quick = settings(max_examples=25, deadline=None, derandomize=True)
shares = st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.9]) | st.floats(0.001, 0.999)
seeds = st.integers(0, 2**32 - 1)

Row = tuple[str | None, int | None, int | None]
"""Speaker, number of its reference and of its target."""


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """A data set of stores with such rows, one store for each list."""
    base, count = tmp_path_factory.mktemp("split"), iter(range(10**6))

    def data(*stores: list[Row], chosen=None) -> Dataset:
        made_stores = []
        for rows in stores:
            samples = []
            for number, (speaker, reference, target) in enumerate(rows):
                clips = [clip for clip in (reference, target) if clip is not None]
                kinds = "t" + "h" * (reference is not None) + "t" + "s" * (target is not None)
                samples.append(made(kinds, number, clips, row=10 + number, speaker=speaker))
            made_stores.append(write(base / str(next(count)), samples))
        return Dataset(made_stores, chosen=chosen)

    return data


def columns(stores) -> list[Row]:
    return [row for rows in stores for row in rows]


@st.composite
def rows(draw, speakers=("A", "B", "C", "D", None), references=(100, 101, 102, None)):
    row = st.tuples(st.sampled_from(speakers), st.sampled_from(references), st.integers(0, 9) | st.none())
    return draw(st.lists(st.lists(row, min_size=1, max_size=15), min_size=1, max_size=2))


@quick
@given(rows(), shares, seeds)
def test_both_sides_have_samples_and_no_target_is_on_both(data_of, stores, share, seed):
    table = columns(stores)
    targets = [("none", i) if target is None else target for i, (*_, target) in enumerate(table)]
    assume(len(set(targets)) > 1)
    found = split(data_of(*stores), share, seed)
    assert found.train.dtype == found.evaluation.dtype == np.int64
    assert sorted([*found.train.tolist(), *found.evaluation.tolist()]) == list(range(len(table)))
    assert len(found.train) and len(found.evaluation)
    assert (np.diff(found.train) > 0).all() and (np.diff(found.evaluation) > 0).all()
    sides = [{targets[i] for i in side} for side in (found.train, found.evaluation)]
    assert not sides[0] & sides[1], "a target is trained and evaluated"
    if found.by != "clip":
        keys = [(row[0] if found.by == "speaker" else row[1]) for row in table]
        sides = [{keys[i] for i in side} - {None} for side in (found.train, found.evaluation)]
        assert not sides[0] & sides[1], f"a {found.by} is on both sides"


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), shares, seeds)
def test_the_share_is_met_within_a_factor_of_two(data_of, clips_of_speaker, share, seed):
    table = [(f"speaker {s}", None, 100 * s + i) for s, clips in enumerate(clips_of_speaker) for i in range(clips)]
    assume(len(table) > 1)
    found = split(data_of(table), share, seed)
    wanted = min(max(1, round(share * len(table))), len(table) - 1)
    assert wanted / 2 <= len(found.evaluation) <= 2 * wanted


@pytest.mark.parametrize("table, by", [
    ([("A", None, 1), ("A", None, 2), ("B", None, 3), ("B", None, 4)], "speaker"),
    ([(name, 100, i) for i, name in enumerate("AABBCC")], "speaker"),
    ([("A", 100, 1), ("A", 100, 2), ("A", 101, 3), ("A", 101, 4)], "reference"),
    ([(None, 100, 1), (None, 100, 2), (None, 101, 3), (None, 102, 4)], "reference"),
    ([("A", None, 1), ("A", None, 2), ("A", None, 3)], "clip"),
    ([(None, None, 1), (None, None, 2), (None, None, 2)], "clip"),
    ([("A", 100, 1), ("A", 100, 2), ("A", 100, 3)], "clip"),
    ([(None, 100, 1), (None, 100, 1), (None, 101, 2), (None, 101, 3)], "reference"),  # one target twice
    ([("A", None, 1), ("B", None, 2), ("C", None, 3)], "clip"),  # as many speakers as clips: it is the same
])  # fmt: skip
def test_it_goes_by_the_voice_as_far_as_the_data_tell(data_of, table, by):
    found = split(data_of(table), 0.25, 0)
    assert found.by == by
    key = ("speaker", "reference", "clip").index(by)
    sides = [{table[i][key] for i in side} for side in (found.train, found.evaluation)]
    assert not sides[0] & sides[1]


def test_of_two_speakers_neither_is_set_aside_for_a_small_share(data_of):
    table = [("AB"[i % 2], None, i) for i in range(200)]
    found = split(data_of(table), 0.05, 0)
    assert found.by == "clip" and len(found.evaluation) == 10


def test_a_recording_that_most_rows_have_stays_in_training(data_of):
    table = [(None, None, 0)] * 30 + [(None, None, 1)] * 10
    found = split(data_of(table), 0.1, 0)
    assert found.evaluation.tolist() == list(range(30, 40)), "a single recording is never divided"


def test_speakers_who_share_a_target_go_together(data_of):
    table = [("A", None, 1), ("A", None, 2), ("B", None, 2), ("B", None, 3), ("C", None, 4), ("C", None, 5)]
    for seed in range(10):
        found = split(data_of(table), 0.3, seed)
        assert found.by == "speaker" and found.evaluation.tolist() in ([4, 5], [0, 1, 2, 3])


@quick
@given(rows(), shares, seeds)
def test_the_same_data_and_seed_give_the_same_split(data_of, stores, share, seed):
    assume(len({target for *_, target in columns(stores)} - {None}) > 1)
    one, other = (split(data_of(*stores), share, seed) for _ in range(2))
    assert one.by == other.by and one.evaluation.tolist() == other.evaluation.tolist()


def test_another_seed_sets_others_aside(data_of):
    data = data_of([(f"speaker {i // 3}", None, i) for i in range(60)])
    chosen = [split(data, 0.1, seed).evaluation.tolist() for seed in range(100)]
    assert Counter(len(c) for c in chosen) == {6: 100}, "two speakers of three clips"
    assert len(set(map(tuple, chosen))) > 30
    assert set().union(*chosen) == set(range(60)), "some samples are never set aside"


@pytest.mark.parametrize("table", [[("A", None, 1)], [("A", 100, 1), ("B", 101, 1)]])
def test_data_of_one_recording_cannot_be_split(data_of, table):
    with pytest.raises(DataError, match="all samples have the same target .* → give an eval_data_file, or set it to 0"):
        split(data_of(table), 0.5, 0)


def test_equal_speakers_and_clips_of_several_stores_are_one(data_of):
    stores = [("A", None, 1), ("B", None, 2)], [("A", None, 3), ("B", None, 4), ("C", None, 1), ("D", None, 9)]
    table = columns(stores)
    for seed in range(10):
        found = split(data_of(*stores), 0.4, seed)
        aside = {table[i][0] for i in found.evaluation}
        assert found.by == "speaker" and aside
        assert aside & {"A", "C"} in (set(), {"A", "C"}), "C has a target of A"
        assert {i for i, row in enumerate(table) if row[0] in aside} == set(found.evaluation.tolist())


def test_a_part_of_the_data_is_split_by_its_own_numbers(data_of):
    table = [("A", None, 0), ("B", None, 1), ("A", None, 2), ("B", None, 3), ("C", None, 4), ("C", None, 5)]
    data = data_of(table, chosen=np.array([1, 3, 4, 5]))
    found = split(data, 0.4, 0)
    evaluation, training = data.subset(found.evaluation), data.subset(found.train)
    assert len(evaluation) + len(training) == 4
    names = [{table[row - 10][0] for row in part.rows.tolist()} for part in (evaluation, training)]
    assert not names[0] & names[1]


def test_the_rows_that_were_set_aside_are_named_by_store(data_of, tmp_path):
    data = data_of([("A", None, i) for i in range(4)], [("B", None, 50), ("C", None, 51), ("C", None, 52)])
    found = split(data, 0.4, 1)
    found.write(tmp_path / "split.json", data)
    about = json.loads((tmp_path / "split.json").read_text())
    rows = {str(store.folder): [] for store in data.stores}
    for index in found.evaluation.tolist():
        store, row = (0, index) if index < 4 else (1, index - 4)
        rows[str(data.stores[store].folder)].append(10 + row)
    assert about == {"by": "speaker", "train": len(found.train), "evaluation": len(found.evaluation),
                     "evaluation_rows": rows}  # fmt: skip
