"""What is timed against each other: this engine, and the peers themselves on the same weights and samples.

    Packed  HiggsEngine with any settings, fed by its own loader
    Native  transformers' own forward and loss in the shortest of training loops, on padded or packed rows

Each has `train(steps)`, which takes one optimizer step after the other and laps the stopwatch, `loss_and_gradients` for
the comparison before, and `layout`, which says what its hardware really multiplies. benchmarks/hf_trainer.py has the HF
Trainer around the same model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.length_mix import packed_inputs, padded_inputs
from benchmarks.random_weights import RandomWeights
from benchmarks.stopwatch import Stopwatch
from engine.backends.torch_optimizer import make_adamw
from engine.config import Settings
from engine.data.batches import Step
from engine.data.labels import Sample
from engine.data.loader import packed_batches
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.initial import InitialWeights, build_on_meta, fill, rebuild_buffers
from engine.model.trainable import choose_trainable, decayed, optimizer_groups
from engine.observe.metrics import head_metrics
from engine.runtime.distributed import World

LEARNING_RATE = 1e-6
Gradients = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Job:
    """What all contenders share.

    Attributes:
        settings: resolved.
        samples: that the micro-batches of the steps number.
        stopwatch: lapped at the end of every step.
    """

    settings: Settings
    world: World
    files: RandomWeights
    samples: Sequence[Sample] = field(repr=False)
    stopwatch: Stopwatch = field(repr=False)

    def chosen(self, micro_batch: Sequence[int]) -> list[Sample]:
        return [self.samples[i] for i in micro_batch]


class _Dataset(list):
    """Samples as the loader takes them."""

    codebooks = 8


class Packed:
    def __init__(self, job: Job):
        self.reader, self.readers = job.world.in_groups(of=job.settings.processes_per_row)
        self.job, self.rounds = job, -(-job.settings.micro_batches_per_step // self.readers)
        self.engine = HiggsEngine(job.settings, job.world, job.files, self.rounds)
        backend = self.engine.backend
        for method, part in {"forward": "forward", "backward": "backward", "step": "optimizer"}.items():
            setattr(backend, method, job.stopwatch.timed(part, getattr(backend, method)))

    def layout(self, samples: Sequence[Sample]) -> tuple[list[int], int | None]:
        """Lengths that attention sees, and positions at which heads run: None for the labelled ones."""
        return [len(s) for s in samples], None

    @property
    def recomputes(self) -> bool:
        return self.engine.checkpointing == "full"

    def train(self, steps: Sequence[Step]) -> None:
        batches = self.job.stopwatch.timed_items("data", self._batches(steps))
        for step in steps:
            mine = [next(batches) for _ in range(self.rounds)]
            self.engine.train_step(mine, self._targets(step), LEARNING_RATE)
            self.job.stopwatch.lap()

    def _batches(self, steps: Sequence[Step]) -> Iterator:
        job = self.job
        mine = [m for step in steps for m in step.share(self.reader, self.readers, self.rounds)]
        return packed_batches(
            _Dataset(job.samples), mine, audio_token_id=job.files.config.audio_token_id,
            workers=job.settings.dataloader_num_workers, device=job.world.device,
            piece=(job.world.rank % job.settings.sequence_parallel_size, job.settings.sequence_parallel_size),
        )  # fmt: skip

    def _targets(self, step: Step) -> Targets:
        samples = [s for micro_batch in step.micro_batches for s in self.job.chosen(micro_batch)]
        return Targets(sum(s.text_targets for s in samples), tuple(sum(s.audio_targets for s in samples).tolist()))

    def loss_and_gradients(self, step: Step) -> tuple[float, Gradients]:
        targets = self._targets(step)
        sums = self.engine.accumulate(self._batches([step]), targets)
        if self.job.world.size > 1:
            torch.distributed.all_reduce(sums)
        tallies = [[total, 0.0, 0.0] for total in sums.tolist()] + [[0.0] * 3]  # losses alone are compared
        return head_metrics(tallies, targets, self.job.settings)["loss"], self.engine.gradients()

    def close(self) -> None:
        if hasattr(self.engine.backend, "engine"):
            self.engine.backend.engine.destroy()


class Native:
    """fp32 weights, by autocast computed with in bf16 where the engine does; the engine's optimizer and clipping.

    Args:
        packed: one row without padding, whose position_ids restart; otherwise padded to the longest.
        checkpointing: HF gradient checkpointing.
    """

    def __init__(self, job: Job, packed: bool = False, checkpointing: bool = False):
        self.job, self.inputs = job, packed_inputs if packed else padded_inputs
        self.packed, self.recomputes = packed, checkpointing
        core, settings, device = build_on_meta(job.files.config), job.settings, job.world.device
        core.set_attn_implementation("sdpa")
        self.model = choose_trainable(core, settings)
        fill(self.model, InitialWeights(job.files, settings.seed), device, torch.float32)
        rebuild_buffers(core, device)
        if checkpointing:
            core.activation_checkpointing_enable({"use_reentrant": False})
        core.config.use_cache = False
        self.optimizer = make_adamw(optimizer_groups(self.model, decayed(self.model), settings.weight_decay), settings)

    def layout(self, samples: Sequence[Sample]) -> tuple[list[int], int | None]:
        lengths = [len(s) for s in samples]
        seen = [sum(lengths)] if self.packed else [max(lengths)] * len(lengths)
        return seen, sum(seen)

    def train(self, steps: Sequence[Step]) -> None:
        part = self.job.stopwatch.part
        for step in steps:
            for micro_batch in step.micro_batches:
                with part("data"):
                    inputs = self._on_device(micro_batch)
                with part("forward"):
                    loss = self._loss(inputs) / len(step.micro_batches)
                with part("backward"):
                    loss.backward()
            with part("optimizer"):
                nn.utils.clip_grad_norm_(self.model.parameters(), self.job.settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.job.stopwatch.lap()

    def _on_device(self, micro_batch: Sequence[int]) -> dict[str, torch.Tensor]:
        inputs = self.inputs(self.job.chosen(micro_batch), self.job.files.config)
        return {name: tensor.to(self.job.world.device) for name, tensor in inputs.items()}

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.job.world.device.type, torch.bfloat16, enabled=bool(self.job.settings.bf16)):
            return self.model(**inputs).loss

    def loss_and_gradients(self, step: Step) -> tuple[float, Gradients]:
        loss = self._loss(self._on_device([i for micro_batch in step.micro_batches for i in micro_batch]))
        loss.backward()
        return loss.item(), ((name, p.grad) for name, p in self.model.named_parameters() if p.requires_grad)

    def close(self) -> None:
        pass
