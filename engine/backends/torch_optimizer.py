"""What the backends share that step torch's own AdamW on (shards of) the parameters, and an exact gradient norm."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from engine.backends.base import Backend
from engine.backends.guard import Guard
from engine.backends.moments import Coded, CompactAdamW, flat_shard
from engine.backends.tensors import GUARD, Fragment, State
from engine.config import Settings

NORM_BLOCK = 2**16
"""Squares that are summed in fp32."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state for each parameter, beside its step."""

AdamW = torch.optim.AdamW | CompactAdamW


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
        self.optimizer.found_inf = self.guard.judge(norm)
        clip_(gradients, norm, self.max_norm)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def fragment(self, tensor: torch.Tensor) -> Fragment:
        """This process's part of a parameter or of a moment of the same layout."""
        return Fragment.whole(tensor)

    def state(self) -> State:
        return state_of(self.stored(), self.optimizer, self.guard, self.fragment)

    def restored(self, state: State) -> None:
        restore(self.stored(), self.optimizer, self.guard, state)


def state_of(
    stored: Iterator[tuple[str, nn.Parameter]],
    optimizer: AdamW,
    guard: Guard,
    fragment: Callable[[torch.Tensor], Fragment] = Fragment.whole,
) -> State:
    """Weights and moments of an optimizer that steps the parameters themselves.

    Args:
        fragment: this process's part of a parameter; a moment has the same layout.
    """
    state = {}
    for name, parameter in stored:
        weight = fragment(parameter)
        state[f"model.{name}"] = weight
        if parameter.requires_grad:
            moments = moments_of(parameter, optimizer)
            state |= {f"{key}.{name}": Fragment(_shown(moments[key]), weight.start, weight.numel) for key in MOMENTS}
    return state | counters(optimizer, guard)


def _shown(moment: torch.Tensor | Coded) -> torch.Tensor:
    return moment.shown() if isinstance(moment, Coded) else flat_shard(moment)


def restore(stored: Iterator[tuple[str, nn.Parameter]], optimizer: AdamW, guard: Guard, state: State) -> None:
    """Takes back from a state of `state_of`, filled from a checkpoint, what is no view of the training's memory."""
    for name, parameter in stored:
        if parameter.requires_grad:
            moments = moments_of(parameter, optimizer)
            for key in MOMENTS:
                if isinstance(moments[key], Coded):
                    moments[key].take(state[f"{key}.{name}"].local)
    share_counters(optimizer, guard)


def moments_of(parameter: torch.Tensor, optimizer: AdamW) -> dict[str, torch.Tensor | Coded]:
    """AdamW's state of a parameter. AdamW makes it in the first step; loading needs it before."""
    if isinstance(optimizer, CompactAdamW):
        return optimizer.moments(parameter)
    if not optimizer.state[parameter]:
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where fused AdamW wants it
        optimizer.state[parameter] = {"step": step} | moments
    return optimizer.state[parameter]


def counters(optimizer: AdamW, guard: Guard) -> State:
    """What is no part's but the whole run's: AdamW's counter, and what the guard goes by.

    AdamW counts for each parameter, but all step together: the first counter stands for all.
    """
    step = next(iter(optimizer.state.values()))["step"]
    return {"step": Fragment.whole(step), GUARD: Fragment.whole(guard.memory)}


def share_counters(optimizer: AdamW, guard: Guard) -> None:
    """Sets all counters by those that `counters` shows."""
    first, *others = optimizer.state.values()
    for moments in others:
        moments["step"].copy_(first["step"])
    if isinstance(optimizer, CompactAdamW):
        draws = int(first["step"]) + guard.counts()[0]
        for moments in optimizer.state.values():
            moments["draws"].fill_(draws)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_adamw(groups: list[dict], settings: Settings) -> AdamW:
    """AdamW in one pass over weights, gradients and moments, on a GPU and on a CPU."""
    options = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    if settings.optimizer_state_dtype != "fp32":
        return CompactAdamW(groups, settings.optimizer_state_dtype, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def global_norm(gradients: list[torch.Tensor], device: torch.device, group=None) -> torch.Tensor:
    """Norm over local gradients and, with a group, over the shards of its processes (fp32 scalar)."""
    squares = [_square(g) for g in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total.sqrt().float()


def _square(gradient: torch.Tensor) -> torch.Tensor:
    """Sum of squares, fp64: of blocks in fp32, of all blocks in fp64.

    An fp32 sum over millions of squares is off by 1e-5 and more, which backends would show; a gradient turned into
    fp64 as a whole takes twice its memory.
    """
    flat = gradient.reshape(-1)
    whole = len(flat) // NORM_BLOCK * NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1).double().square().sum()
    return blocks + torch.linalg.vector_norm(flat[whole:]).double().square()


def clip_(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients so that their norm is at most `limit`, without asking the device for a number."""
    if limit > 0 and gradients:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
