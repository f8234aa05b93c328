"""`backend: none`: plain PyTorch in one process, fp32. The yardstick that the other backends are measured with."""

from collections.abc import Iterator

import torch

from engine.backends.base import Blueprint
from engine.backends.guard import Guard
from engine.backends.torch_optimizer import TorchBackend, make_adamw
from engine.config import Settings
from engine.model.initial import fill, rebuild_buffers
from engine.model.trainable import optimizer_groups
from engine.runtime.distributed import World


class PlainBackend(TorchBackend):
    precision = "fp32"

    def __init__(self, blueprint: Blueprint, settings: Settings, world: World, rounds: int):
        self.model, self.device, self.max_norm = blueprint.model, world.device, settings.max_grad_norm
        self.adapters_only, self.guard = settings.use_lora, Guard(settings.skip_spikes_sigma, world.device)
        fill(self.model, blueprint.weights, world.device, torch.float32)
        rebuild_buffers(blueprint.core, world.device)
        groups = optimizer_groups(self.model, blueprint.decayed, settings.weight_decay)
        self.optimizer = make_adamw(groups, settings)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.grad) for name, p in self.model.named_parameters() if p.requires_grad)
