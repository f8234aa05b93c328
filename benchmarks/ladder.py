"""The rows of the throughput table: the peers first, then this engine, one change a row."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import Job, Native, Packed
from engine.config import SCHEMA
from engine.config_sources import Reading
from engine.errors import ConfigError
from engine.model import attention


@dataclass(frozen=True)
class Row:
    """One contender: this engine with the flags `engine` beside those of the command line, or else a peer.

    Attributes:
        native: arguments of the peer.
        trainer: the peer in the HF Trainer.
        tolerance: of its loss and gradients in the comparison before; None: that of the dtype.
    """

    name: str
    title: str
    engine: str | None = None
    native: dict[str, Any] | None = None
    trainer: bool = False
    tolerance: tuple[float, float] | None = None

    @property
    def settings(self) -> dict[str, Any] | None:
        """What the flags say; None for a peer."""
        if self.engine is None:
            return None
        reading = Reading(SCHEMA)
        reading.read_arguments(self.engine.split())
        return reading.values

    def build(self, job: Job) -> Packed | Native:
        if self.trainer:
            from benchmarks.hf_trainer import NativeTrainer  # imports torchaudio, which `engine` must prepare first

            return NativeTrainer(job, **self.native)
        if self.native is not None:
            return Native(job, **self.native)
        return Packed(dataclasses.replace(job, settings=dataclasses.replace(job.settings, **self.settings)))


def ladder(job: Job, names: Sequence[str] | None) -> list[Row]:
    """All rows that run here, or those named, in the order of the ladder.

    Raises:
        SystemExit: a name is none of them.
    """
    usual, kept = f"--backend {job.settings.backend}", "--gradient_checkpointing none"
    rows = [
        Row("native_checkpointing", "transformers, padded, HF gradient checkpointing", native={"checkpointing": True}),
        Row("trainer", "the same in the HF Trainer", native={"checkpointing": True}, trainer=True),
        Row("native", "transformers, padded, activations kept", native={}),
        Row("native_packed", "transformers, packed by position_ids", native={"packed": True}),
        Row("packed_checkpointing", "this engine, gradient checkpointing", f"{usual} --gradient_checkpointing full"),
        Row("packed_selective", "… what is dear to recompute is kept", f"{usual} --gradient_checkpointing selective"),
        Row("packed", "this engine, activations kept", f"{usual} {kept}"),
    ]
    for name in _other_kernels(job):
        rows.append(Row(f"packed_{name}", f"… attention: {name}", f"{usual} {kept} --attention {name}"))
    rows += [
        Row(f"packed_{name}", f"… {flags.replace('--', '')}", f"{usual} {kept} {flags}", tolerance=tolerance)
        for name, flags, tolerance in _switches(job)
    ]
    for name in ("fsdp", "deepspeed") if job.settings.bf16 else ("none", "fsdp", "deepspeed"):
        if name != job.settings.backend:
            rows.append(Row(f"packed_{name}", f"… backend: {name}", f"{kept} --backend {name}"))
    if unknown := set(names or ()) - {row.name for row in rows}:
        raise SystemExit(f"--rows: {', '.join(sorted(unknown))} → some of {', '.join(row.name for row in rows)}")
    return [row for row in rows if not names or row.name in names]


def _switches(job: Job) -> Iterator[tuple[str, str, tuple[float, float] | None]]:
    """Name, flags and tolerance of what is off by default and works here."""
    yield "compiled", "--torch_compile", None
    if job.world.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        yield "liger", "--use_liger_kernel", None
    for dtype in ("bf16", "int8"):
        backend = "--backend fsdp " if job.settings.backend == "deepspeed" else ""
        yield f"{dtype}_states", f"{backend}--optimizer_state_dtype {dtype}", None
    if job.world.device.type == "cuda" and importlib.util.find_spec("torchao"):
        yield "float8", "--backend fsdp --float8 --torch_compile", (5e-2, 0.3)  # three bits of mantissa


def _other_kernels(job: Job) -> list[str]:
    """Attention kernels that work here, beside the one that the settings mean."""
    dtype = torch.bfloat16 if job.settings.bf16 else torch.float32
    usual, found = attention.choose(job.settings.attention, job.world.device, dtype), []
    for name in attention.IMPLEMENTATIONS:
        try:
            found += [name] if attention.choose(name, job.world.device, dtype) != usual else []
        except ConfigError:
            continue
    return found
