"""Samples of a model's speech: a wav and a line of `samples.jsonl` for each prompt.

    {"step": 100, "prompt": 0, "name": "row 3", "text": "…", "file": "samples/step-000100/00.wav", "reference": …,
     "target": …, "stopped": true, "frames": 120, "seconds": 4.8, "target_seconds": 5.0, "generation_seconds": 7.1,
     "real_time_factor": 1.48, "scores": {…}, "error": null}

Paths are relative to the folder that holds it all; a prompt that failed or was skipped has no file, and `error` says
why. The real-time factor is seconds of generating to a second of speech: below 1 it is faster than one listens. Scores
are those of engine/evaluate/scores.py.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from transformers import GenerationConfig, HiggsAudioV2ForConditionalGeneration

from engine.data.audio import AudioError, Decoded, Recording, read_mono
from engine.data.codec import Codec
from engine.errors import EngineError
from engine.evaluate.generate import Spoken, speak
from engine.evaluate.prompts import Sound, SpeechPrompt
from engine.evaluate.scores import Scorer, ratio, summary

FILE = "samples.jsonl"


@dataclass(frozen=True)
class Heard:
    """Files with how a prompt's reference and target sound, relative to the folder; None where there is none."""

    reference: str | None = None
    target: str | None = None


def waveform(sound: Sound, codec: Codec) -> np.ndarray:
    """float32 [samples] at the codec's rate.

    Raises:
        AudioError: a recording cannot be read.
        ValueError: codes are not the codec's.
    """
    codes = sound.code_array if isinstance(sound, Recording) else sound
    return codec.decode(codes) if codes is not None else read_mono(sound, codec.sampling_rate)


def write_wav(file: Path, wave: np.ndarray, rate: int) -> None:
    """16 bits, which every player takes; what is louder than full scale is clipped there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.clip(wave, -1, 1), rate, subtype="PCM_16")


def write_heard(number: int, prompt: SpeechPrompt, codec: Codec, root: Path, folder: str) -> Heard:
    """Writes how reference and target of a prompt sound, for people and scores."""
    files: dict[str, str | None] = {"reference": None, "target": None}
    for kind in files:
        if (sound := getattr(prompt, kind)) is not None:
            files[kind] = f"{folder}/{number:02d}-{kind}.wav"
            write_wav(root / files[kind], waveform(sound, codec), codec.sampling_rate)
    return Heard(**files)


class Studio:
    """Lets a model say prompts, writes and scores what it said.

    Args:
        model: in evaluation mode, with transformers' forward.
        how: it draws its codes.
        root: the folder that paths are relative to.
        max_seconds: of speech, after which a sample is cut.
        seed: of all draws; each prompt has its own random numbers.
    """

    def __init__(
        self, model: HiggsAudioV2ForConditionalGeneration, how: GenerationConfig, codec: Codec, scorer: Scorer,
        root: Path, max_seconds: float, seed: int,
    ):  # fmt: skip
        self.model, self.how, self.codec, self.scorer = model, how, codec, scorer
        self.root, self.seed = root, seed
        self.max_frames = max(1, round(max_seconds * codec.sampling_rate / codec.hop_length))

    def record(
        self, step: int, number: int, prompt: SpeechPrompt, heard: Heard, file: str, deadline: float = float("inf")
    ) -> dict:
        """The line of a sample. Whatever goes wrong is its `error`.

        Args:
            file: to write, relative to `root`.
            deadline: by time.monotonic(), when it is skipped or given up.
        """
        line = blank(step, number, prompt, heard)
        try:
            left = deadline - time.monotonic()
            spoken = self._speak(number, prompt, left) if left > 0 else None
            if spoken is None or spoken.late:
                line["error"] = "skipped, the round's time (sample_budget_s) is up → raise it or lower sample_count"
                return line
            line |= self._written(spoken, file)
            line |= self._scored(prompt, heard, file)
        except Exception as error:
            line["error"] = in_words(error)
        return line

    def _speak(self, number: int, prompt: SpeechPrompt, left: float) -> Spoken:
        max_time = None if left == float("inf") else left
        return speak(self.model, prompt, self.how, self.max_frames, self.seed + number, max_time)

    def _written(self, spoken: Spoken, file: str) -> dict:
        about = {"stopped": spoken.stopped, "frames": spoken.frames, "generation_seconds": round(spoken.seconds, 3)}
        if not spoken.frames:
            return about | {"seconds": 0.0, "error": "it said nothing: the stream ended where it began"}
        wave, rate = self.codec.decode(spoken.codes), self.codec.sampling_rate
        write_wav(self.root / file, wave, rate)
        seconds = len(wave) / rate
        factor = round(spoken.seconds / seconds, 3)
        return about | {"file": file, "seconds": round(seconds, 3), "real_time_factor": factor}

    def _scored(self, prompt: SpeechPrompt, heard: Heard, file: str) -> dict:
        """Scores, and how long the target is; what cannot be scored keeps its file."""
        if not (self.root / file).is_file():
            return {}
        speech, reference, target = (self._clip(name) for name in (file, heard.reference, heard.target))
        seconds = None if target is None else round(len(target.samples) / target.sampling_rate, 3)
        try:
            return {"target_seconds": seconds, "scores": self.scorer.score(speech, prompt.text, reference, target)}
        except Exception as error:
            return {"target_seconds": seconds, "error": f"not scored: {in_words(error)}"}

    def _clip(self, file: str | None) -> Decoded | None:
        if file is None:
            return None
        return Decoded(file, *soundfile.read(self.root / file, dtype="float32", always_2d=True))


def blank(step: int, number: int, prompt: SpeechPrompt, heard: Heard, error: str | None = None) -> dict:
    """The line of a sample that is not there yet, or never will be."""
    names = ("stopped", "frames", "seconds", "target_seconds", "generation_seconds", "real_time_factor")
    line = {"step": step, "prompt": number, "name": prompt.name, "text": prompt.text, "file": None}
    return line | vars(heard) | dict.fromkeys(names) | {"scores": {}, "error": error}


def in_words(error: Exception) -> str:
    """An exception as one line."""
    if isinstance(error, EngineError):
        return " ".join(str(error).split())
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, AudioError) else f"{type(error).__name__}: {first}".rstrip(": ")


def in_short(lines: Iterable[dict]) -> str:
    """`4 of 4 stopped, 4.1 s against 4.4 s, RTF 1.2, WER 12 %`: of the samples that are there, as in the report."""
    lines = list(lines)
    spoken = [line for line in lines if line["file"] is not None]
    parts = [f"{sum(line['stopped'] for line in spoken)} of {len(lines)} stopped"]
    if spoken:
        both = [line for line in spoken if line["target_seconds"] is not None]
        against = f" against {_mean(both, 'target_seconds'):.1f} s" if both else ""
        length = f"{_mean(both or spoken, 'seconds'):.1f} s{against}"
        parts += [length, f"RTF {ratio(spoken, 'generation_seconds', 'seconds'):.2g}"]
    scores = summary(line["scores"] for line in spoken)
    for name, key, form in SHOWN:
        if scores.get(key) is not None:
            parts.append(f"{name} {form(scores[key])}")
    if failed := len(lines) - len(spoken):
        parts.append(f"{failed} without speech")
    return ", ".join(parts)


SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("WER", "wer", lambda value: f"{100 * value:.0f} %"),
    ("CER", "cer", lambda value: f"{100 * value:.0f} %"),
    ("similarity", "speaker_similarity", lambda value: f"{value:.2f}"),
)
"""Scores that a line of the console has: name, key, how they are written."""


def _mean(lines: list[dict], name: str) -> float:
    return float(np.mean([line[name] for line in lines]))
