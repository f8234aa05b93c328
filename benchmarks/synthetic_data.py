"""Data of realistic lengths and random content for benchmarks/data.py: recordings, ChatML rows, stores of any size.

A sample is voice cloning: a reference and a target of 2 to 15 s, uniform, each with its text. Each clip is the target
of one sample and the reference of another, as in a data set whose references are paired.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from engine.data.labels import StreamIds
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.data.store import HEADER, StoreWriter

FRAMES_PER_SECOND = 25
SHORTEST_S, LONGEST_S = 2.0, 15.0
CHARACTERS_PER_SECOND = 13  # of English speech, a little under the usual so that no rate is suspicious
TEXT_TOKENS = (30, 50)  # of a stored sample, both transcripts and the markup
RECORDED_HZ = 22_050  # not the codec's, so that reading resamples
SPECIAL, STREAM = SpecialTokens(5, 6), StreamIds()


def write_recordings(folder: Path, count: int, seed: int) -> list[tuple[str, float]]:
    """Noise in syllables as 16-bit wav files; name and seconds of each."""
    folder.mkdir(parents=True)
    rng, written = np.random.default_rng(seed), []
    for number in range(count):
        samples = int(rng.uniform(SHORTEST_S, LONGEST_S) * RECORDED_HZ)
        loudness = 0.02 + 0.1 * np.sin(np.arange(samples) * (2 * np.pi * 4 / RECORDED_HZ)) ** 2
        name = f"{number:06d}.wav"
        soundfile.write(folder / name, rng.standard_normal(samples) * loudness, RECORDED_HZ, subtype="PCM_16")
        written.append((name, samples / RECORDED_HZ))
    return written


def chatml_rows(recordings: list[tuple[str, float]], count: int, seed: int) -> Iterator[dict]:
    """`count` rows over the recordings, again and again."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        target, reference = (recordings[(number + shift) % len(recordings)] for shift in (0, 1))
        texts = [_text(rng, seconds) for _, seconds in (reference, target)]
        user = [{"type": "text", "text": texts[0]}, _audio(reference), {"type": "text", "text": texts[1]}]
        yield {
            "messages": [
                {"role": "system", "content": "Generate audio following instruction."},
                {"role": "user", "content": user},
                {"role": "assistant", "content": [_audio(target)]},
            ],
            "start_index": 0,
            "speaker": f"speaker-{number % 100}",
            "misc": {"sample_id": f"{number:08d}", "ref_transcript": texts[0], "target_transcript": texts[1]},
        }


def _audio(recording: tuple[str, float]) -> dict:
    return {"type": "audio", "audio_url": recording[0], "duration": round(recording[1], 3)}


def _text(rng: np.random.Generator, seconds: float) -> str:
    letters = rng.choice(np.frombuffer(b"etaoinshrdlu   ", "u1"), round(seconds * CHARACTERS_PER_SECOND))
    return " ".join(["So", *letters.tobytes().decode().split()]) + "."


def random_clip(number: int, seed: int) -> np.ndarray:
    """Codes int16 [C, T]."""
    rng = np.random.default_rng([seed, number])
    frames = int(rng.uniform(SHORTEST_S, LONGEST_S) * FRAMES_PER_SECOND)
    return rng.integers(0, STREAM.bos, (STREAM.codebooks, frames), np.int16)


def random_prompt(number: int, seed: int) -> Prompt:
    """Text around a reference that is not trained and a target that is."""
    rng = np.random.default_rng([seed, number, 1])
    ids = rng.integers(10, 100_000, rng.integers(*TEXT_TOKENS), np.int32)
    ids[[len(ids) // 3, -3]] = SPECIAL.audio_out
    labels = np.full_like(ids, IGNORED)
    labels[-2:] = ids[-2:]  # end of audio, end of turn
    return Prompt(ids, labels, (), (False, True))


def random_samples(count: int, seed: int) -> Iterator[tuple[Prompt, list[tuple[str, np.ndarray, None]]]]:
    """What a store is given of each sample: its prompt, and key, codes and no spectrogram of its two clips."""
    clips = [(f"{number:064x}", random_clip(number, seed), None) for number in range(count)]
    for number in range(count):
        yield random_prompt(number, seed), [clips[(number + 1) % count], clips[number]]


def write_store(folder: Path, samples: list) -> None:
    writer = StoreWriter(folder, {}, SPECIAL, STREAM)
    for row, (prompt, clips) in enumerate(samples):
        writer.add(prompt, clips, row, f"speaker-{row % 100}")
    writer.close()


def multiply_store(store: Path, times: int, out: Path) -> None:
    """A store with every sample of a store of one part `times` times; its clips are there once, as in any store."""
    header = json.loads((store / HEADER).read_text())
    (part,) = header["parts"]
    source, target = store / part["folder"], out / part["folder"]
    shutil.copytree(store, out)
    arrays = {name: np.load(source / f"{name}.npy") for name in ("text_ids", "trained", "clip_ids", "clip_use")}
    records = np.tile(np.load(source / "samples.npy"), times)
    copy = np.repeat(np.arange(times), part["samples"])
    records["text_end"] += copy * len(arrays["text_ids"])
    records["use_end"] += copy * len(arrays["clip_ids"])
    records["row"] = np.arange(len(records))
    np.save(target / "samples.npy", records)
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", np.tile(array, times))
    header["samples"] = part["samples"] = len(records)
    (out / HEADER).write_text(json.dumps(header))
