"""`validate`: judges every row of a data set without making anything, and shows single rows.

Recordings are decoded and measured by a few threads, a chunk of rows at a time; no codec is needed. With a model's
tokenizer the report also has the lengths of samples. What is reported is what `prepare` does: both use the same checks.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from engine.config import Settings
from engine.data.audio import AudioError, Recording, content_key, decode, read_mono, require_resampling
from engine.data.audio_checks import AudioFacts, measure
from engine.data.code_cache import CodeCache
from engine.data.codec import Codec, codec_identity, encode_missing, problem_of_codes
from engine.data.conversation import Row
from engine.data.encoder import FRAMES_PER_SECOND, THREADS
from engine.data.formats import read_rows
from engine.data.formats.row_check import CODEBOOK_SIZE
from engine.data.labels import StreamIds, merge
from engine.data.layouts import Layout, LayoutError
from engine.data.mels import SAMPLING_RATE, MelExtractor, embeddings, mel_rows
from engine.data.prepare import chunks, unheard
from engine.data.prompts import PromptTokenizer
from engine.data.references import References
from engine.data.report import DataReport, RowReport
from engine.data.rows import Heard, LaidOut, RowCheck, laid_out
from engine.data.show import show
from engine.errors import DataError

CODEC_RATE = 24_000
"""Hz, of the released codec."""


class Validation:
    """The rows of one data file or folder, as the settings make them.

    Args:
        tokenizer: of the model; None: lengths are not known.
        codebooks: of the model; lengths of samples depend on it through the delay.
        mels: with Whisper conditioning.
    """

    def __init__(self, source: str, settings: Settings, tokenizer=None, codebooks: int = 8,
                 mels: MelExtractor | None = None):  # fmt: skip
        self.source, self.settings, self.codebooks, self.mels = source, settings, codebooks, mels
        self.tokenize = PromptTokenizer(tokenizer) if tokenizer else None

    def rows(self, purpose: str) -> Iterator[LaidOut]:
        settings = self.settings
        references = None
        if settings.pair_references:
            key = lru_cache(maxsize=100_000)(content_key)
            references = References(self._read("pair"), key, settings.seed)
        layout = Layout.of(settings)
        return laid_out(self._read(purpose), layout, references, settings.reference_dropout, settings.seed)

    def _read(self, purpose: str) -> Iterator[Row]:
        return tqdm(read_rows(self.source, self.settings.format), desc=purpose, unit="row", delay=2)

    def report(self, folder: Path | None) -> DataReport:
        """Judges every row; the report is written to `folder` unless that is None."""
        about = Layout.of(self.settings).identity
        check = RowCheck(self.settings)
        report = DataReport(self.source, folder, max_bad_fraction=self.settings.max_bad_fraction, settings=about)
        with report, ThreadPoolExecutor(THREADS, thread_name_prefix="measure") as pool:
            for chunk in chunks(self.rows("validate")):
                recordings = list(dict.fromkeys(recording for row in chunk for recording in row.recordings))
                heard = dict(zip(recordings, pool.map(self._hear, recordings), strict=True))
                for row in chunk:
                    report.add(self._with_length(row, check(row, heard), heard))
        return report

    def _with_length(self, row: LaidOut, report: RowReport, heard: dict[Recording, Heard]) -> RowReport:
        if self.tokenize is None or not report.accepted:
            return report
        try:
            prompt = self.tokenize(row.trained)
        except LayoutError as error:
            return replace(report, problems=(str(error),))
        tokens, problems = len(prompt.input_ids), []
        for audio, is_context in zip(prompt.audios, self.tokenize.heard(prompt), strict=True):
            seconds = heard[audio.recording].seconds
            tokens += math.ceil(round(seconds * FRAMES_PER_SECOND, 3)) + self.codebooks
            if self.mels and is_context:
                tokens += embeddings(mel_rows(round(seconds * SAMPLING_RATE)))
                problems += _without_sound(audio.recording)
        return replace(report, problems=tuple(problems), tokens=None if problems else tokens)

    def show(self, number: int, config) -> str:
        """One row as it is written and as it is trained: turns, tokens, delay grid, labels.

        Args:
            config: of the model.

        Raises:
            DataError: there is no such row, or it cannot be used; the reasons are listed.
        """
        row = next(islice(self.rows("find"), number, None), None)
        if row is None:
            raise DataError(f"{self.source}: there is no row {number} → rows count from 0.")
        heard = {recording: self._hear(recording) for recording in row.recordings}
        report = RowCheck(self.settings)(row, heard)
        if not report.accepted:
            raise DataError(f"{self.source}: row {number} cannot be used:", list(report.problems))
        prompt = self.tokenize(row.trained)
        path, loudness = self.settings.audio_tokenizer_path, self.settings.loudness
        cache = CodeCache(self.settings.codes_cache_dir, codec_identity(path, loudness))
        recordings = {heard[recording].key: recording for recording in row.recordings}
        failed = encode_missing(recordings, lambda: Codec.load(path), cache, loudness=loudness)
        if failed:
            raise DataError(f"{self.source}: row {number} cannot be encoded:", [problem for _, problem in failed])
        stream = StreamIds(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
        codes = [cache.get(heard[audio.recording].key) for audio in prompt.audios]
        mels = [
            self.mels(read_mono(audio.recording, SAMPLING_RATE)) if self.mels and is_context else None
            for audio, is_context in zip(prompt.audios, self.tokenize.heard(prompt), strict=True)
        ]
        sample = merge(prompt, codes, self.tokenize.special, stream, number, mels)
        text = show(row.written, row.trained, prompt, sample, self.tokenize.tokenizer, stream)
        return "\n".join([text, *(f"warning: {line}" for line in report.warnings)])

    def _hear(self, recording: Recording) -> Heard:
        """Decodes and measures a recording."""
        key = None
        try:
            key = content_key(recording)
            if recording.codes is not None:
                problem = problem_of_codes(recording, self.codebooks, CODEBOOK_SIZE)
                seconds = None if problem else recording.code_array.shape[1] / FRAMES_PER_SECOND
                return Heard(key, seconds, problem=problem)
            decoded = decode(recording)
            require_resampling(decoded, CODEC_RATE)
        except AudioError as error:
            return Heard(key, problem=str(error))
        facts = AudioFacts.from_array(measure(decoded).to_array())  # as the cache of codes would give them
        return Heard(key, facts.seconds, facts)


def _without_sound(recording: Recording) -> list[str]:
    """Why Whisper cannot hear a recording whose codes are known."""
    try:
        recording.open().close()
    except AudioError as error:
        return [unheard(error)]
    return []
