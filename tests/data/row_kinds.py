"""Rows of many kinds for one data file: how a kind is registered, what it is made of, and those that are sound.

Each kind is a function that makes a row and its recordings, with the words that a user must read about it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from engine.data.demo_speech import SENTENCES, synthesize

RATE = 24_000
MIN_SECONDS, MAX_SECONDS = 0.35, 9.0
"""The settings with which the rows are read."""

Kinds = dict[str, tuple[Callable[["Recordings"], object], tuple[str, ...]]]
SOUND: Kinds = {}


def kind_of(kinds: Kinds, *words: str):
    """Registers a kind of row with the words that its problems, or its warnings, must have."""

    def register(make: Callable[["Recordings"], object]):
        kinds[make.__name__] = make, words
        return make

    return register


@dataclass
class Recordings:
    """A folder of recordings for the rows of a data file in it."""

    folder: Path

    def wav(self, name: str, wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> str:
        soundfile.write(self.folder / name, wave, rate, subtype=subtype)
        return name

    def file(self, name: str, content: bytes) -> str:
        (self.folder / name).write_bytes(content)
        return name

    def speech(self, number: int = 0) -> str:
        """A sound recording of a sentence."""
        name = f"sentence-{number}.wav"
        return name if (self.folder / name).exists() else self.wav(name, spoken(number))


def spoken(number: int = 0) -> np.ndarray:
    return synthesize("alto", SENTENCES[number])


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def audio(name: str, **keys) -> dict:
    return {"type": "audio", "audio_url": name} | keys


def say(item: dict | str, text: str = SENTENCES[0], **keys) -> dict:
    """A row: asked for `text`, the assistant answers with the audio item."""
    answer = {"role": "assistant", "content": audio(item) if isinstance(item, str) else item}
    return {"messages": [{"role": "user", "content": text}, answer], **keys}


def clone(reference: str, target: str, *, before: str | None, after: str | None) -> dict:
    """A row with the reference in the user message, between its transcript and the text to speak."""
    row = say(target, misc={"task_type": "voice_cloning"})
    row["messages"][0]["content"] = [text for text in (before, audio(reference), after) if text is not None]
    return row


def codes(shape: tuple[int, int] = (8, 20)) -> list[list[int]]:
    return np.random.default_rng(shape[1]).integers(0, 1024, shape).tolist()


@kind_of(SOUND)
def a_sentence(data):
    return say(data.speech(0))


@kind_of(SOUND)
def a_sentence_in_the_voice_of_another(data):
    return clone(data.speech(0), data.speech(1), before=SENTENCES[0], after=SENTENCES[1])


@kind_of(SOUND)
def codes_of_the_codec(data):
    return say({"type": "audio", "audio_codes": codes()})


@kind_of(SOUND)
def exactly_the_shortest_that_is_allowed(data):
    """0.35 is no number of fp32, in which the cache keeps lengths."""
    return say(data.wav("shortest.wav", np.concatenate([silence(0.05), spoken(4)[1200:7200], silence(0.05)])), "Sh")


@kind_of(SOUND)
def a_segment_of_a_long_recording(data):
    long = np.concatenate([spoken(number) for number in (2, 3, 5, 6, 7)])
    start, seconds = len(spoken(2)) / RATE, len(spoken(3)) / RATE
    return say(audio(data.wav("long.wav", long), offset=start, duration=seconds), SENTENCES[3])
