"""What the backends share that step torch's own AdamW on (shards of) the parameters, and an exact gradient norm."""

from collections.abc import Iterator
from pathlib import Path

import torch

from engine.backends.base import Backend
from engine.backends.tensors import load_tensors, save_tensors
from engine.config import Settings


class TorchBackend(Backend):
    """A backend whose `model` holds, after the backward, this process's gradients in `.grad`.

    Attributes:
        optimizer: over the trained parameters.
        max_norm: limit of the gradient norm, 0 for none.
        device: of the parameters.
        shard_group: processes that share one copy of the gradients; None if each holds all of them.
    """

    optimizer: torch.optim.Optimizer
    max_norm: float
    device: torch.device
    shard_group: torch.distributed.ProcessGroup | None = None

    def forward(self, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(*inputs)

    def local_gradients(self) -> Iterator[torch.Tensor]:
        return (p.grad for p in self.model.parameters() if p.requires_grad)

    def step(self, learning_rate: float) -> torch.Tensor:
        gradients = list(self.local_gradients())
        norm = global_norm(gradients, self.device, self.shard_group)
        clip_(gradients, norm, self.max_norm)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        save_tensors(self.model, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_tensors(self.model, self.optimizer, folder)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_adamw(groups: list[dict], settings: Settings, device: torch.device) -> torch.optim.AdamW:
    """AdamW for parameters that will be updated on `device`."""
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=device.type == "cuda" or None,
    )


def global_norm(gradients: list[torch.Tensor], device: torch.device, group=None) -> torch.Tensor:
    """Norm over local gradients and, with a group, over the shards of its processes (fp32 scalar).

    Summed in fp64: an fp32 sum over millions of squares is off by 1e-5 and more, which backends would show.
    """
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total.sqrt().float()


def clip_(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients so that their norm is at most `limit`, without asking the device for a number."""
    if limit > 0 and gradients:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
