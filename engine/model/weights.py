"""Reads model folders of both formats, by name and by rows, without ever holding a whole model.

`WeightFiles` shows any folder (native `higgs_audio_v2` or original `higgs_audio`, one file or shards) under native
names. Slices come from memory-mapped safetensors, so a rank that needs an eighth of a tensor touches an eighth.
The audio tower that an original checkpoint may have is no part of the native model and is kept apart.
"""

import hashlib
from pathlib import Path

import torch
from transformers import HiggsAudioV2Config, PreTrainedTokenizerFast

from engine.errors import ModelError
from engine.model.keys import WHISPER, native_name
from engine.model.tensor_files import TensorFiles, read_json, weight_files

DOWNLOAD_HINT = "download the model first (hf download … --local-dir DIR) and give that folder"
STRETCH = 1 << 20


class WeightFiles:
    """The weights and the configuration of a model folder.

    Attributes:
        folder: where they are.
        format: "native" or "original".
        config: native configuration, converted where the folder is in the original format.
        shapes: native name -> shape of each tensor.
        tower_shapes: likewise for the audio tower of an original checkpoint, under our names (`whisper.`).
        tower_config: the tower's part of config.json, None where the checkpoint says that it has none.
        uses_tower: whether the checkpoint was trained with the tower's features.

    Raises:
        ModelError: no config.json, unknown or unsupported model type, no weights, missing shards.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        raw = _raw_config(self.folder)
        self.config = load_config(self.folder)
        self.format = "native" if raw["model_type"] == "higgs_audio_v2" else "original"
        self.tower_config, self.uses_tower = None, False
        if self.format == "original" and not raw.get("skip_audio_tower"):
            self.tower_config = _tower_config(self.folder, raw)
            self.uses_tower = bool(raw.get("encode_whisper_embed", True))
        original = self.format == "original"
        self._files = weight_files(self.folder, DOWNLOAD_HINT)
        self._tensors = TensorFiles(self._files, native_name if original else lambda key: key)
        shapes = self._tensors.shapes
        self.tower_shapes = {n: shapes[n] for n in shapes if original and n.startswith(WHISPER)}
        self.shapes = {n: shapes[n] for n in shapes if n not in self.tower_shapes}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (dim 0) of a tensor, in the stored dtype."""
        return self._tensors.read(name, start, stop)

    def fingerprint(self) -> str:
        """Tells models apart without reading them in full: SHA-256 of the files' sizes and of stretches of each."""
        digest = hashlib.sha256()
        for file in self._files:
            size = file.stat().st_size
            digest.update(str(size).encode())
            with open(file, "rb") as opened:
                for start in sorted({0, size // 3, 2 * size // 3, max(0, size - STRETCH)}):
                    opened.seek(start)
                    digest.update(opened.read(STRETCH))
        return digest.hexdigest()

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Compares names and shapes with those of the model to fill.

        Raises:
            ModelError: anything missing, unexpected or of another shape; all of it is listed.
        """
        problems = []
        for name, shape in expected.items():
            if name not in self.shapes:
                problems.append(f"{name} is missing{_why_missing(name)}")
            elif self.shapes[name] != shape:
                problems.append(f"{name} has shape {self.shapes[name]}, config.json asks for {shape}")
        problems += [f"{name} is not part of the model" for name in self.shapes if name not in expected]
        if problems:
            raise ModelError(f"{self.folder}: the weights do not fit its config.json:", problems)


def load_config(folder: str | Path) -> HiggsAudioV2Config:
    """The native configuration of a folder of either format; nothing but config.json (and a tokenizer) is read.

    Raises:
        ModelError: no config.json, unknown or unsupported model type.
    """
    folder = Path(folder)
    raw = _raw_config(folder)
    if raw.get("model_type") == "higgs_audio":
        try:
            return convert_config(raw, folder)
        except ModelError:
            raise
        except Exception as error:  # what is missing, or of another kind
            raise _unusable(folder, error) from None
    if raw.get("model_type") != "higgs_audio_v2":
        raise ModelError(
            f"{folder}: model_type is {raw.get('model_type')!r} → a Higgs Audio v2 model has higgs_audio_v2 or "
            "higgs_audio."
        )
    try:
        config = HiggsAudioV2Config.from_dict(raw)
        _check_native(folder, config)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise _unusable(folder, error) from None
    return config


def _raw_config(folder: Path) -> dict:
    return read_json(folder / "config.json", f"model_path must be a model folder; {DOWNLOAD_HINT}")


def _unusable(folder: Path, error: Exception) -> ModelError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ModelError(f"{folder / 'config.json'}: describes no Higgs Audio v2 model ({reason}) → download it again.")


def _tower_config(folder: Path, raw: dict) -> dict:
    found = raw.get("audio_encoder_config") or {}
    if not isinstance(found, dict):
        raise _unusable(folder, TypeError("audio_encoder_config is no object"))
    return found


def _why_missing(name: str) -> str:
    if name != "text_lm_head.weight":
        return ""
    return " → the folder was saved without its text head; take a complete copy of the base model"


def _check_native(folder: Path, config: HiggsAudioV2Config) -> None:
    if config.codebook_size <= max(config.audio_stream_bos_id, config.audio_stream_eos_id):
        raise ModelError(
            f"{folder}: config.json has codebook_size {config.codebook_size}, but the stream ids "
            f"{config.audio_stream_bos_id} and {config.audio_stream_eos_id} must lie inside it → set 1026."
        )


def convert_config(original: dict, folder: Path) -> HiggsAudioV2Config:
    """The native configuration of an original `higgs_audio` config.json.

    Raises:
        ModelError: a variant that the native model has no counterpart for (listed), or no tokenizer beside it.
    """
    text = original["text_config"]
    layers = text["num_hidden_layers"]
    wanted = {
        "audio_adapter_type": original.get("audio_adapter_type") in ("dual_ffn", "dual_ffn_fast_forward"),
        "audio_dual_ffn_layers (every layer)": set(original.get("audio_dual_ffn_layers") or ()) == set(range(layers)),
        "use_delay_pattern true": bool(original.get("use_delay_pattern")),
        "use_audio_out_self_attention false": not original.get("use_audio_out_self_attention"),
        "audio_embed_avg false": not original.get("audio_embed_avg"),
        "use_audio_out_embed_projector false": not original.get("use_audio_out_embed_projector"),
        "audio_decoder_proj_num_layers 0": not original.get("audio_decoder_proj_num_layers"),
        "use_rq_transformer false": not original.get("use_rq_transformer"),
        "audio_ffn sizes equal to the text FFN's": (
            original.get("audio_ffn_hidden_size") in (None, text["hidden_size"])
            and original.get("audio_ffn_intermediate_size") in (None, text["intermediate_size"])
        ),
    }
    refused = [f"needs {name}" for name, fits in wanted.items() if not fits]
    if refused:
        raise ModelError(f"{folder}: this variant of higgs_audio is not the released architecture:", refused)
    tokenizer = load_tokenizer(folder)
    scaling = dict(text.get("rope_scaling") or {"rope_type": "default"})
    return HiggsAudioV2Config(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        hidden_act=text.get("hidden_act", "silu"),
        rms_norm_eps=text["rms_norm_eps"],
        max_position_embeddings=text["max_position_embeddings"],
        initializer_range=text.get("initializer_range", 0.02),
        attention_bias=text.get("attention_bias", False),
        mlp_bias=text.get("mlp_bias", False),
        rope_parameters={**scaling, "rope_theta": text["rope_theta"]},
        pad_token_id=original["pad_token_id"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|eot_id|>"),
        num_codebooks=original["audio_num_codebooks"],
        codebook_size=original["audio_codebook_size"] + 2,  # BOS and EOS of the stream live inside
        audio_token_id=original["audio_out_token_idx"],
        audio_bos_token_id=tokenizer.convert_tokens_to_ids("<|audio_out_bos|>"),
        audio_delay_token_id=tokenizer.convert_tokens_to_ids("<|reserved_special_token_6|>"),
        audio_stream_bos_id=original["audio_stream_bos_id"],
        audio_stream_eos_id=original["audio_stream_eos_id"],
    )


def load_tokenizer(folder: str | Path):
    """The text tokenizer of a model folder.

    Raises:
        ModelError: no tokenizer, or one without Higgs Audio's special tokens.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(
            f"{folder}: no usable tokenizer ({error}) → copy tokenizer.json and its config there."
        ) from None
    needed = ["<|AUDIO|>", "<|AUDIO_OUT|>", "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>"]
    needed += ["<|reserved_special_token_6|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    needed += ["<|eot_id|>", "<|eom_id|>"]
    vocabulary = tokenizer.get_vocab()
    missing = [f"{token} is not in its vocabulary" for token in needed if token not in vocabulary]
    if missing:
        raise ModelError(f"{folder}: the tokenizer is not Higgs Audio's:", missing)
    return tokenizer
