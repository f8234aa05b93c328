"""Tensor parallelism by DeepSpeed's AutoTP: what a model whose matrices are cut asks beyond plain ZeRO.

A group of neighbouring processes has one copy of the model between them and works on the same row. ZeRO splits what
a process has over the groups, and knows nothing of what was cut. Here: the plan for AutoTP, the norm and the
gradients of the whole model, and its state as every other backend stores it, so that a checkpoint goes on anywhere.

Seen flat, a part along axis 0 is a range of the full tensor, and a fragment of it a view of the training's memory. A
part along axis 1 is a piece of every row: those are put together for a checkpoint, and each process takes an even
share of the elements, a copy in host memory; loading takes the same way back.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
from torch import nn

from engine.backends.tensors import Fragment, State
from engine.backends.torch_optimizer import global_norm
from engine.errors import ModelError
from engine.model.cut import INPUTS, OUTPUTS, axis, cut_shape
from engine.runtime.distributed import World


def autotp_section(parts: int) -> dict:
    """`tensor_parallel` of DeepSpeed's configuration."""
    specs = [
        {"patterns": [OUTPUTS], "partition_type": "column"},
        {"patterns": [INPUTS], "partition_type": "row"},
    ]
    return {"autotp_size": parts, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def _added_up(part: torch.Tensor, group) -> torch.Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _AddUp(torch.autograd.Function):
    """Behind what is cut along inputs: the sum over the group, whose gradient each process has already."""

    @staticmethod
    def forward(ctx, part, group):
        return _added_up(part, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Enter(torch.autograd.Function):
    """Before what is cut along outputs: the same on all processes, of whose gradient each has a summand."""

    @staticmethod
    def forward(ctx, same, group):
        ctx.group = group
        return same.view_as(same)

    @staticmethod
    def backward(ctx, gradient):
        return _added_up(gradient, ctx.group), None


class OutputsCut(LinearLayer):
    """DeepSpeed's own adds up its input's gradient in each layer; of q, k and v, of gate and up, once is enough."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight, self.bias)


class InputsCut(LinearAllreduce):
    """DeepSpeed's own adds up in the memory of the product: selective checkpointing keeps it, and adds up once more."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        total = _AddUp.apply(F.linear(inputs, self.weight), self.mp_group)
        return total if self.bias is None else total + self.bias


def add_up_once(core: nn.Module, group) -> None:
    """Makes the layers that AutoTP has put in place ours, and each attention and FFN one place of adding up."""
    for module in core.modules():
        if type(module) is LinearLayer:
            module.__class__ = OutputsCut
        elif type(module) is LinearAllreduce:
            module.__class__ = InputsCut
    for layer in core.model.layers:
        for block in (layer.self_attn, layer.mlp, layer.audio_mlp):
            block.register_forward_pre_hook(lambda _, inputs: (_Enter.apply(inputs[0], group), *inputs[1:]))


class CutWeights:
    """The parameters of a model after AutoTP, seen as parts of the whole ones.

    Args:
        model: cut.
        shapes: full shape of every parameter.
        parts: processes of a group.
        group: this process's.
        split: names of the parameters whose state ZeRO splits over the groups; of the others each group has all.

    Raises:
        ModelError: AutoTP cut it otherwise than it was told.
    """

    def __init__(
        self, model: nn.Module, shapes: dict[str, torch.Size], world: World, parts: int, group, split: set[str]
    ):
        self.world, self.parts, self.part, self.group = world, parts, world.rank % parts, group
        self._full, self._split = shapes, split
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        problems = [
            f"{name} is {list(shape)}, not {list(cut_shape(name, shapes[name], parts))}"
            for name, shape in self.shapes.items()
            if shape != cut_shape(name, shapes[name], parts)
        ]
        if problems:
            raise ModelError("DeepSpeed cut weights unexpectedly → install the release that setup.py names:", problems)

    def norm(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        """Norm of the whole model's gradient (fp32 scalar): parts add up over the group, the rest counts once."""
        parts = [gradient for name, gradient in gradients.items() if axis(name) is not None]
        others = [gradient for name, gradient in gradients.items() if axis(name) is None]
        device = self.world.device
        norm = torch.hypot(global_norm(parts, device, self.group), global_norm(others, device))
        # `others` are the same in the group but for last bits; what is decided by the norm must be one decision
        norm.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=self.group)
        return norm

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's layout, put together from the group's parts."""
        along = axis(name)
        if along is None:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.parts)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=along)

    def widened(self, state: State) -> State:
        """Fragments of parts as fragments of the full tensors; a collective."""
        return {key: self._widened(key, fragment) for key, fragment in state.items()}

    def _widened(self, key: str, fragment: Fragment) -> Fragment:
        along = axis(_name(key))
        if along is None:
            return fragment
        if along == 0:
            return Fragment(fragment.local, fragment.start + self.part * fragment.numel, fragment.numel * self.parts)
        return self._even_share(_name(key), fragment)

    def _even_share(self, name: str, fragment: Fragment) -> Fragment:
        """What all processes have of a tensor, added up; this process's share of its elements, on the host."""
        rows, columns = self._full[name]
        mine = torch.zeros(fragment.numel, device=self.world.device)
        if name in self._split or self.world.rank < self.parts:  # each element once
            mine[fragment.start : fragment.start + len(fragment.local)] = fragment.local
        full = torch.zeros(rows, self.parts, columns // self.parts, device=self.world.device)
        full[:, self.part] = mine.view(rows, -1)
        dist.all_reduce(full)
        share = -(-full.numel() // self.world.size)
        start = min(self.world.rank * share, full.numel())
        local = full.view(-1)[start : start + share].to("cpu", fragment.local.dtype, copy=True)
        return Fragment(local, start, full.numel())

    def write_back(self, state: State, parts: State) -> None:
        """Brings what was read into the copies of `state`, which `widened` made of `parts`, there; a collective."""
        for key, fragment in parts.items():
            if axis(_name(key)) != 1:
                continue
            rows, columns = self._full[_name(key)]
            share = -(-rows * columns // self.world.size)
            mine = torch.zeros(share, device=self.world.device)
            mine[: len(state[key].local)] = state[key].local
            everyone = torch.empty(share * self.world.size, device=self.world.device)
            dist.all_gather_into_tensor(everyone, mine)
            full = everyone[: rows * columns].view(rows, self.parts, columns // self.parts)
            part = full[:, self.part].reshape(-1)
            fragment.local.copy_(part[fragment.start : fragment.start + len(fragment.local)])


def _name(key: str) -> str:
    """The parameter of an entry of a State."""
    return key.partition(".")[2]
