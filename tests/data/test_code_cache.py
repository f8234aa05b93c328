"""The code cache: what was put comes back, shards are complete or absent, and processes do not disturb each other."""

import hashlib
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from engine.data import code_cache
from engine.data.audio_checks import FACTS, AudioFacts
from engine.data.code_cache import CodeCache, Encoded

CODEC = "c0dec" * 10


@pytest.fixture
def cache(tmp_path):
    return CodeCache(tmp_path / "cache", CODEC)


def key_of(name) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def codes(*shape) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def facts(seconds: float) -> AudioFacts:
    return AudioFacts.from_array(np.arange(FACTS, dtype=np.float32) + np.float32(seconds))


def shards(cache) -> list:
    return sorted(cache.folder.iterdir())


def test_what_was_put_comes_back_in_this_process_and_in_others(cache, tmp_path):
    items = [Encoded(key_of(n), codes(8, n) + n, None if n == 3 else facts(n)) for n in range(1, 6)]
    cache.put(items[:2])
    cache.put(items[2:])
    for reader in (cache, CodeCache(tmp_path / "cache", CODEC)):
        assert len(reader) == 5
        for key, expected, measured in items:
            got = reader.get(key)
            assert got.dtype == np.int16 and got.flags.c_contiguous and np.array_equal(got, expected)
            assert key in reader and reader.frames(key) == expected.shape[1] and reader.facts(key) == measured
    assert len(shards(cache)) == 2


def test_an_unknown_key_is_absent(cache, tmp_path):
    for _ in range(2):
        assert key_of("a") not in cache
        assert cache.get(key_of("a")) is cache.frames(key_of("a")) is cache.facts(key_of("a")) is None
        cache.put([Encoded(key_of("b"), codes(8, 2))])
    assert key_of("b") not in CodeCache(tmp_path / "cache", "another codec")


def test_nothing_put_writes_nothing(cache):
    cache.put([])
    assert not cache.folder.exists()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(0, 15))
def test_keys_that_begin_alike_are_told_apart(tmp_path_factory, pairs, wanted):
    """Eight equal bytes are what the index sorts by; all 32 count."""
    cache = CodeCache(tmp_path_factory.mktemp("cache"), CODEC)
    expected = {}
    for number, (head, tail) in enumerate(pairs):
        key = f"{head:016x}" + f"{tail:048x}"
        cache.put([Encoded(key, np.full((2, 3), number, np.int16))])
        expected.setdefault(key, number)
    asked = f"{wanted // 4:016x}" + f"{wanted % 4:048x}"
    found = cache.get(asked)
    assert (None if found is None else found[0, 0]) == expected.get(asked)


def test_of_duplicates_the_oldest_is_kept_whoever_opens_the_cache(cache, tmp_path):
    for number in range(5):
        cache.put([Encoded(key_of("a"), np.full((8, 4), number, np.int16))])
    for reader in (cache, CodeCache(tmp_path / "cache", CODEC)):
        assert reader.get(key_of("a")).max() == 0 and len(reader) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        [codes(8, 0)],
        [codes(8)],
        [codes(8, 5).astype(np.int64)],
        [codes(8, 5), codes(4, 5)],
    ],
)
def test_the_cache_takes_codes_only(cache, wrong):
    with pytest.raises(ValueError, match="expected int16 codes"):
        cache.put([Encoded(key_of(n), array) for n, array in enumerate(wrong)])
    with pytest.raises(ValueError, match="content key|hexadecimal"):
        cache.put([Encoded("ab12", codes(8, 5))])
    assert not cache.folder.exists()


def test_an_interrupted_write_leaves_the_cache_as_it_was(cache, monkeypatch):
    cache.put([Encoded(key_of("a"), codes(8, 5))])

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        cache.put([Encoded(key_of("b"), codes(8, 5))])
    assert key_of("b") not in cache and len(shards(cache)) == 1


def test_a_shard_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    cache.put([Encoded(key_of("a"), codes(8, 5))])
    partial, renamed, folder = events
    assert os.path.basename(partial).startswith(".") and renamed == "rename" and folder == str(cache.folder)


def test_a_killed_write_is_not_seen(cache):
    cache.put([Encoded(key_of("a"), codes(8, 5))])
    (cache.folder / ".00-killed.safetensors").write_bytes(b"half a sh")
    (cache.folder / "notes.txt").write_text("of a user")
    cache.refresh()
    assert len(cache) == 1 and len(shards(cache)) == 3


def bytes_of(cut):
    return lambda shard: shard.write_bytes(cut(shard.read_bytes()))


def tensors_with(**changed):
    """Changes tensors of a shard; what becomes None is left out."""

    def damage(shard):
        tensors = load_file(shard)
        tensors |= {name: change(tensors[name]) for name, change in changed.items()}
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items() if t is not None}, shard)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        bytes_of(lambda content: b""),
        bytes_of(lambda content: b"junk"),
        bytes_of(lambda content: content[:-1]),
        bytes_of(lambda content: content[: len(content) // 2]),
        tensors_with(facts=lambda a: None),
        tensors_with(codes=lambda a: a.astype(np.int64)),
        tensors_with(codes=lambda a: a[:-1]),
        tensors_with(codes=lambda a: a[:, 0]),
        tensors_with(keys=lambda a: a[:, :16]),
        tensors_with(keys=lambda a: a[:1]),
        tensors_with(ends=lambda a: a[::-1]),
        tensors_with(ends=lambda a: np.array([0, a[-1]])),
        tensors_with(facts=lambda a: a[:, :3]),
        tensors_with(keys=lambda a: a[:0], ends=lambda a: a[:0], facts=lambda a: a[:0], codes=lambda a: a[:0]),
    ],
)
def test_a_damaged_shard_is_named_and_removed_and_its_recordings_are_absent(cache, tmp_path, caplog, damage):
    cache.put([Encoded(key_of("a"), codes(8, 5)), Encoded(key_of("b"), codes(8, 6))])
    cache.put([Encoded(key_of("c"), codes(8, 7))])
    shard, sound = shards(cache)
    # Damage a copy under the same name: this process has mapped the file itself.
    copy = tmp_path / "copy"
    copy.write_bytes(shard.read_bytes())
    damage(copy)
    copy.replace(shard)
    with caplog.at_level(logging.WARNING):
        again = CodeCache(tmp_path / "cache", CODEC)
    assert f"removed damaged codes {shard}" in caplog.text and shards(again) == [sound]
    assert key_of("a") not in again and key_of("b") not in again and again.get(key_of("c")).shape == (8, 7)


def test_refresh_sees_what_others_have_written(cache, tmp_path):
    other = CodeCache(tmp_path / "cache", CODEC)
    other.put([Encoded(key_of("a"), codes(8, 5))])
    assert key_of("a") not in cache
    cache.refresh()
    assert np.array_equal(cache.get(key_of("a")), codes(8, 5))


def test_another_format_is_not_seen(cache, tmp_path, monkeypatch):
    cache.put([Encoded(key_of("a"), codes(8, 5))])
    monkeypatch.setattr(code_cache, "_FORMAT", "older")
    assert len(CodeCache(tmp_path / "cache", CODEC)) == 0
    assert str(FACTS) in cache.folder.name, "other facts are another format"


WRITER = """
import sys
import numpy as np
from tests.data.test_code_cache import CODEC, CodeCache, Encoded, key_of

root, name = sys.argv[1:]
cache = CodeCache(root, CODEC)
for number in range(40):
    cache.put([Encoded(key_of(f"{who}{number}"), np.full((8, 1 + number), number, np.int16)) for who in (name, "both")])
    for seen in range(number + 1):
        assert cache.get(key_of(f"{name}{seen}")).shape == (8, 1 + seen)
"""


def test_two_processes_write_at_once(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in ("one", "two")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    cache = CodeCache(tmp_path, CODEC)
    assert len(cache) == 160 and len(shards(cache)) == 80
    for number in range(40):
        for name in ("one", "two", "both"):
            assert np.array_equal(cache.get(key_of(f"{name}{number}")), np.full((8, 1 + number), number))


def test_many_shards_take_no_file_descriptors(cache, tmp_path):
    cache.put([Encoded(key_of("a"), codes(8, 5))])
    (first,) = shards(cache)
    for number in range(300):
        os.link(first, cache.folder / f"{number:020d}.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    many = CodeCache(tmp_path / "cache", CODEC)
    assert len(many) == 301 and many.get(key_of("a")) is not None
    assert len(os.listdir("/proc/self/fd")) <= before + 1
