"""The prepared store: the very samples that were put in, clips once, and the same bytes again."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.npy import NpyAppender
from engine.data.store import HEADER, Store, StoreWriter
from tests.data.small_stores import EXAMPLE, SPECIAL, STREAM, assert_equal, clip, made, write

quick = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def contents(draw, parts: int):
    """Samples of any turns; few clips, so that many are shared."""
    seeds = st.integers(0, 2**32 - 1)
    added, mels = [], draw(st.booleans())
    for row in range(draw(st.integers(1, 8))):
        kinds = draw(st.text("ths", max_size=7))
        clips = [draw(st.integers(0, 4)) for _ in kinds]
        more = dict(
            row=3 * row, speaker=draw(st.sampled_from([None, "Ann", "Bo"])), part=draw(st.integers(0, parts - 1))
        )
        added.append(made(kinds, draw(seeds), clips, mels=mels, trained=draw(st.booleans()), **more))
    return added, mels


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A new path at each call."""
    base, count = tmp_path_factory.mktemp("stores"), iter(range(10**6))
    return lambda: base / str(next(count))


# ---- what comes back


@quick
@given(contents(parts=3))
def test_samples_come_back_as_they_were(folders, given_contents):
    added, mels = given_contents
    store = write(folders(), added, 3, mels)
    in_order = sorted(added, key=lambda one: one.part)
    assert len(store) == len(added)
    for index, one in enumerate(in_order):
        assert_equal(store.sample(index), one.sample)


@quick
@given(contents(parts=3))
def test_records_say_what_the_samples_are(folders, given_contents):
    added, mels = given_contents
    store, names = write(folders(), added, 3, mels), []
    records, (contexts, targets) = store.records, store.first_clips()
    in_order = sorted(added, key=lambda one: one.part)
    filled = sorted({one.part for one in added})
    assert store.part_of_sample.tolist() == [filled.index(one.part) for one in in_order]
    names = store.speakers()
    for record, one, context, target in zip(records, in_order, contexts, targets, strict=True):
        sample = one.sample
        assert record["length"] == len(sample) and record["audio_frames"] == len(sample.audio_ids)
        assert record["text_targets"] == sample.text_targets and record["row"] == one.row
        assert (sample.audio_targets == record["audio_targets"]).all()
        assert (names[record["speaker"]] if record["speaker"] >= 0 else None) == one.speaker
        used = list(zip([bytes.fromhex(key) for key, *_ in one.clips], one.prompt.trained, strict=True))
        assert context == next((key for key, trained in used if not trained), None)
        assert target == next((key for key, trained in used if trained), None)


def test_a_clip_of_many_samples_is_there_once(folders):
    added = [made("hts", seed, [0, 1 + seed % 2], row=seed) for seed in range(20)]
    store = write(folders(), added)
    frames = sum(clip(number)[1].shape[1] for number in range(3))
    assert [(part["clips"], part["frames"]) for part in store.header["parts"]] == [(3, frames)]
    assert store.parts[0].codes.shape == (frames, 3) and len(store.parts[0].clip_keys) == 3


def test_a_clip_that_is_heard_in_one_place_and_not_in_another(folders):
    added = [made("hts", 0, [0, 0], mels=True), made("hts", 1, [0, 1], row=1), made("hs", 2, [0, 0], row=2, mels=True)]
    store = write(folders(), added, mels=True)
    for index, one in enumerate(added):
        assert_equal(store.sample(index), one.sample)
    assert len(store.parts[0].mels) == len(clip(0, mel=True)[2]), "its spectrogram is there once"


def test_parts_that_got_nothing_are_left_out(folders):
    store = write(folders(), [made("ts", 0, [0], part=2)], parts=4)
    assert [part["folder"] for part in store.header["parts"]] == ["part-00002"]
    assert sorted(path.name for path in store.folder.iterdir()) == ["header.json", "part-00002", "speakers.json"]


def test_a_sample_beyond_the_last_is_an_index_error(folders):
    store = write(folders(), EXAMPLE, 2)
    with pytest.raises(IndexError):
        store.sample(len(EXAMPLE))


def test_a_sample_that_does_not_fit_leaves_no_trace(folders):
    folder = folders()
    folder.mkdir()
    writer = StoreWriter(folder, {}, SPECIAL, STREAM)
    bad = EXAMPLE[0]
    with pytest.raises(ValueError, match="2 audio placeholders, but codes of 1 clips"):
        writer.add(bad.prompt, list(bad.clips[:1]), 0, None)
    writer.add(bad.prompt, list(bad.clips), bad.row, None)
    writer.close()
    assert_equal(Store(folder).sample(0), bad.sample)


@pytest.mark.parametrize("name", ["李雷", "", "a\nb", "half a \ud83d"])
def test_any_name_of_a_speaker_is_kept(folders, name):
    assert write(folders(), [made("ts", 0, [0], speaker=name)]).speakers() == [name]


# ---- files


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_writing_twice_gives_the_same_bytes(folders):
    one, two = write(folders(), EXAMPLE, 2, made_from="x"), write(folders(), EXAMPLE, 2, made_from="x")
    assert contents_of(one.folder) == contents_of(two.folder) and one.header["made_from"] == "x"


def test_the_fingerprint_is_of_samples_and_their_order(folders):
    def fingerprint(added, parts=2):
        return write(folders(), added, parts).fingerprint

    same = fingerprint(EXAMPLE)
    other_row = [*EXAMPLE[:3], made("thhs", 4, [0, 1, 1], row=9, speaker="Ann")]
    other_clip = [*EXAMPLE[:3], made("thhs", 4, [0, 1, 2], row=8, speaker="Ann")]
    others = [fingerprint(EXAMPLE[::-1]), fingerprint(EXAMPLE[:3]), fingerprint(other_row), fingerprint(other_clip)]
    assert len({same, *others}) == 5 and fingerprint(EXAMPLE, parts=3) == same


def test_every_file_is_one_that_numpy_loads(folders):
    store = write(folders(), [made("hts", 0, [0, 1], mels=True), EXAMPLE[2]], 2, mels=True)
    files = sorted((store.folder / "part-00000").glob("*.npy"))
    arrays = {file.stem: np.load(file, allow_pickle=False) for file in files}
    mel = clip(0, mel=True)[2]
    np.testing.assert_array_equal(arrays["mels"], mel)
    assert arrays["mel_ends"].tolist() == [len(mel)] * 2, "a spoken clip has no spectrogram"
    np.testing.assert_array_equal(arrays["codes"], np.concatenate([clip(0)[1], clip(1)[1]], 1).T)
    assert arrays["codes"].dtype == np.int16 and len(arrays) == 10
    assert arrays["clip_keys"].tobytes().hex() == clip(0)[0] + clip(1)[0]


@pytest.mark.parametrize(
    "dtype, shape", [("<i4", ()), ("<i2", (8,)), ("<f2", (3, 2)), ([("a", "<i8"), ("b", "?")], ())]
)
@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 3]])
def test_rows_are_appended_to_an_npy_file(tmp_path, dtype, shape, sizes):
    rng = np.random.default_rng(0)
    rows = [np.frombuffer(rng.bytes(0), dtype).reshape(0, *shape)]
    rows += [rng.integers(0, 2, (size, *shape)).astype(np.dtype(dtype)) for size in sizes]
    digests = []
    for name in "ab":
        file = NpyAppender(tmp_path / name, dtype, shape)
        for part in rows if name == "a" else [np.concatenate(rows)]:
            file.append(part)
        assert file.length == sum(sizes)
        digests.append(file.close())
    assert digests[0] == digests[1] and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for mode in (None, "r"):
        np.testing.assert_array_equal(np.load(tmp_path / "a", mmap_mode=mode, allow_pickle=False), np.concatenate(rows))


def test_rows_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"codes.npy: rows have shape \(3,\), not \(8,\)"):
        NpyAppender(tmp_path / "codes.npy", "<i2", (8,)).append(np.zeros((2, 3)))


def test_the_header_is_for_people_too(folders):
    header = json.loads((write(folders(), EXAMPLE, 2, rejected=3).folder / HEADER).read_text())
    assert header["samples"] == 4 and header["rejected"] == 3 and header["identity"] == {"made": "so"}
    assert header["special"] == {"audio_in": 100, "audio_out": 101} and header["stream"]["codebooks"] == 3
