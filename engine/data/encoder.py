"""All processes together hash, encode and measure recordings; what is known of each is known to all."""

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from engine.config import Settings
from engine.data.audio import AudioError, Recording, content_key
from engine.data.code_cache import CodeCache
from engine.data.codec import Codec, encode_missing
from engine.data.rows import Heard
from engine.errors import DataError, ModelError
from engine.runtime.distributed import World, wait_for_all

THREADS = 4
"""Hashing, reading and spectrograms leave the interpreter's lock to others most of the time."""

FRAMES_PER_SECOND = 25
"""Of the released codec; used for durations in reports only."""


class Encoder:
    """Fills the cache of codes, a share on each process.

    Args:
        codec: identity of the codec, which names its cache.
        codebooks: of the model.

    Attributes:
        cache: holds the codes of every recording that was heard without a problem.
    """

    def __init__(self, settings: Settings, codec: str, codebooks: int, world: World):
        self.settings, self.codebooks, self.world = settings, codebooks, world
        self.cache = CodeCache(settings.codes_cache_dir, codec)
        self._codec: Codec | None = None

    def __call__(self, recordings: list[Recording]) -> dict[Recording, Heard]:
        """What is known of each recording, encoded by now unless something is wrong with it.

        Every process calls it with the same recordings.

        Raises:
            ModelError: the codec cannot be loaded or has another number of codebooks.
            DataError: the cache is not shared by all machines.
        """
        keys, problems = _content_keys(recordings[self.world.rank :: self.world.size])
        for part in self._gather((keys, problems), "the hashes of recordings"):
            keys |= part[0]
            problems |= part[1]
        distinct = {key: recording for recording, key in sorted(keys.items(), key=lambda item: (item[1], str(item[0])))}
        failed: dict[str, str] = {}
        found = encode_missing(
            distinct, self._load_codec, self.cache, batch_seconds=self.settings.codec_batch_seconds,
            rank=self.world.rank, world_size=self.world.size, progress=True,
            loudness=self.settings.loudness,
        )  # fmt: skip
        for part in self._gather(found, "the codes of recordings"):
            # without the name: a recording of the same content may have another
            failed |= {key: problem.removeprefix(f"{distinct[key]}: ") for key, problem in part}
        self.cache.refresh()
        return {recording: self._heard(recording, keys.get(recording), failed, problems) for recording in recordings}

    def _heard(self, recording: Recording, key: str | None, failed: dict, problems: dict) -> Heard:
        if key is None or key in failed:
            return Heard(key, problem=problems.get(recording) or f"{recording}: {failed[key]}")
        frames, facts = self.cache.frames(key), self.cache.facts(key)
        if frames is None:
            raise DataError(
                f"{self.cache.folder}: codes that another process has just written are not there → "
                "codes_cache_dir must be a folder that all machines of the run share."
            )
        return Heard(key, facts.seconds if facts else frames / FRAMES_PER_SECOND, facts)

    def _load_codec(self) -> Codec:
        if self._codec is None:
            path = self.settings.audio_tokenizer_path
            codec = Codec.load(path, self.world.device)
            if codec.num_codebooks != self.codebooks:
                raise ModelError(
                    f"{path}: the codec has {codec.num_codebooks} codebooks, the model {self.codebooks} → take the "
                    "codec that belongs to the model."
                )
            self._codec = codec
        return self._codec

    def _gather(self, value, name: str) -> list:
        if self.world.size == 1:
            return [value]
        wait_for_all(name)
        parts = [None] * self.world.size
        dist.all_gather_object(parts, value)
        return parts


def _content_keys(recordings: list[Recording]) -> tuple[dict[Recording, str], dict[Recording, str]]:
    """The content key of each recording that can be read, and what is wrong with the others."""

    def key_of(recording: Recording) -> str | AudioError:
        try:
            return content_key(recording)
        except AudioError as error:
            return error

    keys, problems = {}, {}
    with ThreadPoolExecutor(THREADS, thread_name_prefix="hash") as pool:
        for recording, found in zip(recordings, pool.map(key_of, recordings), strict=True):
            if isinstance(found, AudioError):
                problems[recording] = str(found)
            else:
                keys[recording] = found
    return keys, problems
