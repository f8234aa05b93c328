"""Prepared stores and the cache of codes: samples as they are, a DataError that names the file, or codes made anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.code_cache import CodeCache, Encoded
from engine.data.labels import Sample
from engine.data.store import HEADER, Store
from engine.errors import DataError
from tests.data.small_stores import STREAM, made, write
from tests.fuzz.hostile import as_json, changed, damaged
from tests.fuzz.watched import inputs, little_memory, outcome

KEYS = [f"{number:064x}" for number in range(4)]
ENDS = ("samples", "clip_ids", "clip_ends", "clip_use", "mel_ends")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "store"
    added = [made("tthts", seed, [seed, 7], row=seed, speaker="ann", part=seed % 2, mels=True) for seed in range(5)]
    write(folder, added, 2, mels=True)
    with little_memory():
        assert use(folder) == 5
        yield folder


def use(folder: Path) -> int:
    """What a run does with a store."""
    store = Store(folder)
    records, parts, _, _ = store.records, store.part_of_sample, store.speakers(), store.first_clips()
    assert len(records) == len(parts) == len(store) and isinstance(store.fingerprint, str)
    for index in range(len(store)):
        sample = store.sample(index)
        assert isinstance(sample, Sample) and len(sample) == records["length"][index]
        assert ((sample.audio_ids >= 0) & (sample.audio_ids <= STREAM.eos)).all()
    return len(store)


def check(store: Path, file: Path, content: bytes) -> None:
    before = file.read_bytes()
    try:
        file.write_bytes(content)
        found = outcome(lambda: use(store))
        assert isinstance(found, int | DataError)
        assert isinstance(found, int) or str(store) in str(found)
    finally:
        file.write_bytes(before)


@inputs(250)
@given(st.data())
def test_headers_with_odd_values(store, data):
    header = json.loads((store / HEADER).read_text())
    check(store, store / HEADER, as_json(data.draw(changed(header))))


@inputs(100)
@given(st.data(), st.sampled_from((HEADER, "speakers.json")))
def test_damaged_headers(store, data, name):
    check(store, store / name, data.draw(damaged((store / name).read_bytes())))


@inputs(200)
@given(st.data())
def test_damaged_arrays(store, data):
    file = data.draw(st.sampled_from(sorted(store.glob("part-*/*.npy"))))
    end = data.draw(st.sampled_from((10, 100, None)))
    check(store, file, data.draw(damaged(file.read_bytes(), end=end)))


@inputs(200)
@given(st.data())
def test_arrays_of_odd_numbers(store, data):
    file = store / "part-00000" / f"{data.draw(st.sampled_from(ENDS))}.npy"
    array = np.load(file).copy()
    flat = array.view("u1").reshape(len(array), -1)
    row = data.draw(st.integers(0, len(array) - 1))
    at = data.draw(st.integers(0, flat.shape[1] - 1))
    flat[row, at : at + 8] = data.draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
    head = file.read_bytes()[: -array.nbytes]
    check(store, file, head + array.tobytes())


@inputs(150)
@given(st.data())
def test_damaged_shards_of_the_cache(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("cache")
    cache = CodeCache(root, "codec")
    for at in (0, 2):
        cache.put([Encoded(key, np.arange(24, dtype=np.int16).reshape(8, 3)) for key in KEYS[at : at + 2]])
    shard = sorted(cache.folder.iterdir())[0]
    end = data.draw(st.sampled_from((8, 400, None)))
    content = data.draw(damaged(shard.read_bytes(), end=end))
    shard.unlink()
    shard.write_bytes(content)

    def use() -> list:
        cache = CodeCache(root, "codec")
        return [(cache.get(key), cache.frames(key), cache.facts(key)) for key in KEYS]

    found = outcome(use, may_change=cache.folder)
    assert all(codes is not None for codes, *_ in found[2:]), "the undamaged shard is lost"
    for codes, frames, _ in found:
        assert codes is None and frames is None or codes.shape == (8, frames) or codes.shape[1] == frames
    shutil.rmtree(root)
