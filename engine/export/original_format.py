"""What stands beside the weights in the original `higgs_audio` format: its config.json and the files that it reads.

A model that began in that format keeps its own config.json through every step (`original_config.json` in native
folders), so nothing in it that this engine knows nothing of is lost; for any other the released values stand. What the
native configuration says comes above both: sizes, token ids, what the codec's streams are made of.
"""

import json
from pathlib import Path

import torch
from transformers import HiggsAudioV2Config, PreTrainedTokenizerFast
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2RotaryEmbedding

from engine.errors import ModelError
from engine.model.weights import convert_config
from engine.model.whisper_source import TOWER_DEFAULTS, WhisperSource

KEPT_CONFIG = "original_config.json"
KEPT_GENERATION = "original_generation_config.json"
"""Names in native folders of the two configurations of a model that began in the original format."""

STREAM_IDS_IN_CODEBOOK = 2
"""A native codebook counts the BOS and EOS of a stream, an original one does not."""

RELEASED = {
    "architectures": ["HiggsAudioModel"], "model_type": "higgs_audio", "audio_adapter_type": "dual_ffn_fast_forward",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>", "audio_in_token": "<|AUDIO|>",
    "audio_out_bos_token": "<|audio_out_bos|>", "audio_out_token": "<|AUDIO_OUT|>", "audio_decoder_proj_num_layers": 0,
    "audio_embed_avg": False, "audio_tokenizer_config": None, "encode_audio_in_tokens": True,
    "encode_whisper_embed": False, "skip_audio_tower": True, "use_audio_out_embed_projector": False,
    "use_audio_out_self_attention": 0, "use_delay_pattern": True, "use_rq_transformer": False,
    "rq_transformer_hidden_size": None, "rq_transformer_intermediate_size": None,
    "rq_transformer_num_attention_heads": None, "rq_transformer_num_hidden_layers": 3,
    "rq_transformer_num_key_value_heads": None, "transformers_version": "4.46.3",
    "audio_encoder_config": {
        "model_type": "higgs_audio_encoder", **TOWER_DEFAULTS, "num_hidden_layers": 32, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "init_std": 0.02,
        "scale_embedding": False,
    },
    "text_config": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0, "pretraining_tp": 1,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "use_cache": True, "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}  # fmt: skip
"""config.json of the released model, without sizes and ids, and without transformers' own defaults.

`tie_word_embeddings` stands there as released; the original model has a text head of its own and never looks at it.
"""


def original_config(
    config: HiggsAudioV2Config, tokenizer: PreTrainedTokenizerFast, kept: dict | None, whisper: WhisperSource | None
) -> dict:
    """config.json in the original format.

    Args:
        kept: the base's own, if it had that format.
        whisper: the conditioning that goes along as the audio tower.

    Raises:
        ModelError: the conditioning is no tower of the original.
    """
    template = kept or RELEASED
    token = tokenizer.convert_tokens_to_ids
    result = template | {
        "text_config": _text_config(config, tokenizer, template["text_config"]),
        "hidden_size": config.hidden_size,
        "audio_dual_ffn_layers": list(range(config.num_hidden_layers)),
        "audio_ffn_hidden_size": config.hidden_size,
        "audio_ffn_intermediate_size": config.intermediate_size,
        "audio_num_codebooks": config.num_codebooks,
        "audio_codebook_size": config.codebook_size - STREAM_IDS_IN_CODEBOOK,
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "audio_in_token_idx": token("<|AUDIO|>"),
        "audio_out_token_idx": config.audio_token_id,
        "audio_out_bos_token_id": config.audio_bos_token_id,
        "audio_eos_token_id": token("<|audio_eos|>"),
        "pad_token_id": config.pad_token_id,
        "skip_audio_tower": whisper is None,
        "encode_whisper_embed": whisper is not None,
    }
    if whisper is not None:
        require_tower(whisper)
        said = {name: getattr(whisper.config, name) for name in TOWER_DEFAULTS}
        said |= {"num_hidden_layers": whisper.config.encoder_layers}
        result["audio_encoder_config"] = template.get("audio_encoder_config", {}) | said
    return result


def _text_config(config: HiggsAudioV2Config, tokenizer: PreTrainedTokenizerFast, template: dict) -> dict:
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range", "attention_bias",
        "mlp_bias",
    )  # fmt: skip
    result = template | {name: getattr(config, name) for name in same}
    result |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": _end_of_text(tokenizer)}
    if not _same_frequencies(config, template):
        scaling = dict(config.rope_parameters)
        result["rope_theta"] = scaling.pop("rope_theta")
        result["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
        result["max_position_embeddings"] = config.max_position_embeddings
    return result


def _same_frequencies(config: HiggsAudioV2Config, text_config: dict) -> bool:
    """Whether the rotary frequencies of an original configuration are those of the native one, bit for bit.

    The two released configurations describe the same function by different numbers. The original's, with its limit of
    131,072 positions where the native one says 2,048, are what servers of the original format size themselves by.
    """
    parameters = dict(text_config.get("rope_scaling") or {"rope_type": "default"})
    parameters["rope_theta"] = text_config["rope_theta"]
    limit = {"max_position_embeddings": text_config["max_position_embeddings"]}
    other = HiggsAudioV2Config.from_dict(config.to_dict() | limit | {"rope_parameters": parameters})
    one, two = (HiggsAudioV2RotaryEmbedding(each) for each in (config, other))
    return torch.equal(one.inv_freq, two.inv_freq) and one.attention_scaling == two.attention_scaling


def _end_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.get_vocab().get("<|end_of_text|>", tokenizer.eos_token_id)


def require_tower(whisper: WhisperSource) -> None:
    """Raises ModelError unless the original's code runs this conditioning as its audio tower."""
    wanted = {"num_mel_bins": TOWER_DEFAULTS["num_mel_bins"], "scale_embedding": False}
    problems = [
        f"{name} is {getattr(whisper.config, name)}, the original's code computes with {value}"
        for name, value in wanted.items()
        if getattr(whisper.config, name) != value
    ]
    if not whisper.has_projection:
        problems.append("it has no projection")
    if problems:
        raise ModelError(
            "The Whisper conditioning is no audio tower of the original format → export --format native, or train with "
            "an encoder of Whisper-large-v3's kind:",
            problems,
        )


def to_original(folder: Path, config: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    """Turns the side files of a native model folder, in place, into those of the original format."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / KEPT_CONFIG).unlink(missing_ok=True)
    generation = folder / "generation_config.json"
    if (folder / KEPT_GENERATION).is_file():
        (folder / KEPT_GENERATION).replace(generation)
    else:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": _end_of_text(tokenizer)}
        ids |= {"pad_token_id": config["pad_token_id"], "transformers_version": RELEASED["transformers_version"]}
        generation.write_text(json.dumps({"_from_model_config": True} | ids, indent=2))
    _for_older_transformers(folder / "tokenizer_config.json")
    convert_config(config, folder)  # what it would refuse, nobody could load


def _for_older_transformers(tokenizer_config: Path) -> None:
    """The original's code needs transformers 4, which knows neither version 5's tokenizer class nor its list."""
    said = json.loads(tokenizer_config.read_text())
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    tokenizer_config.write_text(json.dumps(said, indent=2, ensure_ascii=False))
