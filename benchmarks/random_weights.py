"""Weights of a model that exists in no file: each tensor is drawn on the device when it is asked for."""

import hashlib
from pathlib import Path

import torch
from transformers import HiggsAudioV2Config

from engine.model.initial import build_on_meta

GEOMETRIES = {
    "tiny": dict(hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, head_dim=32),
    "small": dict(hidden_size=512, intermediate_size=1376, layers=8, heads=8, kv_heads=4, head_dim=64),
    "released": dict(hidden_size=3072, intermediate_size=8192, layers=28, heads=24, kv_heads=8, head_dim=128),
}
"""Vocabulary and codebooks are the real ones in each: 128256 and 8 x 1026."""


def configuration(geometry: str) -> HiggsAudioV2Config:
    size = GEOMETRIES[geometry]
    return HiggsAudioV2Config(
        hidden_size=size["hidden_size"], intermediate_size=size["intermediate_size"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        head_dim=size["head_dim"], codebook_size=1026,
    )  # fmt: skip


class RandomWeights:
    """Read as engine.model.weights.WeightFiles is, without a folder behind it.

    A tensor depends on its name alone, so the models of all rows and of all processes begin with the same weights.
    The outputs of a layer are as large as its inputs: every layer matters to the loss that is compared.
    """

    def __init__(self, config: HiggsAudioV2Config, device: torch.device, seed: int):
        self.config, self.device, self.seed = config, device, seed
        self.folder = Path("no-such-folder")  # asked for a Whisper encoder beside the model
        self.shapes = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
        self.tower_shapes, self.tower_config, self.uses_tower = {}, None, False

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)[start:stop]
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.empty(shape, device=self.device).normal_(0, shape[1] ** -0.5, generator=generator)[start:stop]

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        assert expected == self.shapes
