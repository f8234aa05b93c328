"""Names of weights: the original `higgs_audio` format, transformers' `higgs_audio_v2`, and our wrappers.

The two formats hold the same tensors under other names: no transposes, no permutations, bit-exact both ways
(the mapping of transformers' convert_higgs_audio_v2_to_hf.py). Checkpoints trained with `freeze_embed_until_idx`
keep an embedding or head in two parts, which belong together along dim 0.
"""

import re

ORIGINAL_TO_NATIVE = (
    (r"^layers\.", "model.layers."),
    (r"^embed_tokens\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^audio_codebook_embeddings\.", "model.embed_audio_tokens.embed_audio_tokens."),
    (r"^audio_decoder_proj\.(audio_lm_head|text_lm_head)\.", r"\1."),
    (r"^audio_tower\.", "whisper.encoder."),
    (r"^audio_encoder_proj\.linear\.", "whisper.projection."),
)
NATIVE_TO_ORIGINAL = (
    (r"^model\.embed_audio_tokens\.embed_audio_tokens\.", "audio_codebook_embeddings."),
    (r"^model\.", ""),
    (r"^(audio_lm_head|text_lm_head)\.", r"audio_decoder_proj.\1."),
    (r"^whisper\.encoder\.", "audio_tower."),
    (r"^whisper\.projection\.", "audio_encoder_proj.linear."),
)
IGNORED_ORIGINALS = re.compile(r"^audio_codebook_weights$|rotary_emb\.inv_freq$")
SPLIT_PARTS = re.compile(r"\.(?:embedding|linear)_(frozen|trainable)\b")

WHISPER = "whisper."
"""How names begin of what stands beside transformers' model: the Whisper encoder and its projection."""

WRAPPERS = re.compile(
    r"^base_model\.model\.|\.base_layer(?=\.)|\.modules_to_save\.default(?=\.)|\.original_module(?=\.)"
)


def native_name(original: str) -> str | None:
    """Native name of an original tensor (a split part gets the name of the whole), None for one that is not needed."""
    if IGNORED_ORIGINALS.search(original):
        return None
    name = SPLIT_PARTS.sub("", original)
    for pattern, replacement in ORIGINAL_TO_NATIVE:
        name, found = re.subn(pattern, replacement, name)
        if found:
            return name
    return name


def original_name(native: str) -> str:
    """Name in the original format of a tensor of the native model, or of the Whisper conditioning beside it."""
    for pattern, replacement in NATIVE_TO_ORIGINAL:
        name, found = re.subn(pattern, replacement, native)
        if found:
            return name
    return native


def is_second_part(original: str) -> bool:
    """Whether a tensor is the trainable (lower) part of a split one."""
    match = SPLIT_PARTS.search(original)
    return match is not None and match.group(1) == "trainable"


def base_name(parameter: str) -> str:
    """Name of the base model's weight behind a parameter of a PEFT-wrapped model."""
    return WRAPPERS.sub("", parameter)


def adapter_name(parameter: str) -> str:
    """Name in `adapter_model.safetensors` of a parameter that a LoRA run trains."""
    name = re.sub(r"\.default(?=\.|$)", "", parameter.replace(".modules_to_save.default.", "."))
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name  # as PEFT names it
