"""From a data file to exact samples: read rows, encode each distinct recording once, tokenise, merge, check.

All processes call `prepare` together. Each hashes and encodes a share of the recordings; codes go to the cache on
disk, and samples are built from the cache alone. Whatever is wrong with rows or recordings comes in one message
that names row and file, before any training; nothing is left out unless `drop_long_samples` asks for it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.data.audio import AudioError, content_key
from engine.data.conversation import Audio, Conversation
from engine.data.formats.chatml import read_chatml
from engine.data.codec import Codec, CodeCache, codec_identity, encode_missing
from engine.data.labels import Sample, StreamIds, merge
from engine.data.prompts import Layout, LayoutError, Prompt, PromptTokenizer
from engine.errors import DataError, ModelError
from engine.runtime.distributed import World, raise_together, wait_for_all

FRAMES_PER_SECOND = 25
"""Of the released codec; used for durations in reports only."""


@dataclass(frozen=True)
class Dataset:
    """Samples in memory.

    Attributes:
        samples: in the order of the file.
        text_targets: int64 [n].
        audio_targets: int64 [n, codebooks].
        audio_frames: int64 [n]; frames of each sample, reference and target.
        dropped: one line for each sample that drop_long_samples left out.
        fingerprint: sha256 over all samples; equal data in equal order give equal fingerprints.
    """

    samples: list[Sample]
    text_targets: np.ndarray
    audio_targets: np.ndarray
    audio_frames: np.ndarray
    dropped: list[str]
    fingerprint: str

    @classmethod
    def of(cls, samples: list[Sample], dropped: list[str]) -> "Dataset":
        digest = hashlib.sha256()
        for s in samples:
            for array in (s.input_ids, s.labels, s.audio_ids, s.audio_labels):
                digest.update(np.ascontiguousarray(array).data)
        return cls(
            samples=samples,
            text_targets=np.array([s.text_targets for s in samples]),
            audio_targets=np.stack([s.audio_targets for s in samples]),
            audio_frames=np.array([len(s.audio_ids) for s in samples]),
            dropped=dropped,
            fingerprint=digest.hexdigest(),
        )

    @property
    def lengths(self) -> list[int]:
        return [len(sample) for sample in self.samples]

    def describe(self) -> str:
        tokens, frames = sum(self.lengths), int(self.audio_frames.sum())
        minutes = frames / FRAMES_PER_SECOND / 60
        line = f"{len(self.samples):,} samples, {tokens:,} tokens, {minutes:,.1f} min of audio (references included)"
        return line + (f"; {len(self.dropped)} too long and left out" if self.dropped else "")


def prepare(data_file: str, settings: Settings, tokenizer, config: HiggsAudioV2Config, world: World) -> Dataset:
    """The exact samples of a data file, the same on every process.

    Raises:
        DataError: rows or recordings that cannot be used, all of them named; or nothing is left.
        ModelError: the codec cannot be loaded or has another number of codebooks.
    """
    rows = read_chatml(data_file)
    cache = CodeCache(settings.codes_cache_dir, codec_identity(settings.audio_tokenizer_path))
    keys, audio_problems = _content_keys(rows, world)
    audio_problems |= _encode(keys, cache, settings, config, world)
    tokenize = PromptTokenizer(tokenizer)
    layout = Layout(settings.prompt_layout, settings.system_prompt, settings.scene, settings.train_reference)
    stream = StreamIds(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
    codes: dict[str, np.ndarray] = {}
    samples, problems = [], []
    for row in rows:
        try:
            prompt = tokenize(layout.apply(row))
        except LayoutError as error:
            problems.append(f"row {row.row}: {error}")
            problems += _recording_problems(row, row.audios, audio_problems)
            continue
        row_problems = _row_problems(row, prompt, audio_problems)
        problems += row_problems
        if not row_problems:
            clips = [_cached(cache, codes, keys[audio.recording]) for audio in prompt.audios]
            samples.append(merge(prompt, clips, tokenize.special, stream, row.row))
    if problems:
        raise DataError(f"{data_file}: {len(problems)} problem(s) in {len(rows)} row(s):", problems)
    kept, dropped = _within_budget(data_file, samples, settings)
    return Dataset.of(kept, dropped)


def _content_keys(rows: list[Conversation], world: World) -> tuple[dict, dict]:
    """Recording -> content key, and recording -> what is wrong; each process reads a share of the files."""
    recordings = list(dict.fromkeys(audio.recording for row in rows for audio in row.audios))
    keys, problems = {}, {}
    share = recordings[world.rank :: world.size]
    for recording in tqdm(share, desc="hash", unit="file", disable=not world.is_main or len(share) < 1000):
        try:
            keys[recording] = content_key(recording)
        except AudioError as error:
            problems[recording] = str(error)
    if world.size > 1:
        wait_for_all("the hashes of all recordings")
        for part in _gather((keys, problems), world):
            keys |= part[0]
            problems |= part[1]
    return keys, problems


def _encode(keys: dict, cache: CodeCache, settings: Settings, config: HiggsAudioV2Config, world: World) -> dict:
    """Fills the cache with what it lacks; recording -> what is wrong with it."""

    def load() -> Codec:
        codec = Codec.load(settings.audio_tokenizer_path, world.device)
        if codec.num_codebooks != config.num_codebooks:
            raise ModelError(
                f"{settings.audio_tokenizer_path}: the codec has {codec.num_codebooks} codebooks, the model "
                f"{config.num_codebooks} → take the codec that belongs to the model."
            )
        return codec

    error, found = None, []
    try:
        distinct = {key: recording for recording, key in sorted(keys.items(), key=lambda item: str(item[0]))}
        found = encode_missing(
            distinct, load, cache, batch_seconds=settings.codec_batch_seconds,
            rank=world.rank, world_size=world.size, progress=True,
        )  # fmt: skip
    except OSError as disk:
        error = DataError(f"codes_cache_dir {settings.codes_cache_dir}: {disk} → choose another folder.")
    except Exception as other:
        error = other
    raise_together(world, error)
    failed = dict(found if world.size == 1 else [item for part in _gather(found, world) for item in part])
    return {recording: failed[key] for recording, key in keys.items() if key in failed}


def _gather(value, world: World) -> list:
    parts = [None] * world.size
    dist.all_gather_object(parts, value)
    return parts


def _recording_problems(row: Conversation, audios: Iterable[Audio], audio_problems: dict) -> list[str]:
    used = dict.fromkeys(audio.recording for audio in audios)
    return [f"row {row.row}: {audio_problems[recording]}" for recording in used if recording in audio_problems]


def _row_problems(row: Conversation, prompt: Prompt, audio_problems: dict) -> list[str]:
    problems = _recording_problems(row, prompt.audios, audio_problems)
    if not (prompt.labels[1:] >= 0).any() and not any(prompt.trained):
        assistants = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
        if not assistants:
            problems.append(f"row {row.row}: no assistant message, so there is nothing to train → add the answer")
        else:
            problems.append(
                f"row {row.row}: start_index {row.start_index} leaves nothing to train → the last assistant "
                f"message is number {assistants[-1]}"
            )
    elif not any(message.audios for message in row.messages if message.role == "assistant"):
        problems.append(f"row {row.row}: no assistant message has audio → give the target recording as an audio item")
    return problems


def _cached(cache: CodeCache, loaded: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key not in loaded:
        codes = cache.get(key)
        if codes is None:
            raise DataError(
                f"{cache.path(key)}: the codes that another process has just written are not there → "
                "codes_cache_dir must be a folder that all machines of the run share."
            )
        loaded[key] = codes
    return loaded[key]


def _within_budget(data_file: str, samples: list[Sample], settings: Settings) -> tuple[list[Sample], list[str]]:
    budget = settings.max_tokens_per_micro_batch
    long = [s for s in samples if budget is not None and len(s) > budget]
    lines = [f"row {s.row}: {len(s):,} tokens ({len(s.audio_ids) / FRAMES_PER_SECOND:.1f} s of audio)" for s in long]
    if long and not settings.drop_long_samples:
        raise DataError(
            f"{data_file}: {len(long)} of {len(samples)} samples are longer than max_tokens_per_micro_batch = "
            f"{budget:,} → raise it to {max(map(len, long)):,} or more, shorten them, or set drop_long_samples:",
            lines,
        )
    kept = [s for s in samples if budget is None or len(s) <= budget]
    if not kept:
        raise DataError(f"{data_file}: no sample is left to train on; all are over {budget:,} tokens.", lines)
    return kept, lines


def write_dropped(dataset: Dataset, file: Path, log: Callable[[str], None]) -> None:
    """Names every sample that was left out: the first few in the log, all of them in `file`."""
    if dataset.dropped:
        file.write_text(json.dumps(dataset.dropped, indent=1))
        log(f"left out as too long ({len(dataset.dropped)}, all in {file.name}):")
        for line in dataset.dropped[:10]:
            log(f"  {line}")
