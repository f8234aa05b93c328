"""`backend: fsdp`: PyTorch's fully_shard (FSDP2), one group a decoder layer, hybrid sharding by `fsdp_replicas`.

Trained weights are kept in fp32, computed with in bf16, their gradients reduced in fp32; frozen weights are kept in
bf16. One code path serves one process and many.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from engine.backends.base import Backend, Blueprint, clip_, global_norm, make_adamw, set_learning_rate
from engine.backends.tensors import load_tensors, save_tensors
from engine.config import Settings
from engine.model.initial import InitialWeights, rebuild_buffers
from engine.model.trainable import optimizer_groups
from engine.runtime.distributed import World


class FSDPBackend(Backend):
    name = "fsdp"

    def __init__(self, blueprint: Blueprint, settings: Settings, world: World, rounds: int):
        self.model, self.world, self.max_norm = blueprint.model, world, settings.max_grad_norm
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
        self.optimizer = make_adamw(groups, settings, world.device)
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
        for layer in blueprint.core.model.layers:
            fully_shard(layer, **options)
        fully_shard(self.model, **options)

    def forward(self, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.world.size).backward()  # FSDP averages over processes, the engine sums

    def step(self, learning_rate: float) -> torch.Tensor:
        gradients = [p.grad.to_local() for p in self.model.parameters() if p.requires_grad]
        norm = global_norm(gradients, self.world.device, self.shard_group)
        clip_(gradients, norm, self.max_norm)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.grad.full_tensor()) for name, p in self.model.named_parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        save_tensors(self.model, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_tensors(self.model, self.optimizer, folder)


@torch.no_grad()
def _fill_shards(model: nn.Module, weights: InitialWeights) -> None:
    """Each process reads the rows of its own shards."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        mesh, local = parameter.device_mesh, parameter.to_local()
        rows_per_shard = -(-parameter.shape[0] // mesh.size(-1))  # the division of torch.chunk
        start = min(mesh.get_local_rank(-1) * rows_per_shard, parameter.shape[0])
        local.copy_(weights.read(name, parameter.shape, start, start + len(local)))
