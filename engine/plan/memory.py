"""The memory plan: what a run takes on each device, whether it fits, and the nearest change with which it does.

Peak of a step, the larger of two moments:

    forward and backward   weights + optimizer + buffers + activations and heads + gradients
                           (with one micro-batch a process the larger of these two: gradients grow as activations go)
    the step               weights + optimizer + gradients + what the step takes
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.errors import ConfigError
from engine.model.flops import Parameters
from engine.model.loss import CHUNK_ROWS
from engine.model.recompute import MODES
from engine.model.whisper_source import WhisperSource
from engine.plan.activations import Activations, Row, count, trainable_on_meta
from engine.plan.states import Sizes, States, states
from engine.runtime.distributed import World

GIB = 2**30
ON_GPU = 2 * GIB
"""CUDA's context, NCCL's buffers, holes between allocations: beside all tensors."""

COMFORT = 0.9
"""Share of the memory up to which a plan, which may err by a tenth, is said to fit."""

LEAST_TOKENS = 2048
"""Rows are not proposed shorter than this: a sample of 80 s has as many positions."""


@dataclass(frozen=True)
class Plan:
    """Bytes of one device under one checkpointing mode; `rounds`: micro-batches of a process in a step."""

    mode: str
    states: States
    activations: Activations
    rounds: int
    overhead: int

    @property
    def parts(self) -> dict[str, float]:
        s = self.states
        return {
            "weights": s.weights, "gradients": s.gradients, "optimizer": s.optimizer,
            "activations": self.activations.kept, "logits": self.activations.heads,
            "buffers": s.buffers + self.overhead,
        }  # fmt: skip

    @property
    def peak(self) -> float:
        s, held = self.states, self.activations.peak
        made = s.gradients - s.lasting
        running = s.lasting + (held + made if self.rounds > 1 else max(held, made))
        return s.weights + s.optimizer + self.overhead + max(running + s.buffers, s.gradients + s.step)

    def fits(self, memory: float) -> bool:
        return self.peak <= COMFORT * memory


class Planner:
    """Plans of one model on one kind of device; counts of activations are kept, for many plans share one."""

    def __init__(self, config: HiggsAudioV2Config, on_gpu: bool, whisper: WhisperSource | None = None):
        self.config, self.on_gpu, self.whisper = config, on_gpu, whisper
        self._sizes: dict[tuple[bool, int], Sizes] = {}
        self._counts: dict[tuple, Activations] = {}

    def plan(self, settings: Settings, processes: int, row: Row, mode: str) -> Plan:
        """`settings` are resolved."""
        shared = settings.sequence_parallel_size, settings.tensor_parallel_size
        key = (settings.use_lora, settings.bf16, *shared, mode, row)
        if key not in self._counts:
            self._counts[key] = count(self.config, settings, mode, row)
        rounds = -(-settings.micro_batches_per_step // (processes // settings.processes_per_row))
        found = states(self.sizes(settings), settings, processes, self.on_gpu)
        return Plan(mode, found, self._counts[key], rounds, ON_GPU if self.on_gpu else int(found.host))

    def sizes(self, settings: Settings) -> Sizes:
        """Parameters of the model as the settings train it, and cut it."""
        key = settings.use_lora, settings.tensor_parallel_size
        if key not in self._sizes:
            whisper = self.whisper and self.whisper.build_on_meta()
            self._sizes[key] = Sizes.of(*trainable_on_meta(self.config, settings, whisper))
        return self._sizes[key]

    def choose(self, settings: Settings, processes: int, row: Row, memory: float) -> Plan:
        """The plan of the mode that the settings say; of `auto`, the fastest that fits, else the smallest."""
        wanted = settings.gradient_checkpointing
        for mode in MODES if wanted == "auto" else [wanted]:
            plan = self.plan(settings, processes, row, mode)
            if plan.fits(memory):
                break
        return plan

    def nearest(self, settings: Settings, processes: int, row: Row, memory: float) -> str | None:
        """The smallest change, in words, with which the run fits; None if none of those tried is enough."""
        for words, changed, gpus, shorter in _changes(settings, processes, row, self.config.num_key_value_heads):
            if self.choose(changed, gpus, shorter, memory).fits(memory):
                return words
        return None


def _changes(
    settings: Settings, processes: int, row: Row, heads: int
) -> Iterator[tuple[str, Settings, int, Row]]:  # fmt: skip
    """Changes in the order of what they cost: memory for time first, then hardware, then what is trained.

    Args:
        heads: key-value heads of the model.
    """
    auto = replace(settings, gradient_checkpointing="auto")
    yield "--gradient_checkpointing auto", auto, processes, row
    split = _more_split(auto)
    if split and processes > 1:
        yield *split, processes, row
    tokens = row.tokens // 2
    while tokens >= max(LEAST_TOKENS, row.sample):
        half = replace(auto, max_tokens_per_micro_batch=tokens)
        yield f"--max_tokens_per_micro_batch {tokens}", half, processes, row.shortened(tokens)
        tokens //= 2
    for pieces in _more_pieces(auto, processes, heads):
        words = f"--sequence_parallel_size {pieces} (each row shared by {pieces} processes)"
        yield words, replace(auto, sequence_parallel_size=pieces), processes, row
    words, most = split or ("", auto)
    for gpus in (2, 4, 8, 16, 32, 64):
        if gpus > processes and gpus % most.processes_per_row == 0 and settings.backend != "none":
            readers = gpus // most.processes_per_row
            more = replace(most, micro_batches_per_step=max(settings.micro_batches_per_step, readers))
            yield f"{gpus} GPUs {words}".strip(), more, gpus, row
    if settings.backend == "deepspeed" and "offload" not in settings.ds_config:
        for name in ("zero2_offload", "zero3_offload")[: 1 if settings.tensor_parallel_size > 1 else 2]:
            yield f"--ds_config {name}", replace(auto, ds_config=name), processes, row
    if not settings.use_lora and settings.tensor_parallel_size == 1:
        yield "--use_lora", replace(auto, use_lora=True, train_modules=[], freeze_llm=False), processes, row


def _more_pieces(settings: Settings, processes: int, heads: int) -> Iterator[int]:
    """Sizes of groups that may share a row, above the present one."""
    if settings.backend == "none" or settings.tensor_parallel_size > 1:
        return
    for pieces in range(settings.sequence_parallel_size + 1, processes + 1):
        if processes % pieces == 0 and heads % pieces == 0:
            yield pieces


def _more_split(settings: Settings) -> tuple[str, Settings] | None:
    """The same backend with everything spread over all processes, if that is not so yet."""
    if settings.backend == "fsdp":
        least = {"fsdp_replicas": 1, "fsdp_reshard_after_forward": True, "fsdp_reduce_once": False}
        flags = {"fsdp_replicas": "--fsdp_replicas 1", "fsdp_reshard_after_forward": "--fsdp_reshard_after_forward",
                 "fsdp_reduce_once": "--no-fsdp_reduce_once"}  # fmt: skip
        other = [name for name, value in least.items() if getattr(settings, name) != value]
        if other and not (other == ["fsdp_reduce_once"] and settings.use_lora):
            return " ".join(flags[name] for name in other), replace(settings, **least)
    if settings.tensor_parallel_size > 1:  # stage 3 wants whole matrices
        changed = replace(settings, ds_config="zero3", tensor_parallel_size=1)
        return "--ds_config zero3 --tensor_parallel_size 1", changed
    if settings.backend == "deepspeed" and "zero3" not in settings.ds_config:
        return "--ds_config zero3", replace(settings, ds_config="zero3")
    return None


def for_training(
    config: HiggsAudioV2Config, settings: Settings, world: World, row: Row, whisper: WhisperSource | None = None
) -> tuple[str, Plan | None]:
    """The checkpointing mode of a run about to start, and its plan, if one was needed to say so.

    Raises:
        ConfigError: on a GPU, it cannot fit: even a tenth less, as far as a plan may err, is more than there is.
    """
    on_gpu, wanted = world.device.type == "cuda", settings.gradient_checkpointing
    if not on_gpu and wanted != "auto":
        return wanted, None
    memory = _memory(world)
    if not on_gpu and _roughly(config, row.piece(settings.sequence_parallel_size)) < memory / 4:
        return MODES[0], None
    planner = Planner(config, on_gpu, whisper)
    plan = planner.choose(settings, world.size, row, memory)
    if on_gpu and COMFORT * plan.peak > memory:
        nearest = planner.nearest(settings, world.size, row, memory)
        remedy = nearest or "`higgs-engine plan` shows what takes it; a smaller part to train, or more GPUs"
        line = f"memory: {plan.peak / GIB:,.1f} GiB are needed on each GPU, it has {memory / GIB:,.1f} → {remedy}"
        raise ConfigError("the run does not fit:", [line])
    return plan.mode, plan


def _roughly(config: HiggsAudioV2Config, row: Row) -> float:
    """About what a run takes in fp32: a small model on a large machine need not wait for the count."""
    layers = config.num_hidden_layers * row.tokens * 4 * (12 * config.hidden_size + 5 * config.intermediate_size)
    logits = 3 * 4 * min(row.text_targets, CHUNK_ROWS) * config.vocab_size
    return 20 * Parameters.of(config).total + layers + logits


def _memory(world: World) -> float:
    """Bytes that each process may use, by the process that has the fewest, so that all choose alike."""
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    else:
        memory = free_host_memory() / world.local_size
    if world.size == 1:
        return memory
    fewest = torch.tensor([memory], dtype=torch.float64, device=world.device)
    torch.distributed.all_reduce(fewest, op=torch.distributed.ReduceOp.MIN)
    return fewest.item()


def free_host_memory() -> float:
    """Bytes that this machine can still give; where it does not say, no limit."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return float("inf")
