"""What a generated clip is worth, in numbers: are the words said, is it the voice, does it sound like a recording?

Words need a speech recogniser, the voice a model of voices; both are folders that the user gives, and without them
these scores are None. The rest is measured on the waveform. No score replaces listening: a recogniser mishears names,
and a model that repeats its reference word by word has the best of voices.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.audio import AudioError, Decoded
from engine.errors import ModelError
from engine.evaluate import signal, words
from engine.evaluate.speaker import SpeakerModel
from engine.evaluate.speech_recognition import SpeechRecogniser
from engine.observe.schema import Metric

SCORES = (
    Metric("wer", "words", "share", False, "word errors for each word of the text; above 1 where words are made up"),
    Metric("cer", "words", "share", False, "the same of characters, spaces not counted"),
    Metric("word_errors", "words", "words", False, "replaced, left out or put in, in what the recogniser heard"),
    Metric("words", "words", "words", None, "of the text; a character each in Chinese and Japanese"),
    Metric("character_errors", "words", "characters", False, "replaced, left out or put in"),
    Metric("characters", "words", "characters", None, "of the text, without spaces and punctuation"),
    Metric("speaker_similarity", "voice", "", True, "cosine to the reference's voice, the target's if there is none"),
    Metric("spectral_distance_db", "sound", "dB", False, "between the average spectra of the clip and its target"),
    Metric("pitch_low_hz", "sound", "Hz", None, "a twentieth of the voiced time is below it"),
    Metric("pitch_median_hz", "sound", "Hz", None, "half of the voiced time is below it"),
    Metric("pitch_high_hz", "sound", "Hz", None, "a twentieth of the voiced time is above it"),
    Metric("silence_share", "sound", "share", None, "of the time, 35 dB or more below the clip's own speech"),
    Metric("clipped_share", "sound", "share", False, "of the samples, flat at full scale or beyond it"),
)
"""Each number of `Scorer.score` once, as engine/observe/schema.py does it; `transcript` is a text."""

_COUNTS = ("word_errors", "words", "character_errors", "characters")
_RATES = {"wer": ("word_errors", "words"), "cer": ("character_errors", "characters")}


class Scorer:
    """Scores clips, with models that are loaded when they are first needed.

    Args:
        asr_model_path: folder of a transformers speech recogniser; None leaves the words out.
        speaker_model_path: folder of a transformers x-vector model; None leaves the voice out.
        device: where the two models run.

    Raises:
        ModelError: a folder holds no such model, or not all of it. Its weights are read later, by `score`.
    """

    def __init__(self, asr_model_path: str | Path | None, speaker_model_path: str | Path | None, device: torch.device):
        self._recogniser = SpeechRecogniser(Path(asr_model_path), device) if asr_model_path else None
        self._voices = SpeakerModel(Path(speaker_model_path), device) if speaker_model_path else None
        models = {"asr_model_path": self._recogniser, "speaker_model_path": self._voices}
        found = [f"{name}: {line}" for name, model in models.items() if model for line in model.problems()]
        if found:
            raise ModelError("speech cannot be scored with these models", found)

    def score(
        self, speech: Decoded, text: str, reference: Decoded | None = None, target: Decoded | None = None
    ) -> dict[str, Any]:
        """The scores of one clip, by the names of SCORES, and `transcript`; what is not known is None.

        Args:
            speech: the clip; `Decoded(name, samples[:, None], sampling_rate)` of a waveform.
            text: what it should say.
            reference: whose voice it should have.
            target: a recording of the text by that voice; also taken for the voice where there is no reference.

        Raises:
            ModelError: a model's weights are missing or cannot be read.
            AudioError: the clip holds NaN or infinite samples; or the rate of a clip and that of a model have too
                little in common.
        """
        if not np.isfinite(speech.wave).all():
            raise AudioError(f"{speech.name}: not finite, holds NaN or infinite samples → look at the run's losses")
        scores: dict[str, Any] = dict.fromkeys(metric.name for metric in SCORES) | {"transcript": None}
        if self._recogniser is not None:
            heard = self._recogniser.transcribe(speech)
            scores |= {"transcript": heard} | words.compare(text, heard)
        voice = target if reference is None else reference
        if self._voices is not None and voice is not None:
            scores["speaker_similarity"] = self._voices.similarity(speech, voice)
        return scores | signal.measure(speech, target)


def summary(scores: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One number for many clips, by the names of SCORES.

    The counts of words and errors are sums, and WER and CER the errors of all clips by the words of all clips, so that
    a long sentence weighs more than a short one. The others are means. A number that no clip has is None.
    """
    rows = list(scores)
    result: dict[str, Any] = {}
    for name in (metric.name for metric in SCORES):
        known = [row[name] for row in rows if row.get(name) is not None]
        total = sum(known) if known else None
        result[name] = total if name in _COUNTS or not known else total / len(known)
    for name, (errors, of) in _RATES.items():
        result[name] = result[errors] / result[of] if result[of] else None
    return result


def ratio(samples: Iterable[dict[str, Any]], above: str, below: str) -> float | None:
    """Sum over sum, of the samples that have both numbers: the length of speech beside its target's, ..."""
    pairs = [(one[above], one[below]) for one in samples if one.get(above) is not None and one.get(below)]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None
