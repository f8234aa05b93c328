"""What tensor parallelism cuts: the matrices of the decoder's layers, of which each process of a group has a part.

| matrices                       | cut along         | a process computes                                           |
|--------------------------------|-------------------|--------------------------------------------------------------|
| q, k, v; gate, up of both FFNs | outputs (axis 0)  | some of the heads, some of the inner values of an FFN        |
| o; down of both FFNs           | inputs (axis 1)   | a summand of all outputs, which the group adds up            |

Each process has all else: norms, embeddings, heads, a Whisper encoder. transformers' own plan for the model, which
DeepSpeed would take, leaves the audio FFN whole.
"""

import re

import torch
from torch import nn
from transformers import HiggsAudioV2Config

from engine.errors import ConfigError

OUTPUTS = r"^model\.layers\.\d+\.(self_attn\.[qkv]_proj|(audio_)?mlp\.(gate|up)_proj)\.(weight|bias)$"
INPUTS = r"^model\.layers\.\d+\.(self_attn\.o_proj|(audio_)?mlp\.down_proj)\.weight$"


def axis(name: str) -> int | None:
    """The axis along which the parameter of this name is cut; None if it is not."""
    if re.match(OUTPUTS, name):
        return 0
    return 1 if re.match(INPUTS, name) else None


def cut_shape(name: str, shape: torch.Size, parts: int) -> torch.Size:
    """Shape of one of `parts` equal parts of a parameter."""
    along = axis(name)
    return torch.Size(size // parts if i == along else size for i, size in enumerate(shape))


def require_divisible(config: HiggsAudioV2Config, parts: int) -> None:
    """Raises ConfigError if the model cannot be cut into `parts` equal parts, naming each number that is in the way."""
    sizes = {
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "inner values of both FFNs": config.intermediate_size,
    }
    problems = [
        f"tensor_parallel_size: {parts} does not divide the model's {size} {what} → a divisor of it"
        for what, size in sizes.items()
        if size % parts
    ]
    if problems:
        raise ConfigError("the model cannot be cut:", problems)


def cut_on_meta(core: nn.Module, parts: int) -> None:
    """Makes a model on the meta device what one process of a group of `parts` has of it.

    Raises:
        ConfigError: it has no `parts` equal parts.
    """
    if parts == 1:
        return
    require_divisible(core.config, parts)
    for name, parameter in list(core.named_parameters()):
        module, _, kind = name.rpartition(".")
        part = torch.empty(cut_shape(name, parameter.shape, parts), dtype=parameter.dtype, device="meta")
        if part.shape != parameter.shape:
            setattr(core.get_submodule(module), kind, nn.Parameter(part, requires_grad=parameter.requires_grad))
