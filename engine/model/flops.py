"""Model FLOPs of an optimizer step, and MFU: what the mathematics asks for, whatever the code spends on it.

    F = 6 P_active T + 6 L H d sum(s_i^2) + 6 h V T_text + 6 h A T_audio

T positions, text and audio alike, each running attention and *one* of the two FFNs (P_active); samples of s_i
positions, of which causal attention sees half; heads only at labelled positions. One multiply-add is 2, a backward
twice a forward. Padding, recomputation, embedding look-ups and rows of a head without a label count nothing.

With LoRA the base needs no weight gradients, and of P_lora adapter parameters a position runs all three:

    F = 4 P_active T + 6 P_lora T + 6 L H d sum(s_i^2) + 4 h V T_text + 4 h A T_audio

Higgs Audio v2 runs 2.82 of its 5.77 billion parameters a position: 17.6 GFLOP per audio frame in samples of 1024.
Counting 6 x 5.77 billion, as trainers that know one FFN a layer do, reports twice the truth.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from transformers import HiggsAudioV2Config

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PEAK_FLOPS = {
    r"H100 PCIe": 756e12, r"H[12]00 NVL": 835e12, r"H[12]00\b": 989e12, r"\bA100\b": 312e12, r"\bL40S\b": 362e12,
    r"\bL4$": 121e12, r"\bRTX 4090$": 165e12,
}  # fmt: skip
"""Dense bf16, summed in fp32, of the datasheets, by a pattern in the device's name; the first that fits."""


@dataclass(frozen=True)
class Parameters:
    """How many parameters a configuration has.

    Attributes:
        active: of the linear layers that one position runs.
        text_head, audio_head: of each head.
        total: all, embeddings and norms included.
    """

    active: int
    text_head: int
    audio_head: int
    total: int

    @classmethod
    def of(cls, config: HiggsAudioV2Config) -> "Parameters":
        shapes = _linear_shapes(config)
        ffn = sum(rows * columns for name, (rows, columns) in shapes.items() if name in LINEAR_LAYERS[4:])
        layer = sum(rows * columns for rows, columns in shapes.values())
        h, layers = config.hidden_size, config.num_hidden_layers
        text_head, audio_head = config.vocab_size * h, config.num_codebooks * config.codebook_size * h
        norms = (4 * layers + 1) * h
        total = layers * (layer + ffn) + 2 * (text_head + audio_head) + norms  # embeddings are as large as heads
        return cls(layers * layer, text_head, audio_head, total)


def _linear_shapes(config: HiggsAudioV2Config) -> dict[str, tuple[int, int]]:
    """Shapes of the linear layers that a position runs in one decoder layer."""
    h, f = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shapes = ((queries, h), (keys, h), (keys, h), (h, queries), (f, h), (f, h), (h, f))
    return dict(zip(LINEAR_LAYERS, shapes, strict=True))


def active_adapters(config: HiggsAudioV2Config, rank: int, targets: Collection[str] = LINEAR_LAYERS) -> int:
    """LoRA parameters that one position runs, with adapters on the named layers (of both FFNs alike)."""
    return config.num_hidden_layers * sum(rank * sum(_linear_shapes(config)[name]) for name in set(targets))


def step_flops(
    config: HiggsAudioV2Config,
    sample_lengths: Collection[int],
    text_targets: int,
    audio_target_rows: int,
    adapters: int | None = None,
    recomputed: bool = False,
) -> int:
    """Model FLOPs of forward and backward.

    Given what the code runs instead of what it must (padded lengths, heads at every position, layers `recomputed`),
    it is the FLOPs of the hardware, from which HFU follows as MFU does from those of the model.

    Args:
        sample_lengths: positions of each sample.
        text_targets: positions with a text label.
        audio_target_rows: positions with a label in some codebook.
        adapters: LoRA parameters that one position runs (active_adapters); None where every weight is trained.
        recomputed: whether the backward runs the forward of every layer again, as activation checkpointing does.
    """
    squares = sum(length**2 for length in sample_lengths)
    return flops_of_sums(
        config, sum(sample_lengths), squares, text_targets, audio_target_rows, adapters=adapters, recomputed=recomputed
    )


def flops_of_sums(
    config: HiggsAudioV2Config,
    positions: int,
    squares: int,
    text_targets: int,
    audio_target_rows: int,
    adapters: int | None = None,
    recomputed: bool = False,
) -> int:
    """`step_flops` from the sum of the sample lengths and that of their squares; of any number of steps."""
    parameters = Parameters.of(config)
    matmuls = parameters.active * positions
    heads = parameters.text_head * text_targets + parameters.audio_head * audio_target_rows
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * squares
    again = 2 * (matmuls + (adapters or 0) * positions) + attention // 3 if recomputed else 0
    if adapters is None:
        return 6 * (matmuls + heads) + attention + again
    return 4 * (matmuls + heads) + 6 * adapters * positions + attention + again


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for one not in the table, never another's number."""
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, device_name)), None)
