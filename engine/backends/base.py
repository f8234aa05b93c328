"""What the engine asks of a backend: one process's part in forward, backward, step, and in what checkpoints hold."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from engine.backends.guard import Guard
from engine.backends.moments import flat_shard
from engine.backends.tensors import State
from engine.config import Settings
from engine.model.initial import InitialWeights
from engine.model.packed import PackedHiggsAudio
from engine.runtime.distributed import World


@dataclass(frozen=True)
class Blueprint:
    """A model on the meta device and how to fill it.

    Attributes:
        model: what is trained: `core` itself, or `core` wrapped in adapters.
        core: the Higgs model inside.
        weights: its first values.
        decayed: names of the parameters with weight decay.
        shapes: full shape of every parameter.
    """

    model: nn.Module
    core: PackedHiggsAudio
    weights: InitialWeights
    decayed: set[str]
    shapes: dict[str, torch.Size]

    @property
    def layers(self) -> list[nn.Module]:
        """The units that are sharded one by one: those of the Whisper encoder, if any, and of the language model."""
        encoder = [] if self.core.whisper is None else self.core.whisper.encoder.layers
        return [*encoder, *self.core.model.layers]


class Backend(ABC):
    """The model spread over processes, and its optimizer.

    Losses are already divided by the targets of the whole step, so gradients are *summed* over micro-batches and
    processes. Every process makes the same calls in the same order.

    Attributes:
        model: the model that `blueprint.model` became.
        adapters_only: whether `state` leaves out what is not trained.
        precision: one line for the start-up print.
        guard: decides in each `step` whether it may change anything.
    """

    model: nn.Module
    precision: str
    adapters_only: bool
    guard: Guard

    @abstractmethod
    def __init__(self, blueprint: Blueprint, settings: Settings, world: World, rounds: int):
        """Shards, fills and wraps the model. `rounds`: micro-batches of one process in each step."""

    @abstractmethod
    def forward(self, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and tallies of one micro-batch (PackedHiggsAudio.forward)."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradients of one micro-batch's loss to those of the step. `last`: none follows in this step."""

    @abstractmethod
    def step(self, learning_rate: float) -> torch.Tensor:
        """Clips, updates if the guard lets it, clears the gradients.

        Returns:
            The gradient norm before clipping (fp32 scalar), not finite where any gradient of any process is not.
        """

    @abstractmethod
    def discard(self) -> None:
        """In the place of `step`: clears the gradients, and everything else stays as it is. A collective."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full fp32 gradient of every trained parameter, after the last backward and before `step`."""

    @property
    def is_whole(self) -> bool:
        """Whether each process has every weight whole, and may call `model` in transformers' way by itself."""
        return True

    def full_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, trained or not, whole and rounded to `dtype`, in memory until the next one is asked for.

        A collective: every process must ask for all of them.
        """
        return ((name, parameter.detach().to(dtype)) for name, parameter in self.model.named_parameters())

    def local_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This process's part of every weight, trained or not, one-dimensional."""
        return ((name, flat_shard(parameter)) for name, parameter in self.model.named_parameters())

    @abstractmethod
    def state(self) -> State:
        """This process's fragments of weights and optimizer, as views of the training's own memory.

        Where no view shows it (a weight cut as in tensor_parallel.py, a moment in 8 bits) a copy, which
        `restored` brings back. A collective: every process must ask.
        """

    def stored(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters whose values belong into a checkpoint."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad or not self.adapters_only)

    @abstractmethod
    def restored(self, state: State) -> None:
        """To be called when a `state` of this backend has been filled from a checkpoint."""
