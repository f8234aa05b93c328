"""Builds the model without memory and fills it with its first weights, shard by shard.

The model is made on the meta device, chosen parts are frozen or wrapped in adapters, the backend shards it, and
only then are weights read: each process reads the rows it keeps. Adapters and a projection that no checkpoint holds
get their first values from a generator seeded by their own name, so that they do not depend on how many processes
share them; DoRA's magnitudes are the norms of the base's rows. An adapter to go on from is read like the base.
"""

import hashlib
import math

import torch
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2RotaryEmbedding

from engine.model.adapter_files import AdapterFiles
from engine.model.keys import WHISPER, adapter_name, base_name
from engine.model.weights import WeightFiles
from engine.model.whisper_source import WhisperSource


def build_on_meta(config: HiggsAudioV2Config) -> HiggsAudioV2ForConditionalGeneration:
    """The model with its text head, fp32, without memory."""
    with torch.device("meta"):
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    return model.float().train()


class InitialWeights:
    """First values of every parameter of a (possibly adapter-wrapped) model.

    Args:
        files: the base model.
        seed: of what is new.
        whisper: the encoder and perhaps projection of a model with Whisper conditioning.
        adapter: to go on from; None: adapters are new, and what is trained whole beside them starts as the base's.
    """

    def __init__(
        self,
        files: WeightFiles,
        seed: int,
        whisper: WhisperSource | None = None,
        adapter: AdapterFiles | None = None,
    ):
        self.files, self.seed, self.whisper, self.adapter = files, seed, whisper, adapter

    def check(self, model: nn.Module) -> None:
        """Raises ModelError unless the files hold exactly what the model needs. A WhisperSource checks itself."""
        shapes = {base_name(n): tuple(p.shape) for n, p in model.named_parameters() if ".lora_" not in n}
        self.files.check({name: shape for name, shape in shapes.items() if not name.startswith(WHISPER)})
        if self.adapter is not None:
            self.adapter.check(adapter_shapes(model), self.files.folder)

    def read(self, name: str, shape: torch.Size, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a parameter whose full shape is `shape`."""
        if self.adapter is not None and is_of_adapter(name):
            return self.adapter.read(adapter_name(name), start, stop)
        if ".lora_magnitude_vector." in name:
            weight = self.files.read(f"{base_name(name.partition('.lora_')[0])}.weight", start, stop)
            return torch.linalg.vector_norm(weight.float(), dim=1)
        if ".lora_" in name:
            return self._adapter(name, shape)[start:stop]
        name = base_name(name)
        if not name.startswith(WHISPER):
            return self.files.read(name, start, stop)
        if name in self.whisper.shapes:
            return self.whisper.read(name, start, stop)
        return self._linear(name, shape)[start:stop]

    def _adapter(self, name: str, shape: torch.Size) -> torch.Tensor:
        """LoRA's start: A as a linear layer, B zero, so that the first forward is the base's."""
        return torch.zeros(shape) if ".lora_B." in name else self._linear(name, shape)

    def _linear(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A weight uniform as a linear layer's default, a bias zero."""
        if len(shape) == 1:
            return torch.zeros(shape)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little") >> 1
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def is_of_adapter(parameter: str) -> bool:
    """Whether a parameter of a PEFT-wrapped model stands in the adapter's file: adapters, and what is saved whole."""
    return ".lora_" in parameter or ".modules_to_save." in parameter


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name in the adapter's file -> shape, of everything that the file of a PEFT-wrapped model holds."""
    return {adapter_name(n): tuple(p.shape) for n, p in model.named_parameters() if is_of_adapter(n)}


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
        if "audio_tokens_offsets" in module._buffers:  # hasattr looks through PEFT's wrapper of it, setting does not
            module.audio_tokens_offsets = nn.Buffer(offsets.clone(), persistent=False)
