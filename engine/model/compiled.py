"""`torch_compile`: decoder layers as compiled graphs, their small operations fused into few kernels.

The unit is the inside of a layer, after its sharding hooks and around its activation checkpointing, so that FSDP and
ZeRO 0 to 2 work as they do without. All layers share the graphs of one. Sizes are symbolic: rows of any length use one
graph, only a modality with no token or a single one makes another (Python's 0 and 1 are constants to the compiler),
and so does evaluation. A graph break is an error, not a slow layer.

What changes from batch to batch must come as tensors: of the attention kernels flash and varlen do so, and
`sdpa_of_rows` here, an operation that the compiler does not look into, for the CPU.
"""

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise

import torch

from engine.config import Settings
from engine.model.attention import PackedAttentionFunction, SampleBounds

RECOMPILATIONS = 32
"""More than the graphs that a run can need: 0, 1 and many tokens of either modality, in training and evaluation."""


def problems(settings: Settings, attention: str, device: torch.device) -> Iterator[str]:
    """Why layers cannot be compiled here."""
    if not settings.torch_compile:
        return
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))):
        yield "torch_compile: needs a C++ compiler → install g++, or leave it out"
    if device.type == "cuda" and attention not in ("flash", "varlen"):
        yield f"torch_compile: attention {attention} is compiled anew for each batch → flash or varlen, with bf16"


def compile_layers(layers: torch.nn.ModuleList, backend: str = "inductor") -> None:
    """Compiles what PackedDecoderLayer calls; the compiler runs at the first row.

    Args:
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    for layer in layers:
        layer.packed = torch.compile(layer.packed, fullgraph=True, dynamic=True, backend=backend)


def attention_of(name: str, attend: PackedAttentionFunction) -> PackedAttentionFunction:
    """What stands for an attention function in a compiled layer."""
    return sdpa_of_rows if name == "sdpa" else attend


def sdpa_of_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SampleBounds, scale: float) -> torch.Tensor:
    """engine/model/attention.py's `sdpa` as one operation, on a CPU."""
    return _attend(q, k, v, bounds.ends, scale)[0]


def _samples(ends: torch.Tensor, *rows: torch.Tensor):
    """Each sample's part of [T, heads, d], as SDPA takes it: [1, heads, tokens, d]."""
    for start, stop in pairwise(ends.tolist()):
        yield [t[start:stop].transpose(0, 1).unsqueeze(0) for t in rows]


@torch.library.custom_op("higgs_engine::attention_of_rows", mutates_args=())
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Also the logarithms of the sums that the backward needs, fp32 [T, heads]."""
    out = q.new_empty(q.shape)
    sums = q.new_empty(q.shape[:2], dtype=torch.float32)
    for qs, ks, vs, part, logs in _samples(ends, q, k, v, out, sums.unsqueeze(-1)):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(qs, ks, vs, 0.0, True, scale=scale)
        part.copy_(found[0])
        logs.copy_(found[1].unsqueeze(-1))
    return out, sums


@_attend.register_fake
def _(q, k, v, ends, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("higgs_engine::attention_of_rows_backward", mutates_args=())
def _attend_backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    ends: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
    for *parts, logs, to_q, to_k, to_v in _samples(ends, gradient, q, k, v, out, sums.unsqueeze(-1), *gradients):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, logs.squeeze(-1), 0.0, True, scale=scale
        )
        for target, part in zip((to_q, to_k, to_v), found, strict=True):
            target.copy_(part)
    return gradients


@_attend_backward.register_fake
def _(gradient, q, k, v, out, sums, ends, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    q, k, v, ends, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, ends)


def _backward(ctx, gradient, _):
    q, k, v, out, sums, ends = ctx.saved_tensors
    return *_attend_backward(gradient, q, k, v, out, sums, ends, ctx.scale), None, None


_attend.register_autograd(_backward, setup_context=_keep)
