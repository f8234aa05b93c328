"""The HF Trainer around transformers' own model, as a contender: the Trainer as it comes, timed from outside."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.contenders import Gradients, Job, Native
from benchmarks.length_mix import padded_inputs
from benchmarks.stopwatch import Stopwatch
from engine.data.batches import Step
from engine.runtime.distributed import launcher_variables


class NativeTrainer(Native):
    """Native in a Trainer whose loader runs in this process.

    The Trainer would divide the audio losses, too, by the number of text labels; here each loss is the mean over its
    own labels, which is the same work and makes it the function of the others.
    """

    def __init__(self, job: Job, checkpointing: bool = False):
        super().__init__(job, checkpointing=checkpointing)

    def train(self, steps: Sequence[Step]) -> None:
        with tempfile.TemporaryDirectory() as folder, _without_launcher():
            self._trainer(folder, steps).train()

    def loss_and_gradients(self, step: Step) -> tuple[float, Gradients]:
        inputs = self._on_device([i for micro_batch in step.micro_batches for i in micro_batch])
        with tempfile.TemporaryDirectory() as folder, _without_launcher():
            trainer = self._trainer(folder, [step])
            trainer.current_gradient_accumulation_steps = 1
            loss = trainer.training_step(self.model, inputs).item()
        return loss, ((name, p.grad) for name, p in self.model.named_parameters() if p.requires_grad)

    def _trainer(self, folder: str, steps: Sequence[Step]) -> Trainer:
        job, stopwatch = self.job, self.job.stopwatch
        micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
        arguments = TrainingArguments(
            output_dir=folder, max_steps=len(steps), gradient_accumulation_steps=len(steps[0].micro_batches),
            bf16=bool(job.settings.bf16), use_cpu=job.world.device.type == "cpu", report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, log_level="error",
            max_grad_norm=job.settings.max_grad_norm, activation_checkpointing=self.recomputes,
            activation_checkpointing_kwargs={"use_reentrant": False} if self.recomputes else None,
        )  # fmt: skip
        rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        trainer = Trainer(self.model, arguments, optimizers=(self.optimizer, rate), callbacks=[_Laps(stopwatch)])
        trainer.remove_callback(PrinterCallback)
        collate = stopwatch.timed("data", lambda items: padded_inputs(job.chosen(items[0]), job.files.config))
        loader = trainer.accelerator.prepare(DataLoader(micro_batches, batch_size=1, collate_fn=collate))
        trainer.get_train_dataloader = lambda: loader
        trainer.model_accepts_loss_kwargs = False
        trainer.compute_loss = stopwatch.timed("forward", trainer.compute_loss)
        trainer.accelerator.backward = stopwatch.timed("backward", trainer.accelerator.backward)
        return trainer


class _Laps(TrainerCallback):
    def __init__(self, stopwatch: Stopwatch):
        self.stopwatch = stopwatch

    def on_train_begin(self, *args, **kwargs) -> None:
        self.stopwatch.start()

    def on_pre_optimizer_step(self, *args, **kwargs) -> None:
        self.optimizer = self.stopwatch.part("optimizer")
        self.optimizer.__enter__()

    def on_optimizer_step(self, *args, **kwargs) -> None:
        self.optimizer.__exit__(None, None, None)

    def on_step_end(self, *args, **kwargs) -> None:
        self.stopwatch.lap()


@contextlib.contextmanager
def _without_launcher() -> Iterator[None]:
    """Without the variables of a run of one process, which would make the Trainer a distributed one."""
    hidden = {name: os.environ.pop(name) for name in launcher_variables(os.environ) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
