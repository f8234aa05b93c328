"""Opening a store: nothing is read at once, any process can, and no damage goes unnoticed."""

import multiprocessing
import pickle

import numpy as np
import pytest

from engine.data.labels import Sample
from engine.data.store import FORMAT_VERSION, HEADER, Store, StoreWriter, is_store, publish_store
from engine.errors import DataError
from tests.data.small_stores import EXAMPLE, SPECIAL, STREAM, assert_equal, made, write

ARRAYS = ("samples", "text_ids", "trained", "clip_ids", "clip_use", "codes", "clip_ends", "clip_keys")


def test_opening_reads_no_array(tmp_path):
    store = write(tmp_path / "store", EXAMPLE, 2)
    for part in store.parts:
        arrays = [value for value in vars(part).values() if value is not None]
        assert len(arrays) == len(ARRAYS) and all(isinstance(array.base, np.memmap) for array in arrays)


def sample_of(store: Store, index: int) -> Sample:
    return store.sample(index)


def test_a_store_is_sent_as_its_path_and_read_by_another_process(tmp_path):
    store = write(tmp_path / "store", EXAMPLE, 2)
    assert len(pickle.dumps(store)) < 500
    with multiprocessing.get_context("fork").Pool(1) as pool:
        samples = pool.starmap(sample_of, [(store, index) for index in range(len(store))])
    for index, sample in enumerate(samples):
        assert_equal(sample, store.sample(index))
    again = pickle.loads(pickle.dumps(store))
    assert again.header == store.header and again.folder == store.folder


def test_a_closed_store_takes_the_place_of_another(tmp_path):
    out, other = write(tmp_path / "out", EXAMPLE, 2).folder, write(tmp_path / "other", EXAMPLE[:1])
    publish_store(other.folder, out)
    assert len(Store(out)) == 1 and not other.folder.exists() and not (out / "part-00001").exists()


def test_a_store_that_was_not_closed_is_none(tmp_path):
    folder = tmp_path / "draft"
    folder.mkdir()
    StoreWriter(folder, {}, SPECIAL, STREAM).add(EXAMPLE[0].prompt, list(EXAMPLE[0].clips), 0, None)
    assert not is_store(folder) and is_store(write(tmp_path / "closed", EXAMPLE, 2).folder)
    with pytest.raises(DataError, match="not a prepared store .* → `higgs-engine prepare` makes one"):
        Store(folder)


# ---- damage


@pytest.mark.parametrize("header, message", [
    (None, "not a prepared store .*No such file.* → `higgs-engine prepare` makes one"),
    ("", "not a prepared store"), ('{"format_version": 1', "not a prepared store"), ("[1]", "not a prepared store"),
    ("{}", f"format version None, this engine reads {FORMAT_VERSION} → prepare it again"),
    (f'{{"format_version": {FORMAT_VERSION}}}', "header.json: damaged .* → prepare the store again"),
    ('{"format_version": 99}', f"format version 99, this engine reads {FORMAT_VERSION} → prepare it again"),
])  # fmt: skip
def test_a_header_that_is_none_is_told(tmp_path, header, message):
    if header is not None:
        (tmp_path / HEADER).write_text(header)
    with pytest.raises(DataError, match=message):
        Store(tmp_path)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "no header": lambda file: file.write_bytes(bytes(256) + file.read_bytes()[256:]),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("array", ARRAYS)
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, array, damage):
    file = write(tmp_path / "store", EXAMPLE, 2).folder / "part-00001" / f"{array}.npy"
    DAMAGES[damage](file)
    with pytest.raises(DataError, match=rf"{file}: cannot be read \(.*\) → prepare the store again, or copy all of it"):
        Store(file.parent.parent)


@pytest.mark.parametrize("array", ["samples", "codes", "clip_ends"])
def test_an_array_of_another_length_is_noticed(tmp_path, array):
    file = write(tmp_path / "store", EXAMPLE, 2).folder / "part-00000" / f"{array}.npy"
    np.save(file, np.load(file)[:-1])
    with pytest.raises(DataError, match=rf"{array}.npy: has \d+ rows, the header says \d+ → prepare the store again"):
        Store(file.parent.parent)


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_lost_speakers_are_told_when_they_are_asked_for(tmp_path, damage):
    store = write(tmp_path / "store", EXAMPLE, 2)
    DAMAGES[damage](store.folder / "speakers.json")
    with pytest.raises(DataError, match="speakers.json: cannot be read .* → prepare the store again"):
        Store(store.folder).speakers()


def test_a_lost_spectrogram_file_is_noticed(tmp_path):
    store = write(tmp_path / "store", [made("hs", 0, [0, 1], mels=True)], mels=True)
    (store.folder / "part-00000" / "mels.npy").unlink()
    with pytest.raises(DataError, match="mels.npy: cannot be read .* → prepare the store again, or copy all of it"):
        Store(store.folder)
