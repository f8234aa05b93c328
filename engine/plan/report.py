"""`higgs-engine plan`: what a run will take, printed from its settings alone, on a machine without a GPU.

Of the model it reads config.json; of data the prepared stores, if train_data_file names such.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.data.batches import BatchPlan
from engine.data.dataset import Dataset
from engine.data.encoder import FRAMES_PER_SECOND
from engine.data.store import Store, is_store
from engine.errors import ConfigError
from engine.model import ulysses
from engine.model.flops import active_adapters, step_flops
from engine.model.recompute import MODES
from engine.plan.activations import AUDIO_SHARE, Row, longest_row
from engine.plan.memory import COMFORT, GIB, Plan, Planner

ALTERNATIVES = {
    "zero1": {"backend": "deepspeed", "ds_config": "zero1"},
    "zero2": {"backend": "deepspeed", "ds_config": "zero2"},
    "zero3": {"backend": "deepspeed", "ds_config": "zero3", "tensor_parallel_size": 1},
    "zero2_offload": {"backend": "deepspeed", "ds_config": "zero2_offload"},
    "fsdp": {
        "backend": "fsdp", "fsdp_reshard_after_forward": True, "fsdp_replicas": 1, "tensor_parallel_size": 1,
    },
    "fsdp, kept gathered": {
        "backend": "fsdp", "fsdp_reshard_after_forward": False, "fsdp_replicas": 1, "tensor_parallel_size": 1,
    },
}  # fmt: skip
TYPICAL_SAMPLE = 1024
"""Tokens of a sample where the data are not known: its attention costs 3 % of the FLOPs."""


@dataclass(frozen=True)
class Machine:
    """`gpus` of `memory` bytes that run `peak` FLOP/s at most, of which training reaches the share `efficiency`."""

    gpus: int
    memory: float
    peak: float
    efficiency: float


def report(config: HiggsAudioV2Config, settings: Settings, machine: Machine) -> tuple[list[str], bool]:
    """The lines, and whether the run fits. `settings` as given, not yet resolved."""
    settings = settings.with_resolved(machine.gpus, has_gpu=True)
    problems = list(ulysses.problems(config, settings))
    if problems:
        raise ConfigError("the settings cannot be used with this model", problems)
    data = _prepared(settings)
    row = Row.typical(settings.max_tokens_per_micro_batch or 8192)
    if data is not None:
        row = Row.of(data, longest_row(data.lengths, settings))
    planner = Planner(config, on_gpu=True)
    chosen = planner.choose(settings, machine.gpus, row, machine.memory)
    fits = chosen.fits(machine.memory)
    lines = [
        *_what(planner, settings, machine, row, data),
        *_by_mode(planner, settings, machine, row),
        *_by_backend(planner, settings, machine, row),
        "",
        f"gradient_checkpointing {settings.gradient_checkpointing}: {chosen.mode}, {chosen.peak / GIB:,.1f} GiB, "
        + ("fits" if fits else "does not fit"),
    ]
    if not fits:
        nearest = planner.nearest(settings, machine.gpus, row, machine.memory)
        lines.append(f"nearest change that fits: {nearest or 'none of those tried'}")
    return [*lines, "", *_speed(config, settings, machine, row, data, chosen)], fits


def _prepared(settings: Settings) -> Dataset | None:
    sources = settings.train_data_file
    if not sources or not all(map(is_store, sources)):
        return None
    data = Dataset([Store(source) for source in sources], settings.data_weights)
    return data.within(settings.max_tokens_per_micro_batch, settings.drop_long_samples)


def _what(
    planner: Planner, settings: Settings, machine: Machine, row: Row, data: Dataset | None
) -> Iterator[str]:  # fmt: skip
    sizes = planner.sizes(replace(settings, tensor_parallel_size=1))
    kind = "LoRA" if settings.use_lora else "full"
    dtype = "bf16" if settings.bf16 else "fp32"
    yield f"model: {sizes.total:,} parameters, {sizes.trained:,} trained ({kind}), {dtype}"
    if settings.tensor_parallel_size > 1:
        part = planner.sizes(settings).total
        yield f"cut for groups of {settings.tensor_parallel_size} GPUs: {part:,} parameters on each"
    known = "as the prepared data are" if data else f"{AUDIO_SHARE:.0%} audio, all labelled: no prepared store is given"
    yield f"longest row: {row.tokens:,} tokens; {known}"
    pieces = settings.sequence_parallel_size
    if pieces > 1:
        yield f"each row is shared by {pieces} GPUs: {row.piece(pieces).tokens:,} tokens on each"
    backend = f"deepspeed, {settings.ds_config}" if settings.backend == "deepspeed" else settings.backend
    yield f"{machine.gpus} GPU(s) of {machine.memory / GIB:,.0f} GiB; backend {backend}"
    if settings.whisper_conditioning not in ("auto", "off"):
        yield "note: the Whisper encoder is not counted"


def _by_mode(planner: Planner, settings: Settings, machine: Machine, row: Row) -> Iterator[str]:
    plans = [planner.plan(settings, machine.gpus, row, mode) for mode in MODES]
    yield ""
    yield _line("GiB a GPU", MODES)
    for part in plans[0].parts:
        yield _line(part, [f"{plan.parts[part] / GIB:,.1f}" for plan in plans])
    yield _line("at the peak", [_shown(plan, machine) for plan in plans])
    if plans[0].states.host:
        yield f"in host memory, all GPUs: {machine.gpus * plans[0].states.host / GIB:,.0f} GiB"


def _by_backend(planner: Planner, settings: Settings, machine: Machine, row: Row) -> Iterator[str]:
    yield ""
    yield _line("peak by backend", MODES)
    alternatives = dict(ALTERNATIVES)
    for replicas in (2, 4, 8):
        if machine.gpus % replicas == 0 and machine.gpus > replicas:
            alternatives[f"fsdp, {replicas} replicas"] = ALTERNATIVES["fsdp"] | {"fsdp_replicas": replicas}
    for name, changes in alternatives.items():
        other = replace(settings, **changes)
        yield _line(name, [_shown(planner.plan(other, machine.gpus, row, mode), machine) for mode in MODES])
    yield f"*: more than {COMFORT:.0%} of the memory"


def _shown(plan: Plan, machine: Machine) -> str:
    return f"{plan.peak / GIB:,.1f}{' ' if plan.fits(machine.memory) else '*'}"


def _line(name: str, cells) -> str:
    return f"  {name:<20}" + "".join(f"{cell.rstrip():>11}" for cell in cells)


def _speed(
    config: HiggsAudioV2Config, settings: Settings, machine: Machine, row: Row, data: Dataset | None, plan: Plan
) -> Iterator[str]:  # fmt: skip
    """Tokens, FLOPs and time of a step; of an epoch, if the data are known."""
    step, steps, lengths = row, None, []
    if data is not None:
        steps = len(_batch_plan(data, settings).epoch(0))
        step = Row.of(data, int(data.lengths.sum()) // steps)
        lengths = data.lengths.astype(int).tolist()
    else:
        step = row.shortened(row.tokens * settings.micro_batches_per_step)
        lengths = [TYPICAL_SAMPLE] * (step.tokens // TYPICAL_SAMPLE or 1)
    adapters = None
    if settings.use_lora:
        adapters = active_adapters(config, settings.lora_rank, _linear_names(settings))
    # of data, those of an epoch, and an even share of them for a step
    scale = sum(lengths) / step.tokens
    targets = int(step.text_targets * scale), int(step.audio_targets * scale)
    flops = step_flops(config, lengths, *targets, adapters) / scale
    seconds = flops / (machine.gpus * machine.peak * machine.efficiency)
    yield (
        f"a step: {step.tokens:,} tokens, {step.audio / FRAMES_PER_SECOND:,.0f} s of audio, {flops / 1e12:,.1f} TFLOP "
        f"of the model; {seconds:.2f} s at {machine.efficiency:.0%} of {machine.peak / 1e12:,.0f} TFLOP/s a GPU: "
        f"{step.tokens / seconds:,.0f} tokens/s"
    )
    if plan.mode == "full":
        yield "full recomputation takes up to a third of that speed; the efficiency given has to know it"
    if steps is None:
        yield "an epoch: not known without data; give prepared stores as train_data_file (higgs-engine prepare)"
    else:
        yield f"an epoch: {steps:,} steps, {steps * seconds / 3600:,.2f} h"


def _linear_names(settings: Settings) -> list[str]:
    """Kinds of layers with adapters; `audio_mlp.up_proj` counts as up_proj, of which a position runs one."""
    return [name.rpartition(".")[2] for name in settings.lora_target_modules]


def _batch_plan(data: Dataset, settings: Settings) -> BatchPlan:
    return BatchPlan(
        data.lengths, max_tokens=settings.max_tokens_per_micro_batch, max_samples=settings.per_device_train_batch_size,
        micro_batches_per_step=settings.micro_batches_per_step, epochs=1, seed=settings.seed,
        mixture=data.mixture(settings.seed),
    )  # fmt: skip
