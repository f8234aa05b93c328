"""`backend: fsdp`: PyTorch's fully_shard (FSDP2), one group a layer, hybrid sharding by `fsdp_replicas`.

Trained weights are kept in fp32, computed with in bf16, their gradients reduced in fp32; frozen weights are kept in
bf16. One code path serves one process and many.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from engine.backends.base import Blueprint
from engine.backends.guard import Guard
from engine.backends.tensors import Fragment, State
from engine.backends.torch_optimizer import TorchBackend, make_adamw
from engine.config import Settings
from engine.model.initial import InitialWeights, rebuild_buffers
from engine.model.trainable import optimizer_groups
from engine.runtime.distributed import World


class FSDPBackend(TorchBackend):
    def __init__(self, blueprint: Blueprint, settings: Settings, world: World, rounds: int):
        self.model, self.device, self.max_norm = blueprint.model, world.device, settings.max_grad_norm
        self.processes, self.adapters_only = world.size, settings.use_lora
        self.guard = Guard(settings.skip_spikes_sigma, world.device)
        self.reduce_once, self.reshard = settings.fsdp_reduce_once, settings.fsdp_reshard_after_forward
        shards = world.size // settings.fsdp_replicas
        mesh = init_device_mesh(
            world.device.type, (settings.fsdp_replicas, shards), mesh_dim_names=("replica", "shard")
        )
        self.shard_group = mesh["shard"].get_group()
        self._shard(blueprint, settings, mesh if settings.fsdp_replicas > 1 else mesh["shard"])
        self.model.to_empty(device=world.device)
        _fill_shards(self.model, blueprint.weights)
        rebuild_buffers(blueprint.core, world.device)
        groups = optimizer_groups(self.model, blueprint.decayed, settings.weight_decay)
        self.optimizer = make_adamw(groups, settings)
        compute = "bf16 compute, fp32 master weights and reduction" if settings.bf16 else "fp32"
        self.precision = f"{compute}; {shards} shard(s) x {settings.fsdp_replicas} replica(s)"

    def _shard(self, blueprint: Blueprint, settings: Settings, mesh) -> None:
        if settings.bf16:
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        # inputs are never cast: the weights of the loss must stay fp32
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if settings.bf16 else torch.float32,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": settings.fsdp_reshard_after_forward}
        for layer in blueprint.layers:
            fully_shard(layer, **options)
        fully_shard(self.model, **options)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """In all micro-batches but the last, what can wait for it does: the work of a step, not of a micro-batch.

        Replicas are reduced over once, for their processes hold the same shards meanwhile. Weights that a forward
        keeps whole stay so until the step. With `fsdp_reduce_once` shards are not reduced over before either.
        """
        self.model.set_requires_gradient_sync(last or not self.reduce_once)
        self.model.set_requires_all_reduce(last)
        self.model.set_reshard_after_backward(last or self.reshard)
        (loss * self.processes).backward()  # FSDP averages over processes, the engine sums

    def local_gradients(self) -> Iterator[torch.Tensor]:
        return (gradient.to_local() for gradient in super().local_gradients())

    def fragment(self, tensor: torch.Tensor) -> Fragment:
        return Fragment(
            tensor.detach().to_local().view(-1),
            _first_row(tensor) * (tensor.numel() // tensor.shape[0]),
            tensor.numel(),
        )

    def state(self) -> State:
        self._reshard()
        return super().state()

    def _reshard(self) -> None:
        """Weights as shards again: without fsdp_reshard_after_forward an evaluation leaves them whole."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def is_whole(self) -> bool:
        return False

    def full_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        self._reshard()
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().to(dtype).full_tensor()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.grad.full_tensor()) for name, p in self.model.named_parameters() if p.requires_grad)


@torch.no_grad()
def _fill_shards(model: nn.Module, weights: InitialWeights) -> None:
    """Each process reads the rows of its own shards."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        local, start = parameter.to_local(), _first_row(parameter)
        local.copy_(weights.read(name, parameter.shape, start, start + len(local)))


def _first_row(sharded: DTensor) -> int:
    """Where this process's rows begin."""
    mesh = sharded.device_mesh
    rows_per_shard = -(-sharded.shape[0] // mesh.size(-1))  # the division of torch.chunk
    return min(mesh.get_local_rank(-1) * rows_per_shard, sharded.shape[0])
