"""`prepare`: from a data file of any format to a prepared store.

All processes call it together. They read the rows in chunks; of each chunk every process hashes and encodes a share,
codes go to the cache on disk (engine/data/code_cache.py), and the first process checks, tokenises and writes. What was
encoded is never encoded again, so a run that was killed goes on where it was, and ends with the same store bit for bit.

Every row that cannot be used is named with the reason. Up to `max_bad_fraction` of them the store is made without
them; beyond, nothing is made.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.data.audio import AudioError, Recording, content_key, read_mono
from engine.data.codec import codec_identity
from engine.data.conversation import Row
from engine.data.encoder import THREADS, Encoder
from engine.data.formats import read_rows
from engine.data.labels import StreamIds
from engine.data.layouts import Layout, LayoutError
from engine.data.mels import SAMPLING_RATE, MelExtractor
from engine.data.prompts import Prompt, PromptTokenizer
from engine.data.references import References, draw
from engine.data.report import DataReport, RowReport
from engine.data.rows import Heard, LaidOut, RowCheck, laid_out
from engine.data.store import Store, StoreWriter, is_store, publish_store
from engine.errors import DataError
from engine.runtime.distributed import World, raise_together

MEL_ROWS = 256
"""Rows whose spectrograms are in memory at a time; 30 s take 1.5 MB."""

TOLD_ROWS = 200
"""Lines about bad rows in an error; the report has all of them."""

CHUNK_ROWS = 4096
"""Rows in memory at a time. More would make fuller codec batches; 4096 clips have dozens of each length."""


def identity_of(settings: Settings, tokenizer, mels: MelExtractor | None) -> dict:
    """What the samples of a store are made with; a run refuses a store that has another."""
    text, path = tokenizer.backend_tokenizer.to_str(), settings.audio_tokenizer_path
    codec = codec_identity(path, settings.loudness) if path else None
    return {
        "tokenizer": hashlib.sha256(text.encode()).hexdigest()[:16],
        "codec": codec[:16] if codec else None,
        **Layout.of(settings).identity,
        "whisper": mels.identity if mels else None,
    }


def made_from(source: str, settings: Settings) -> dict:
    """What a store is made of: the data's content and the settings that choose among it."""
    names = ("format", "pair_references", "reference_dropout", "seed", "min_seconds", "max_seconds",
             "reject_suspicious", "max_bad_fraction", "store_shard_samples")  # fmt: skip
    return {"source": source, "sha256": _content(Path(source)), **{name: getattr(settings, name) for name in names}}


def _content(source: Path) -> str:
    """Of a file its bytes; of a folder the names, sizes and times of all files in it."""
    digest = hashlib.sha256()
    if source.is_file():
        with source.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    for file in sorted(source.rglob("*")) if source.is_dir() else ():
        about = file.stat()
        digest.update(f"{file.relative_to(source)}|{about.st_size}|{about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def prepare(
    source: str, out: Path, settings: Settings, tokenizer, config: HiggsAudioV2Config, world: World,
    mels: MelExtractor | None = None, say: Callable[[str], None] = print,
) -> Store:  # fmt: skip
    """Makes the store `out` of a data file or folder, in place of what stands there.

    Args:
        config: of the model.
        mels: with Whisper conditioning, for audio in user and system messages.
        say: prints a line, on the first process.

    Raises:
        DataError: too many bad rows (all are named), no usable row, or data that cannot be read at all.
        ModelError: the codec cannot be loaded or has another number of codebooks.
    """
    error = None
    try:
        preparation = _Preparation(source, out, settings, tokenizer, config, world, mels)
        preparation.run(say)
    except Exception as failure:
        error = _in_words(failure, settings)
    raise_together(world, error)
    if not is_store(out):
        raise DataError(f"{out}: the store just made is not there → it must be in a folder that all machines share.")
    return Store(out)


def _in_words(error: Exception, settings: Settings) -> Exception:
    """A full or unwritable disk as a mistake that a user can mend; any other error as it is."""
    if not isinstance(error, OSError):
        return error
    place = error.filename or settings.codes_cache_dir
    return DataError(
        f"{place}: {error.strerror or error} → make room, or give another codes_cache_dir or output folder."
    )


class _Preparation:
    def __init__(self, source, out, settings, tokenizer, config, world, mels):
        self.source, self.out, self.settings, self.world, self.mels = source, out, settings, world, mels
        self.config = config
        self.layout, self.tokenize = Layout.of(settings), PromptTokenizer(tokenizer)
        self.identity = identity_of(settings, tokenizer, mels)
        self.encoder = Encoder(settings, self.identity["codec"], config.num_codebooks, world)
        self.references = None
        if settings.pair_references:
            key = lru_cache(maxsize=100_000)(content_key)
            self.references = References(self._rows("pair"), key, settings.seed)

    def run(self, say: Callable[[str], None]) -> None:
        settings = self.settings
        rows = laid_out(self._rows("prepare"), self.layout, self.references, settings.reference_dropout, settings.seed)
        if not self.world.is_main:
            for chunk in chunks(rows):
                self._together(lambda chunk=chunk: self._hear(chunk))
                raise_together(self.world, None)
            return
        draft = self.out.with_name(f".{self.out.name}.incomplete")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        stream = StreamIds(self.config.num_codebooks, self.config.audio_stream_bos_id, self.config.audio_stream_eos_id)
        self.parts = self._count_parts()
        self.writer = StoreWriter(
            draft, self.identity, self.tokenize.special, stream, self.parts, self.mels and self.mels.n_mels
        )
        self.made_from = made_from(self.source, settings)
        about = self.identity | self.made_from
        self.report = DataReport(self.source, draft, max_bad_fraction=settings.max_bad_fraction, settings=about)
        self.check = RowCheck(settings)
        with self.report:
            for chunk in chunks(rows):
                heard = self._together(lambda chunk=chunk: self._hear(chunk))
                self._together(lambda chunk=chunk, heard=heard: self._write(chunk, heard))
        self._publish(draft, say)

    def _together(self, work: Callable):
        """Does this process's part; if it fails on any process, all of them raise."""
        error = result = None
        try:
            result = work()
        except Exception as failure:
            error = _in_words(failure, self.settings)
        raise_together(self.world, error)
        return result

    def _rows(self, purpose: str) -> Iterator[Row]:
        hidden = not self.world.is_main
        return tqdm(read_rows(self.source, self.settings.format), desc=purpose, unit="row", disable=hidden, delay=2)

    def _hear(self, rows: list[LaidOut]) -> dict[Recording, Heard]:
        return self.encoder(list(dict.fromkeys(recording for row in rows for recording in row.recordings)))

    def _count_parts(self) -> int:
        size = self.settings.store_shard_samples
        return 1 if size is None else max(1, -(-sum(1 for _ in self._rows("count")) // size))

    # ---------------------------------------------------------------- samples, on the first process

    def _write(self, rows: list[LaidOut], heard: dict[Recording, Heard]) -> None:
        judged = [(row, self.check(row, heard)) for row in rows]
        prompts: dict[int, Prompt] = {}
        for at, (row, report) in enumerate(judged):
            if report.accepted:
                try:
                    prompts[row.number] = self.tokenize(row.trained)
                except LayoutError as error:
                    judged[at] = row, replace(report, problems=(str(error),))
        for start in range(0, len(judged), MEL_ROWS):
            part = judged[start : start + MEL_ROWS]
            mels, deaf = self._mels([prompts[row.number] for row, _ in part if row.number in prompts])
            for row, report in part:
                if prompt := prompts.get(row.number):
                    if problems := [deaf[audio.recording] for audio in prompt.audios if audio.recording in deaf]:
                        report = replace(report, problems=tuple(problems))
                    else:
                        report = self._add(row, report, prompt, heard, mels)
                self.report.add(report)

    def _add(self, row: LaidOut, report: RowReport, prompt: Prompt, heard: dict, mels: dict) -> RowReport:
        clips = []
        for audio, is_context in zip(prompt.audios, self.tokenize.heard(prompt), strict=True):
            key = heard[audio.recording].key
            clips.append((key, self.encoder.cache.get(key), mels.get(audio.recording) if is_context else None))
        part = int(draw(self.settings.seed, "part", row.number) * self.parts)
        return replace(report, tokens=self.writer.add(prompt, clips, row.number, row.trained.speaker, part))

    def _mels(self, prompts: Iterable[Prompt]) -> tuple[dict[Recording, np.ndarray], dict[Recording, str]]:
        """What Whisper hears of the context clips, and what it cannot hear."""
        if self.mels is None:
            return {}, {}
        wanted = dict.fromkeys(
            audio.recording
            for prompt in prompts
            for audio, is_context in zip(prompt.audios, self.tokenize.heard(prompt), strict=True)
            if is_context
        )
        mels, deaf = {}, {}
        with ThreadPoolExecutor(THREADS, thread_name_prefix="mels") as pool:
            for recording, result in zip(wanted, pool.map(self._mel, wanted), strict=True):
                (deaf if isinstance(result, str) else mels)[recording] = result
        return mels, deaf

    def _mel(self, recording: Recording) -> np.ndarray | str:
        try:
            return self.mels(read_mono(recording, SAMPLING_RATE))
        except AudioError as error:
            return unheard(error)

    # ---------------------------------------------------------------- the end

    def _publish(self, draft: Path, say: Callable[[str], None]) -> None:
        report = self.report
        if not report.passed:
            kept = _keep_report(draft, self.out)
            shutil.rmtree(draft)
            limit = f" (max_bad_fraction is {report.max_bad_fraction:g})" if report.max_bad_fraction else ""
            lines = report.rejected_lines()
            if len(lines) > TOLD_ROWS:
                lines = [*lines[:TOLD_ROWS], f"… and {len(lines) - TOLD_ROWS:,} more, all in {kept / 'rows.jsonl'}"]
            raise DataError(
                f"{self.source}: {report.rejected} of {report.rows} row(s) cannot be used{limit} → mend them, or raise "
                f"max_bad_fraction to go on without them; all about them in {kept}:",
                lines,
            )
        self.writer.close(made_from=self.made_from, rejected=report.rejected)
        publish_store(draft, self.out)
        report.folder = self.out
        for line in report.lines():
            say(line)


def _keep_report(draft: Path, out: Path) -> Path:
    """Puts the report of data that were refused beside where the store would be."""
    folder = out.with_name(f"{out.name}-report")
    folder.mkdir(exist_ok=True)
    for name in ("rows.jsonl", "report.json", "report.html"):
        os.replace(draft / name, folder / name)
    return folder


def unheard(error: AudioError) -> str:
    """The problem of a row with a reference that Whisper cannot hear."""
    return f"{error} → whisper_conditioning needs the audio of every reference; set it to off, or give it"


def chunks(rows: Iterator[LaidOut]) -> Iterator[list[LaidOut]]:
    """The rows, CHUNK_ROWS at a time."""
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk
