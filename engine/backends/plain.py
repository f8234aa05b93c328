"""`backend: none`: plain PyTorch in one process, fp32. The yardstick that the other backends are measured with."""

from collections.abc import Iterator
from pathlib import Path

import torch

from engine.backends.base import Backend, Blueprint, clip_, global_norm, make_adamw, set_learning_rate
from engine.backends.tensors import load_tensors, save_tensors
from engine.config import Settings
from engine.model.initial import fill, rebuild_buffers
from engine.model.trainable import optimizer_groups
from engine.runtime.distributed import World


class PlainBackend(Backend):
    name = "none"
    precision = "fp32"

    def __init__(self, blueprint: Blueprint, settings: Settings, world: World, rounds: int):
        self.model = blueprint.model
        fill(self.model, blueprint.weights, world.device, torch.float32)
        rebuild_buffers(blueprint.core, world.device)
        groups = optimizer_groups(self.model, blueprint.decayed, settings.weight_decay)
        self.optimizer = make_adamw(groups, settings, world.device)
        self.max_norm, self.device = settings.max_grad_norm, world.device

    def forward(self, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> torch.Tensor:
        gradients = [gradient for _, gradient in self.gradients()]
        norm = global_norm(gradients, self.device)
        clip_(gradients, norm, self.max_norm)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.grad) for name, p in self.model.named_parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        save_tensors(self.model, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_tensors(self.model, self.optimizer, folder)
