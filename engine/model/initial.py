"""Builds the model without memory and fills it with its first weights, shard by shard.

The model is made on the meta device, chosen parts are frozen or wrapped in adapters, the backend shards it, and
only then are weights read: each process reads the rows it keeps. Adapters get their first values from a generator
seeded by their own name, so that they do not depend on how many processes share them.
"""

import hashlib
import math

import torch
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2RotaryEmbedding

from engine.model.keys import base_name
from engine.model.weights import WeightFiles


def build_on_meta(config: HiggsAudioV2Config) -> HiggsAudioV2ForConditionalGeneration:
    """The model with its text head, fp32, without memory."""
    with torch.device("meta"):
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    return model.float().train()


class InitialWeights:
    """First values of every parameter of a (possibly adapter-wrapped) model.

    Args:
        files: the base model.
        seed: of the adapters.
    """

    def __init__(self, files: WeightFiles, seed: int):
        self.files, self.seed = files, seed

    def check(self, model: nn.Module) -> None:
        """Raises ModelError unless the files hold exactly what the model needs."""
        self.files.check({base_name(n): tuple(p.shape) for n, p in model.named_parameters() if ".lora_" not in n})

    def read(self, name: str, shape: torch.Size, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter whose full shape is `shape`."""
        if ".lora_" not in name:
            return self.files.read(base_name(name), start, stop)
        return self._adapter(name, shape)[start:stop]

    def _adapter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """LoRA's start: A uniform as a linear layer's default, B zero, so that the first forward is the base's."""
        if ".lora_B." in name:
            return torch.zeros(shape)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little") >> 1
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def fill_module(module: nn.Module, prefix: str, weights: InitialWeights, device: torch.device, dtype: torch.dtype):
    """Replaces a module's own meta parameters (not those of its children) by real, filled ones."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        full_name = f"{prefix}.{name}" if prefix else name
        value = weights.read(full_name, parameter.shape).to(device=device, dtype=dtype)
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def fill(model: nn.Module, weights: InitialWeights, device: torch.device, dtype: torch.dtype) -> None:
    """A whole, unsharded model in one dtype on one device."""
    for prefix, module in model.named_modules():
        fill_module(module, prefix, weights, device, dtype)


def rebuild_buffers(model: HiggsAudioV2ForConditionalGeneration, device: torch.device) -> None:
    """Computes what no checkpoint holds: rotary frequencies (always fp32) and the offsets of the codebooks."""
    config = model.config
    with torch.device(device):
        model.model.rotary_emb = HiggsAudioV2RotaryEmbedding(config)
        offsets = torch.arange(config.num_codebooks) * config.codebook_size
    for module in model.modules():  # an embedding trained beside adapters is there twice
        if hasattr(module, "audio_tokens_offsets"):
            module.audio_tokens_offsets = nn.Buffer(offsets.clone(), persistent=False)
