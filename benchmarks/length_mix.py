"""Samples of made-up content in the lengths of voice cloning, and the two ways in which transformers takes them.

A sample is a system turn, a reference clip with its transcript, and a target clip with its transcript; labels stand on
the target clip and on the end of its turn. Speech is log-normal in seconds, cut off as a data set would cut it off, and
text follows speech. Codes and tokens are random: no kernel's speed depends on them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import HiggsAudioV2Config

from engine.data.distribution import describe
from engine.data.labels import Sample, StreamIds, merge
from engine.data.prompts import IGNORED, Prompt, SpecialTokens

FRAMES_PER_SECOND = 25
TEXT_TOKENS_PER_SECOND = 3.5  # English speech, some 15 characters a second
SYSTEM_TOKENS, HEADER_TOKENS = 45, 6
SHORTEST_S, LONGEST_S = 1.0, 30.0
SPREAD = 0.7
"""Standard deviation of a clip's log seconds: the middle half lies between 0.62 and 1.6 times the median."""


def make_samples(config: HiggsAudioV2Config, count: int, seconds: float, seed: int) -> list[Sample]:
    """`count` samples, each of two clips.

    Args:
        seconds: median length of a clip.
        seed: of lengths and content; the first samples do not depend on how many follow.
    """
    rng = np.random.default_rng(seed)
    placeholder, stream = config.audio_token_id, StreamIds()

    def clip_and_text() -> tuple[np.ndarray, np.ndarray]:
        length = np.clip(seconds * math.exp(rng.normal(0, SPREAD)), SHORTEST_S, LONGEST_S)
        codes = rng.integers(0, stream.bos, (stream.codebooks, round(length * FRAMES_PER_SECOND)), np.int16)
        return codes, text(HEADER_TOKENS + round(length * TEXT_TOKENS_PER_SECOND) + HEADER_TOKENS)

    def text(tokens: int) -> np.ndarray:
        return rng.integers(10, min(100_000, config.vocab_size), tokens)

    samples = []
    for row in range(count):
        (reference, reference_text), (target, target_text) = clip_and_text(), clip_and_text()
        parts = (text(SYSTEM_TOKENS), reference_text, [placeholder], text(2), target_text, [placeholder], text(2))
        ids = np.concatenate(parts).astype(np.int32)
        labels = np.full_like(ids, IGNORED)
        labels[-2:] = ids[-2:]  # end of audio, end of turn
        prompt = Prompt(ids, labels, (), (False, True))
        samples.append(merge(prompt, [reference, target], SpecialTokens(placeholder, placeholder), stream, row))
    return samples


def padded_inputs(samples: Sequence[Sample], config: HiggsAudioV2Config) -> dict[str, torch.Tensor]:
    """What transformers' forward takes, padded on the right to the longest."""

    def padded(arrays: list[np.ndarray], value: int) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(a).long() for a in arrays], batch_first=True, padding_value=value)

    return {
        "input_ids": padded([s.input_ids for s in samples], config.pad_token_id),
        "attention_mask": padded([np.ones(len(s), np.int64) for s in samples], 0),
        "labels": padded([s.labels for s in samples], IGNORED),
        "audio_input_ids": padded([s.audio_ids for s in samples], 0),
        "audio_input_ids_mask": padded([np.ones(len(s.audio_ids), np.int64) for s in samples], 0).bool(),
        "audio_labels": padded([s.audio_labels for s in samples], IGNORED),
    }


def packed_inputs(samples: Sequence[Sample], config: HiggsAudioV2Config) -> dict[str, torch.Tensor]:
    """The same as one row: the first label of a sample is masked, lest the sample before it predicts it."""

    def row(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).long()[None]

    labels = [np.concatenate([[IGNORED], s.labels[1:]]) for s in samples]
    return {
        "input_ids": row([s.input_ids for s in samples]),
        "position_ids": row([np.arange(len(s)) for s in samples]),
        "labels": row(labels),
        "audio_input_ids": row([s.audio_ids for s in samples]),
        "audio_input_ids_mask": torch.ones(1, sum(len(s.audio_ids) for s in samples), dtype=torch.bool),
        "audio_labels": row([s.audio_labels for s in samples]),
    }


def describe_mix(micro_batches: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """Counts and the distribution of lengths of what is timed, and how much of a padded batch would be padding."""
    samples = [s for batch in micro_batches for s in batch]
    lengths = np.array([len(s) for s in samples])
    padded = sum(len(batch) * max(len(s) for s in batch) for batch in micro_batches)
    return {
        "micro_batches": len(micro_batches), "samples": len(samples), "tokens": int(lengths.sum()),
        "audio_share": sum(len(s.audio_ids) for s in samples) / int(lengths.sum()),
        "padding_share": 1 - int(lengths.sum()) / padded, "lengths": describe(lengths),
    }  # fmt: skip
