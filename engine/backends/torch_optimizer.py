"""What the backends share that step torch's own AdamW on (shards of) the parameters, and an exact gradient norm."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from engine.backends.base import Backend
from engine.backends.tensors import Fragment, State
from engine.config import Settings

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state for each parameter, beside its step."""


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

    def fragment(self, tensor: torch.Tensor) -> Fragment:
        """This process's part of a parameter or of a moment of the same layout."""
        return Fragment.whole(tensor)

    def state(self) -> State:
        return state_of(self.stored(), self.optimizer, self.fragment)

    def restored(self) -> None:
        share_step(self.optimizer)


def state_of(
    stored: Iterator[tuple[str, nn.Parameter]],
    optimizer: torch.optim.AdamW,
    fragment: Callable[[torch.Tensor], Fragment] = Fragment.whole,
) -> State:
    """Weights and moments of an optimizer that steps the parameters themselves.

    Args:
        fragment: this process's part of a parameter, or of a moment, which has the same layout.
    """
    state = {}
    for name, parameter in stored:
        state[f"model.{name}"] = fragment(parameter)
        if parameter.requires_grad:
            moments = moments_of(parameter, optimizer)
            state |= {f"{key}.{name}": fragment(moments[key]) for key in MOMENTS}
    return state | {"step": step_counter(optimizer)}


def moments_of(parameter: torch.Tensor, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter. AdamW makes it in the first step; loading needs it before."""
    if not optimizer.state[parameter]:
        device = parameter.device if optimizer.defaults["fused"] else "cpu"
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=device)} | moments
    return optimizer.state[parameter]


def step_counter(optimizer: torch.optim.AdamW) -> Fragment:
    """AdamW counts for each parameter, but all step together: the first counter stands for all."""
    return Fragment.whole(next(iter(optimizer.state.values()))["step"])


def share_step(optimizer: torch.optim.AdamW) -> None:
    """Sets all counters to the one that `step_counter` shows."""
    first, *others = (moments["step"] for moments in optimizer.state.values())
    for step in others:
        step.copy_(first)


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
