"""HiggsEngine: the Higgs model wrapped in a backend. One optimizer step, evaluation, its state.

    engine = HiggsEngine(settings, world, WeightFiles(settings.model_path), rounds=2)
    result = engine.train_step(batches, targets, learning_rate=1e-5)

Order of construction: meta model -> adapters or freezing -> packed forward -> sharding -> weights -> optimizer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HiggsAudioV2Config

from engine.backends import Blueprint, backend_class
from engine.backends.tensors import State, read_tensors
from engine.config import Settings
from engine.data.packing import PackedBatch
from engine.errors import CheckpointError, ConfigError, EngineError, ModelError
from engine.model import attention, compiled, float8, fused, ulysses, whisper_source
from engine.model.adapter_files import open_adapter
from engine.model.initial import InitialWeights, build_on_meta
from engine.model.loss import LossHead
from engine.model.packed import PackedHiggsAudio, install
from engine.model.trainable import choose_trainable, decayed, describe
from engine.model.weights import WeightFiles
from engine.plan.activations import Row
from engine.plan.memory import GIB, for_training
from engine.runtime import activity
from engine.runtime.distributed import World, raise_together


@dataclass(frozen=True)
class Targets:
    """Labelled targets of a whole step, over all processes and micro-batches (known from the plan, no reduction)."""

    text: int
    codebooks: tuple[int, ...]


@dataclass(frozen=True)
class StepResult:
    """Left on the device; reading a number from it waits for the step.

    Attributes:
        tallies: fp32 [1 + C + 1, 3]; of this process, for text, each codebook, and the audio targets that end a clip
            (EOS): the sum of cross-entropies, how many targets were the most likely ones, and how many there are.
        positions: that this process computed, padding included; known to the host.
        grad_norm: fp32 scalar, before clipping, of the whole model.
        skipped: fp32 scalar, 1 if the step was left out (engine/backends/guard.py), else 0.
        limit: fp32 scalar, above what the norm would have been a spike.
    """

    tallies: torch.Tensor
    positions: int
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    limit: torch.Tensor

    @property
    def sums(self) -> torch.Tensor:
        """fp32 [1 + C]; sums of cross-entropies: text, then each codebook."""
        return self.tallies[:-1, 0].contiguous()


def require_possible(settings: Settings, config: HiggsAudioV2Config, device: torch.device) -> str:
    """Asked before data are prepared, which may take hours.

    Returns:
        The attention kernel that will run.

    Raises:
        ConfigError: the machine, or the model, cannot do what the settings ask for.
    """
    chosen = attention.choose(settings.attention, device, torch.bfloat16 if settings.bf16 else torch.float32)
    problems = [
        *compiled.problems(settings, chosen, device),
        *fused.problems(settings, device),
        *float8.problems(settings, device),
        *ulysses.problems(config, settings),
    ]
    if problems:
        raise ConfigError("the settings cannot be used with this model on this machine", problems)
    return chosen


class HiggsEngine:
    """A Higgs model in training.

    Args:
        settings: resolved settings (Settings.with_resolved).
        world: this process's place among the processes.
        files: the base model.
        rounds: micro-batches of one process in each optimizer step.
        row: the longest row to come, for the memory plan; None: one of speech, as long as the settings allow.

    Attributes:
        checkpointing: the mode of activation checkpointing (engine/model/recompute.py).
        whisper: where the Whisper conditioning comes from; None without.
        summary: lines for the start-up print.

    Raises:
        ConfigError, ModelError: the settings cannot be used with this model; the weights do not fit it, or are not
            finite, or the run does not fit into the GPU.
    """

    def __init__(self, settings: Settings, world: World, files: WeightFiles, rounds: int, row: Row | None = None):
        self.settings, self.world, self.config, self.rounds = settings, world, files.config, rounds
        self.attention = require_possible(settings, files.config, world.device)
        core = build_on_meta(files.config)
        self.whisper, whisper_line = whisper_source.resolve(settings.whisper_conditioning, files)
        if self.whisper and settings.freeze_audio_encoder_proj and not self.whisper.has_projection:
            raise ConfigError("Whisper:", ["freeze_audio_encoder_proj: the projection is new → it has to be trained"])
        weights = InitialWeights(files, settings.seed, self.whisper, open_adapter(settings.lora_adapter_path))
        model = choose_trainable(core, settings, self.whisper and self.whisper.build_on_meta())
        weights.check(model)
        row = row or Row.typical(settings.max_tokens_per_micro_batch or 8192)
        self.checkpointing, plan = for_training(files.config, settings, world, row, self.whisper)
        self._install_forward(core)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.summary = describe(model, settings) + ([whisper_line] if whisper_line else [])
        expected = f"; expected at the peak: {plan.peak / GIB:,.1f} GiB a process" if plan else ""
        if settings.torch_compile:
            self.summary.append("torch_compile: the first row of each kind waits for the compiler, up to minutes")
        if settings.float8:
            self.summary.append("float8: products of attention and FFNs, scaled a tensor at a time")
        self.summary.append(f"gradient_checkpointing: {self.checkpointing}{expected}")
        self._shapes = shapes
        blueprint = Blueprint(model, core, weights, decayed(model), shapes)
        self.backend = backend_class(settings.backend)(blueprint, settings, world, rounds)
        self._require_finite_weights(ModelError, f"{files.folder}: the model has weights", "take another copy of it")

    def _install_forward(self, core: PackedHiggsAudio) -> None:
        """The packed forward, and what the settings put in its place."""
        settings, pieces = self.settings, self.settings.sequence_parallel_size
        install(core, self.attention, self.checkpointing, settings.torch_compile)
        for head in core.audio_lm_head.modules():
            if isinstance(head, LossHead):
                head.marked = core.config.audio_stream_eos_id
        if settings.use_liger_kernel:
            fused.install(core)
        if settings.float8:
            float8.install(core)
        if pieces > 1:
            core.attend = ulysses.over_pieces(core.attend, pieces, ulysses.neighbours(pieces))

    def train_step(self, batches: Iterable[PackedBatch], targets: Targets, learning_rate: float) -> StepResult:
        """One optimizer step over this process's micro-batches."""
        tallies, positions = self._accumulate(batches, targets)
        activity.current.enter("optimizer")
        norm, guard = self.backend.step(learning_rate), self.backend.guard
        return StepResult(tallies, positions, norm, guard.skipped, guard.limit)

    def accumulate(self, batches: Iterable[PackedBatch], targets: Targets) -> torch.Tensor:
        """Forward and backward of all micro-batches of a step; returns this process's sums (fp32 [1 + C]).

        Those of all processes add up to the step's: where several have the same row, each counts its share.

        Raises:
            ValueError: there are fewer or more batches than `rounds`.
        """
        return self._accumulate(batches, targets)[0][:-1, 0].contiguous()

    def _no_tallies(self) -> torch.Tensor:
        return torch.zeros(self.config.num_codebooks + 2, 3, device=self.world.device)

    def _accumulate(self, batches: Iterable[PackedBatch], targets: Targets) -> tuple[torch.Tensor, int]:
        """Returns `tallies` and `positions` of a StepResult."""
        weights, total, number, positions = self._weights(targets), self._no_tallies(), 0, 0
        for number, batch in enumerate(batches, start=1):
            if number > self.rounds:
                raise ValueError(f"more than {self.rounds} micro-batches for a step → make the engine with more rounds")
            activity.current.enter("forward")
            positions += batch.tokens
            loss, tallies = self.backend.forward(batch.to(self.world.device), *weights)
            activity.current.enter("backward")
            # the gradient of a loss that is not finite may be finite; the guard, which sees gradients, is to know
            sound = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            self.backend.backward(loss * sound, last=number == self.rounds)
            total += tallies
        if number < self.rounds:  # the gradients of the step would never be put together
            raise ValueError(f"{number} of {self.rounds} micro-batches for a step → fill up with packing.empty_sample")
        return total / self.settings.tensor_parallel_size, positions

    def _weights(self, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """What one text target and one target of each codebook count in the loss of a step."""
        settings, codebooks = self.settings, self.config.num_codebooks
        shares = torch.tensor(settings.codebook_weights or [1.0] * codebooks)
        shares = settings.audio_loss_weight * shares / shares.sum()
        text = torch.tensor([settings.text_loss_weight / max(targets.text, 1)])
        audio = shares / torch.tensor(targets.codebooks).clamp(min=1)
        return text.to(self.world.device, non_blocking=True), audio.to(self.world.device, non_blocking=True)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[PackedBatch]) -> torch.Tensor:
        """`tallies` of a StepResult over this process's batches; every process needs as many batches."""
        weights, total = self._weights(Targets(1, (1,) * self.config.num_codebooks)), self._no_tallies()
        self.backend.model.eval()
        for batch in batches:
            total += self.backend.forward(batch.to(self.world.device), *weights)[1]
            activity.current.tick()
        self.backend.model.train()
        return total / self.settings.tensor_parallel_size

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full fp32 gradients between `accumulate` and the step; every process must ask."""
        return self.backend.gradients()

    def state(self) -> State:
        """This process's fragments of weights and optimizer (Backend.state); every process must ask."""
        return self.backend.state()

    def parameter_shapes(self) -> dict[str, tuple[torch.Size, bool]]:
        """Of every parameter its full shape, and whether it is trained."""
        return {name: (self._shapes[name], p.requires_grad) for name, p in self.backend.model.named_parameters()}

    def stored_shapes(self) -> dict[str, list[int]]:
        """Full shape of every weight in `state`, by parameter name."""
        return {name: list(self._shapes[name]) for name, _ in self.backend.stored()}

    def load(self, folder: Path) -> None:
        """Takes weights and optimizer from a checkpoint, whatever number of processes of which backend wrote it.

        Raises:
            CheckpointError: it is of another model, trained something else, cannot be read, or is not finite.
        """
        state = self.backend.state()
        read_tensors(state, folder)
        self.backend.restored(state)
        self._require_finite_weights(CheckpointError, f"{folder}: it has weights", "resume from an earlier checkpoint")

    def load_weights(self, folder: Path) -> None:
        """Takes the weights alone from a checkpoint, whatever part of them it trained. Raises as `load`."""
        state = self.backend.state()
        read_tensors(state, folder, weights_only=True)
        self.backend.restored(state)
        self._require_finite_weights(CheckpointError, f"{folder}: it has weights", "take an earlier checkpoint")

    def _require_finite_weights(self, kind: type[EngineError], heading: str, remedy: str) -> None:
        """Raises `kind` on all processes if a weight, trained or not, has a value that no step could mend."""
        broken = [name for name, local in self.backend.local_weights() if len(local) and not _is_finite(local)]
        problem = kind(f"{heading} that are not finite, nothing can be trained from them → {remedy}:", broken)
        raise_together(self.world, problem if broken else None)


def _is_finite(values: torch.Tensor) -> bool:
    """Without temporaries as large as the values."""
    return bool(torch.stack(values.aminmax()).isfinite().all())
