"""What is measured while training, and `metrics.jsonl`: one line a logged step, always.

Tallies stay on the device; numbers are read (which waits for the GPU) only at a logged step. Losses and accuracies
are means over all targets since the last logged step, over all processes, but for those of skipped steps. What the
names mean: engine/observe/schema.py.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from transformers import HiggsAudioV2Config

from engine.callbacks import Callback
from engine.config import Settings
from engine.data.encoder import FRAMES_PER_SECOND
from engine.higgs_engine import StepResult, Targets
from engine.model.flops import active_adapters, flops_of_sums, peak_flops
from engine.observe.journal import Journal, forget_after
from engine.runtime.distributed import World
from engine.step_size import StepSize, total

LOSS, RIGHT, COUNT = range(3)
"""Columns of the tallies."""


def head_metrics(tallies: list[list[float]], targets: Targets, settings: Settings) -> dict:
    """Losses and accuracies from tallies over all processes.

    Args:
        tallies: [1 + C + 1, 3]: text, each codebook, ends of clips (StepResult).
        targets: behind them; exact where counts in floating point might not be.

    Returns:
        loss (as it is minimised); text_loss, audio_loss (weighted mean of codebooks), codebook_losses, eos_loss; the
        same of accuracies; eos_targets. What has no target is None, and counts nothing in `loss`.
    """
    text, *books, eos = tallies
    values = {"loss": None}
    for kind, column in (("loss", LOSS), ("accuracy", RIGHT)):
        each = [_ratio(book[column], n) for book, n in zip(books, targets.codebooks, strict=True)]
        values |= {
            f"text_{kind}": _ratio(text[column], targets.text),
            f"audio_{kind}": _weighted_mean(each, settings.codebook_weights),
            {"loss": "codebook_losses", "accuracy": "codebook_accuracies"}[kind]: each,
            f"eos_{kind}": _ratio(eos[column], eos[COUNT]),
        }
    text_loss, audio_loss = values["text_loss"] or 0.0, values["audio_loss"] or 0.0
    values["loss"] = settings.text_loss_weight * text_loss + settings.audio_loss_weight * audio_loss
    return values | {"eos_targets": round(eos[COUNT])}


def _ratio(amount: float, count: float) -> float | None:
    return amount / count if count else None


def _weighted_mean(values: list[float | None], weights: list[float] | None) -> float | None:
    """Of those that are known; the weights of the others count nothing, as in the loss that is minimised."""
    weights = weights or [1.0] * len(values)
    if all(value is None for value in values):
        return None
    return sum(w * v for w, v in zip(weights, values, strict=True) if v is not None) / sum(weights)


class Meter:
    """Adds up steps until the next logged one.

    Args:
        config: of the model, for its FLOPs.
        recomputed: whether the backward runs each layer's forward again.
        seen: of the run so far, when resumed.
        total_steps: of the whole run.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        config: HiggsAudioV2Config,
        recomputed: bool,
        seen: StepSize,
        total_steps: int,
    ):
        self.settings, self.world, self.config, self.recomputed = settings, world, config, recomputed
        self.seen, self._total_steps = seen, total_steps
        on_gpu = world.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(world.device)) if on_gpu else None
        self._reset()

    def _reset(self) -> None:
        self._tallies = torch.zeros(self.config.num_codebooks + 2, 3, dtype=torch.float64, device=self.world.device)
        self._sizes: list[StepSize] = []
        self._verdicts: list[torch.Tensor] = []
        self._positions = 0
        self._started, self._paused = time.perf_counter(), 0.0

    @property
    def steps(self) -> int:
        """Since the last reading."""
        return len(self._sizes)

    @property
    def tokens_seen(self) -> int:
        """Of the run so far, up to the step added last."""
        return self.seen.tokens + sum(size.tokens for size in self._sizes)

    def add(self, result: StepResult, size: StepSize) -> None:
        # what is skipped is left out without a look at it: its sums may be no numbers
        self._tallies += torch.where(result.skipped > 0, 0.0, result.tallies)
        self._verdicts.append(torch.stack([result.skipped, result.grad_norm]))
        self._sizes.append(size)
        self._positions += result.positions

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile (an evaluation, a save, ...) takes no time of the steps. Waits for the device."""
        began, before = self._now(), self._paused
        try:
            yield
        finally:
            self._paused = before + time.perf_counter() - began  # with all pauses within this one, of hooks

    def _now(self) -> float:
        """When the device has done all that it was given."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(self, step: int) -> dict:
        """Metrics since the last reading, `grad_norm` of the last step that counted; every process must ask.

        Args:
            step: the last one added, counted from 1.
        """
        elapsed = self._now() - self._started
        mine = self._tallies.new_tensor([self._positions, elapsed, elapsed - self._paused])
        sums = torch.cat([self._tallies.flatten(), mine])
        if self.world.size > 1:
            dist.all_reduce(sums)
        *sums, positions, elapsed, seconds = sums.tolist()
        elapsed, seconds = elapsed / self.world.size, seconds / self.world.size  # one clock for all: hooks act on it
        tallies = [sums[at : at + 3] for at in range(0, len(sums), 3)]
        verdicts = torch.stack(self._verdicts).tolist()
        sizes = self._sizes
        counted = [size for size, (skipped, _) in zip(sizes, verdicts, strict=True) if not skipped]
        norms = [norm for skipped, norm in verdicts if not skipped]
        values = self._heads(tallies, total(counted, self.config.num_codebooks), bool(counted))
        values |= {"grad_norm": norms[-1] if norms else None, "skipped_since": len(sizes) - len(counted)}
        done = total(sizes, self.config.num_codebooks)
        self.seen = total([self.seen, done], self.config.num_codebooks)
        values |= self._rates(done, seconds)
        values |= {
            "padding_share": 1 - done.tokens * self.settings.tensor_parallel_size / positions,
            "seconds_per_step": seconds / len(sizes),
            "tokens_seen": self.seen.tokens,
            "audio_hours_seen": self.seen.audio_frames / FRAMES_PER_SECOND / 3600,
            "eta_seconds": (self._total_steps - step) * elapsed / len(sizes),
        }
        self._reset()
        return values

    def _heads(self, tallies: list[list[float]], size: StepSize, any_counted: bool) -> dict:
        """Of the steps that counted; None if none did. And how many targets are behind them."""
        values = head_metrics(tallies, size.targets, self.settings)
        if not any_counted:
            values["loss"] = None
        return values | {"text_targets": size.targets.text, "audio_targets": max(size.targets.codebooks)}

    def _rates(self, done: StepSize, seconds: float) -> dict:
        """By the second. FLOPs are not known where parts of the model are frozen without LoRA (see flops.py)."""
        processes, settings = self.world.size, self.settings
        tokens, audio = done.tokens / seconds, done.audio_frames / FRAMES_PER_SECOND / seconds
        values = {
            "tokens_per_second": tokens,
            "tokens_per_second_per_gpu": tokens / processes,
            "audio_seconds_per_second": audio,
            "audio_seconds_per_second_per_gpu": audio / processes,
        }
        of_model = of_hardware = None
        if settings.use_lora or not (settings.train_modules or settings.freeze_llm):
            adapters = active_adapters(self.config, settings.lora_rank, settings.lora_target_modules)
            work = (done.tokens, done.squares, done.targets.text, done.audio_rows)
            adapters = adapters if settings.use_lora else None
            of_model = flops_of_sums(self.config, *work, adapters=adapters) / seconds / processes
            of_hardware = flops_of_sums(self.config, *work, adapters=adapters, recomputed=self.recomputed)
            of_hardware /= seconds * processes
        return values | {
            "tflops_per_gpu": of_model and of_model / 1e12,
            "mfu": of_model and self._peak and of_model / self._peak,
            "hfu": of_hardware and self._peak and of_hardware / self._peak,
        }


FILE = "metrics.jsonl"


class MetricsFile(Callback):
    """One JSON object a line, of a logged step or of an evaluation, written by the main process.

    Resuming drops the lines after the step resumed from.
    """

    def on_start(self, run, step):
        self.journal = Journal(run.output_dir / FILE, run.say) if run.world.is_main else None
        if self.journal:
            forget_after(self.journal.file, step)

    def on_log(self, run, step, values):
        self._write(values)

    def on_evaluate(self, run, step, values):
        plain = ("step", "alarm")
        self._write({name if name in plain else f"eval_{name}": value for name, value in values.items()})

    def _write(self, values: dict) -> None:
        if self.journal:
            self.journal.add([values])
