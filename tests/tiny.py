"""A random Higgs small enough for the quickest tests, and random samples for it."""

import numpy as np
import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from engine.data.labels import Sample
from engine.data.prompts import IGNORED

CODEBOOKS, AUDIO = 8, 110


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = HiggsAudioV2Config(
        vocab_size=120, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, codebook_size=34, audio_stream_bos_id=32, audio_stream_eos_id=33,
        audio_token_id=AUDIO, audio_delay_token_id=111, audio_bos_token_id=112, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # so that swapped norms show
                parameter.uniform_(0.5, 1.5)
    return model


def random_sample(rng, text, audio, label_text=True, label_audio=True):
    """`text` text positions around `audio` audio positions, random labels on part of them."""
    before = rng.integers(0, text + 1)
    ids = np.concatenate([rng.integers(3, 100, before), np.full(audio, AUDIO), rng.integers(3, 100, text - before)])
    labels = np.where((ids != AUDIO) & label_text & (rng.random(len(ids)) < 0.6), ids, IGNORED)
    audio_ids = rng.integers(0, 34, (audio, CODEBOOKS))
    audio_labels = np.where(label_audio & (rng.random(audio_ids.shape) < 0.8), audio_ids, IGNORED)
    audio_labels[:1] = IGNORED  # as in every real stream: its first column is never a target
    return Sample(
        ids.astype(np.int32), labels.astype(np.int32), audio_ids.astype(np.int16), audio_labels.astype(np.int16)
    )
