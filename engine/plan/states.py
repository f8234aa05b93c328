"""Bytes that weights, gradients, optimizer and the backend's buffers take on each device, whatever the data.

What each backend keeps, in bytes a parameter (c: 2 in bf16, 4 in fp32; P of the model, N of them trained; W processes,
S shards of an FSDP copy; /W: split over the processes). Under tensor parallelism P and N are what one process has after
the cut, and W counts groups of processes:

| backend   | weights         | masters     | AdamW  | gradients         |
|-----------|-----------------|-------------|--------|-------------------|
| none      | 4 P             |             | 8 N    | 4 N               |
| fsdp      | 4 N/S + c (P-N)/S | the weights | 8 N/S | 4 N/S            |
| ZeRO 0    | 4 P             |             | 8 N    | 4 N               |
| ZeRO 1    | c P             | 4 N/W       | 8 N/W  | 4 N, in bf16 6 N  |
| ZeRO 2    | c P             | 4 N/W       | 8 N/W  | 4 N/W             |
| ZeRO 3    | c P/W           | 4 N/W       | 8 N/W  | 4 N/W             |

AdamW's 8 are 4 with `optimizer_state_dtype: bf16`, 2 with int8. Masters are counted with the optimizer. Offloaded
states lie in host memory instead. ZeRO 1 in bf16 is another optimizer of DeepSpeed's: it adds whole gradients in bf16
to whole ones in fp32, which it has from the start.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from engine.config import Settings
from engine.model.packed import PackedHiggsAudio

MOMENTS = {"fp32": 8, "bf16": 4, "int8": 2 + 8 / 256}
"""Bytes of both moments of a parameter (engine/backends/moments.py); in 8 bits, two scales for 256."""

BUCKET = 5e8
"""Elements that DeepSpeed reduces at once, unless it is told otherwise."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, those trained, of the largest layer, outside all layers.

    Of a model that is cut, one process's.
    """

    total: int
    trained: int
    layer: int
    outside: int

    @classmethod
    def of(cls, model: nn.Module, core: PackedHiggsAudio) -> "Sizes":
        everything = [p.numel() for p in model.parameters()]
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        layers = [sum(p.numel() for p in layer.parameters()) for layer in core.model.layers]
        return cls(sum(everything), sum(trained), max(layers), sum(everything) - sum(layers))


@dataclass(frozen=True)
class States:
    """Bytes on one device.

    Attributes:
        weights, gradients, optimizer: gradients when all of them are there.
        buffers: gathered weights and gradients on their way, while forward and backward run.
        step: what the optimizer's step takes beside the states, when activations are gone.
        lasting: of the gradients, those that have their memory from the start, not as the backward makes them.
        host: bytes of what is offloaded, in host memory.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    step: float
    lasting: float = 0.0
    host: float = 0.0


def states(sizes: Sizes, settings: Settings, processes: int, on_gpu: bool) -> States:
    """The states of one of `processes`."""
    if settings.backend == "fsdp":
        return _fsdp(sizes, settings, processes)
    if settings.backend == "none":
        return _unsharded(sizes, settings)
    return _deepspeed(sizes, settings, processes // settings.tensor_parallel_size, on_gpu)


def _unsharded(sizes: Sizes, settings: Settings) -> States:
    moments = MOMENTS[settings.optimizer_state_dtype] * sizes.trained
    return States(4 * sizes.total, 4 * sizes.trained, moments, 0, 0)


def _fsdp(sizes: Sizes, settings: Settings, processes: int) -> States:
    """A layer and the next one are gathered, each through a buffer of its size, and reduced in fp32.

    With `fsdp_reduce_once` gradients of all micro-batches but the last stay whole.
    """
    c, shards = 2 if settings.bf16 else 4, processes // settings.fsdp_replicas
    several = settings.micro_batches_per_step > processes // settings.processes_per_row
    whole_gradients = 4 * sizes.trained if settings.fsdp_reduce_once and several else 0
    trained, frozen = sizes.trained / shards, (sizes.total - sizes.trained) / shards
    gathered = 3 * sizes.layer if settings.fsdp_reshard_after_forward else sizes.total - sizes.outside + sizes.layer
    share = sizes.trained / sizes.total
    reduced = share * sizes.layer * (c + 4)
    outside_at_the_end = share * sizes.outside * (c + 4)
    return States(
        weights=4 * trained + c * frozen,
        gradients=4 * trained,
        optimizer=MOMENTS[settings.optimizer_state_dtype] * trained,
        buffers=c * (sizes.outside + gathered) + reduced + whole_gradients,
        step=outside_at_the_end,
    )


def _deepspeed(sizes: Sizes, settings: Settings, processes: int, on_gpu: bool) -> States:
    zero = json.loads(Path(settings.ds_config).read_text()).get("zero_optimization", {})
    stage, c = zero.get("stage", 0), 2 if settings.bf16 else 4
    if not stage:
        return _unsharded(sizes, settings)
    mine = sizes.trained / processes
    optimizer = (4 + MOMENTS[settings.optimizer_state_dtype]) * mine
    if stage == 1 and settings.bf16 and "offload_optimizer" not in zero:
        lasting = 4.0 * sizes.trained
        joined = lasting if sizes.trained <= BUCKET else 0.0  # small ones are put together to be reduced
        return States(c * sizes.total, lasting + c * sizes.trained, optimizer, 0, joined, lasting)
    weights = c * sizes.total / (processes if stage == 3 else 1)
    if zero.get("zero_hpz_partition_size", 1) > 1:
        weights += c * sizes.total / zero["zero_hpz_partition_size"]
    bucket = min(zero.get("reduce_bucket_size", BUCKET), sizes.trained)
    buffers = 4 * bucket
    if zero.get("overlap_comm", stage == 3):  # a second bucket; on a CPU what is never written takes no memory
        buffers += 4 * (bucket if on_gpu else min(bucket, sizes.trained - bucket))
    if stage == 3:
        buffers += c * min(zero.get("stage3_max_live_parameters", 1e9), sizes.total)
    gradients, host = 4 * (sizes.trained if stage == 1 else mine), 0.0
    # the step makes the gradients one flat tensor; stage 3 steps a group of `sub_group_size` at a time
    step = 4 * (min(mine, zero.get("sub_group_size", 1e9)) if stage == 3 else mine)
    if stage < 3 and settings.micro_batches_per_step > processes // settings.sequence_parallel_size:
        # before, at the end of a later micro-batch: its gradients in the buckets, and those to be added to the earlier
        step = max(step, buffers + 4 * mine)
    if "offload_optimizer" in zero:
        host, optimizer, gradients, step = optimizer + gradients, 0.0, 0.0, 0.0
    if "offload_param" in zero:
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, buffers, step, lasting=gradients if stage == 3 else 0.0, host=host)
