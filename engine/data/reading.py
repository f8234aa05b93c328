"""Recordings read by threads, ahead of the codec that needs them.

Invariant: what is wrong with one recording is a line beside its key and disturbs no other; at most a few batches
of waveforms are in memory, whatever the size of the data set. Threads are enough: libsndfile, numpy and torch let
others run while they work.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from engine.data.audio import AudioError, Recording, count_samples, decode, resample
from engine.data.audio_checks import AudioFacts, measure

_THREADS = 4
_AHEAD = 2  # batches begun while one is in use
_CHUNK = 4096  # headers asked for at a time

Problems = list[tuple[str, str]]
"""(key, what is wrong) of recordings."""


def count_all(
    recordings: Mapping[str, Recording], keys: list[str], sampling_rate: int
) -> tuple[dict[str, int], Problems]:
    """Samples at `sampling_rate` of each of `keys`, from the headers; and what is wrong, in the order of `keys`."""

    def count(key: str) -> int | AudioError:
        try:
            return count_samples(recordings[key], sampling_rate)
        except AudioError as error:
            return error

    samples, problems = {}, []
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="read-header") as pool:
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            for key, found in zip(chunk, pool.map(count, chunk), strict=True):
                if isinstance(found, AudioError):
                    problems.append((key, str(found)))
                else:
                    samples[key] = found
    return samples, problems


def read_ahead(
    recordings: Mapping[str, Recording],
    batches: Iterable[list[str]],
    sampling_rate: int,
    loudness: float | None = None,
) -> Iterator[tuple[dict[str, tuple[np.ndarray, AudioFacts]], Problems]]:
    """For each batch of keys: waveform at `sampling_rate` and facts of what can be read, and what is wrong.

    The facts are those of the recording as it is, before resampling and before it is brought to a `loudness` (dBFS).
    """

    def read(key: str) -> tuple[np.ndarray, AudioFacts]:
        decoded = decode(recordings[key])
        wave, facts = resample(decoded, sampling_rate), measure(decoded)
        return wave if loudness is None else wave * facts.gain(loudness), facts

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="read-audio") as pool:
        begun: deque[dict[str, Future]] = deque()
        for batch in batches:
            begun.append({key: pool.submit(read, key) for key in batch})
            if len(begun) > _AHEAD:
                yield _collect(begun.popleft())
        while begun:
            yield _collect(begun.popleft())


def _collect(begun: dict[str, Future]) -> tuple[dict[str, tuple[np.ndarray, AudioFacts]], Problems]:
    read, problems = {}, []
    for key, reading in begun.items():
        try:
            read[key] = reading.result()
        except AudioError as error:
            problems.append((key, str(error)))
    return read, problems
