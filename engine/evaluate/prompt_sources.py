"""Where prompts come from: rows of data files, a text on the command line, or the samples that a run has anyway."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from engine.config import Settings
from engine.data.audio import AudioError, Recording, decode, resample
from engine.data.audio_checks import measure
from engine.data.codec import Codec
from engine.data.conversation import Conversation, speech
from engine.data.dataset import Dataset
from engine.data.formats import read_rows
from engine.data.labels import StreamIds
from engine.data.layouts import Layout, LayoutError
from engine.data.prompts import PromptTokenizer
from engine.data.store import Store, is_store
from engine.errors import DataError
from engine.evaluate.prompts import UNKNOWN, SpeechPrompt, of_row, of_sample, spread


class Coder:
    """Codes of what is heard in a prompt, each recording once; the codec is loaded when it is first needed.

    Args:
        codec: loads it.
        loudness: dBFS that recordings are brought to, as in training.
    """

    def __init__(self, codec: Callable[[], Codec], loudness: float | None = None):
        self._codec, self._loudness = codec, loudness
        self._known: dict[Recording, np.ndarray] = {}

    def __call__(self, recording: Recording) -> np.ndarray:
        """int16 [C, T].

        Raises:
            AudioError: it cannot be read.
            ModelError: the codec cannot be loaded.
        """
        if recording.codes is not None:
            return recording.code_array
        if recording not in self._known:
            codec, decoded = self._codec(), decode(recording)
            wave = resample(decoded, codec.sampling_rate)
            if self._loudness is not None:
                wave = wave * measure(decoded).gain(self._loudness)
            self._known[recording] = codec.encode([wave])[0]
        return self._known[recording]


def of_files(
    files: Iterable[str | Path], format: str, layout: Layout, tokenize: PromptTokenizer, stream: StreamIds,
    codes: Coder, count: int | None = None,
) -> list[SpeechPrompt]:  # fmt: skip
    """Prompts of the first `count` rows of data files of any format, or of prepared stores; None: of all.

    Raises:
        DataError: rows that cannot be spoken; all of them are listed.
    """
    prompts: list[SpeechPrompt] = []
    problems: list[str] = []
    for file in map(Path, files):
        left = None if count is None else count - len(prompts)
        if is_store(file):
            data = Dataset([Store(file)])
            prompts += of_data(data, range(min(len(data), left if left is not None else len(data))), tokenize, stream)
            continue
        for row in islice(read_rows(file, format), left):
            name = f"{file.name} row {row.number}"
            if row.problems:
                problems += [f"{name}: {line}" for line in row.problems]
                continue
            try:
                prompts.append(of_row(row.conversation, name, layout, tokenize, stream, codes))
            except (LayoutError, AudioError, ValueError) as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise DataError("rows that cannot be spoken", problems)
    return prompts


def of_text(text: str, references: Iterable[tuple[str | None, Path]]) -> Conversation:
    """The row of a text to say in the voice of recordings, each with what it says or None."""
    given = [(said, Recording(path=str(path))) for said, path in references]
    row = speech(text, UNKNOWN, given)
    if any(said is None for said, _ in given):  # no turn of its own without its text
        row.misc["task_type"] = "reference_in_system"
    return row


def of_data(data: Dataset, chosen: Iterable[int], tokenize: PromptTokenizer, stream: StreamIds) -> list[SpeechPrompt]:
    """Prompts of prepared samples."""
    chosen = list(chosen)
    return [of_sample(data[i], name, tokenize, stream) for i, name in zip(chosen, data.names(chosen), strict=True)]


def of_run(
    settings: Settings, held_out: Dataset | None, train: Dataset, tokenize: PromptTokenizer, stream: StreamIds,
    codes: Coder,
) -> list[SpeechPrompt]:  # fmt: skip
    """What a run's samples say: the first `sample_count` prompts of `sample_prompts`, else of the held-out samples,
    else of the training samples; of those as many speakers as there are.

    Raises:
        DataError: rows of `sample_prompts` that cannot be spoken.
    """
    if settings.sample_prompts:
        files, count = settings.sample_prompts, settings.sample_count
        return of_files(files, settings.format, Layout.of(settings), tokenize, stream, codes, count)
    data = held_out or train
    return of_data(data, spread(data, settings.sample_count), tokenize, stream)
