"""A random Whisper model small enough for the quickest tests, folders that hold it, and samples that it hears."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from engine.data.labels import Sample
from engine.data.mels import TAIL, embeddings
from engine.data.prompts import IGNORED
from tests.tiny import random_sample

N_MELS, HEARD = 16, 109


def tiny_whisper(n_mels: int = N_MELS) -> WhisperForConditionalGeneration:
    """Two layers, its biases and norms random, so that forgotten ones show."""
    torch.manual_seed(7)
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=n_mels, d_model=32, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "encoder" in name:
                parameter.uniform_(-0.5, 1.5)
            elif "encoder" in name:
                parameter.mul_(5)
    return model


def save_whisper(folder: Path, part=lambda whisper: whisper, n_mels: int = N_MELS) -> Path:
    """`part`: which of the model's modules becomes the folder."""
    part(tiny_whisper(n_mels)).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=n_mels).save_pretrained(folder)
    return folder


def random_mels(rng, frames: int) -> np.ndarray:
    return rng.normal(0, 0.7, (frames + TAIL, N_MELS)).astype(np.float16)


def heard_sample(rng, text: int, audio: int, frames: int) -> Sample:
    """A random sample whose first clip is heard through Whisper: its positions stand before the first audio one."""
    sample, mels = random_sample(rng, text, audio), random_mels(rng, frames)
    count = embeddings(len(mels))
    start = int(np.flatnonzero(sample.input_ids == 110)[0])
    return replace(
        sample,
        input_ids=np.insert(sample.input_ids, start, np.full(count, HEARD, np.int32)),
        labels=np.insert(sample.labels, start, np.full(count, IGNORED, np.int32)),
        mels=(mels,) if count else (),
        mel_starts=(start,) if count else (),
    )
