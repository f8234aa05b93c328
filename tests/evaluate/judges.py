"""Random models small enough for the quickest tests that recognise speech or voices, each with its own processor."""

import json
from pathlib import Path

import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForXVector,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

RATE = 16_000
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
}  # fmt: skip


def ctc(folder: Path, says: str | None = None) -> Path:
    """A wav2vec2 that spells; `says` is the one letter that it hears in everything."""
    torch.manual_seed(3)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDE"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=len(letters), pad_token_id=0, **SMALL))
    if says is not None:
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias[letters.index(says)] = 5.0
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return folder


def whisper(folder: Path, says: str) -> Path:
    """A Whisper that hears one letter in everything, 10 times in each window of 30 s."""
    torch.manual_seed(3)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    vocabulary = {token: i for i, token in enumerate([*"abcde", *special, *times])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special[1:])
    ids = {token: vocabulary[token] for token in special}
    config = WhisperConfig(
        vocab_size=len(vocabulary), num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_target_positions=14, bos_token_id=ids[special[0]], eos_token_id=ids[special[0]],
        pad_token_id=ids[special[0]], decoder_start_token_id=ids[special[1]],
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        last = model.model.decoder.layer_norm
        last.weight.zero_()
        last.bias.copy_(100 * model.model.decoder.embed_tokens.weight[vocabulary[says]])
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.is_multilingual = ids["<|notimestamps|>"], False
    settings.max_initial_timestamp_index = 50
    settings.max_length, settings._from_model_config = 12, False
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def voices(folder: Path) -> Path:
    """A WavLM with an x-vector head."""
    torch.manual_seed(3)
    config = WavLMConfig(tdnn_dim=(16, 16, 16, 16, 32), xvector_output_dim=8, classifier_proj_size=16, **SMALL)
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder
