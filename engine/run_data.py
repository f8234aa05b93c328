"""What a run trains and evaluates on: its samples, the plan of its steps, and this process's packed rows of each."""

from collections.abc import Callable, Iterator

from engine.config import Settings
from engine.data.batches import BatchPlan, MicroBatch, Step
from engine.data.packing import PackedBatch
from engine.errors import EngineError, Interrupted
from engine.held_out import HeldOut
from engine.higgs_engine import Targets
from engine.model.weights import WeightFiles
from engine.rows import Rows
from engine.run_sets import Sets
from engine.runtime import activity
from engine.runtime.distributed import World
from engine.runtime.faults import LOADER_WORKER
from engine.step_size import StepSize, total


class RunData:
    """
    Args:
        settings: resolved.
        reuse: take what an earlier start of this run prepared.
        say: prints a line, on the main process.

    Attributes:
        train: samples.
        held_out: what is evaluated; None where nothing is.
        plan: the steps of the run.
        rounds: micro-batches of each process in a step.

    Raises:
        DataError, ConfigError, ModelError: data or tokenizer do not fit the run.
    """

    def __init__(self, settings: Settings, world: World, files: WeightFiles, reuse: bool, say: Callable[[str], None]):
        self.settings, self.world, self.files = settings, world, files
        self.sets = Sets(settings, world, files, reuse, say)
        self.train, held_out = self.sets.both()
        self.rows = Rows(settings, world, files.config.audio_token_id)
        self.held_out = held_out and HeldOut(held_out, settings, world, self.rows)
        self.plan = BatchPlan(
            self.train.lengths,
            max_tokens=settings.max_tokens_per_micro_batch,
            max_samples=settings.per_device_train_batch_size,
            micro_batches_per_step=settings.micro_batches_per_step,
            epochs=settings.num_train_epochs,
            max_steps=settings.max_steps,
            seed=settings.seed,
            mixture=self.train.mixture(settings.seed),
        )
        self.rounds = self.plan.rounds(self.rows.readers)

    # ---------------------------------------------------------------- this process's rows

    def batches(self, start: int) -> Iterator[PackedBatch]:
        """Of all steps from number `start` on, made ahead by the loader's workers."""
        steps = self.plan.steps(start)
        mine = (micro_batch for step in steps for micro_batch in self._mine(step))
        return self.rows.packed(self.train, mine, self.settings.dataloader_num_workers)

    def share(self, step: Step, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """The next step's of `batches`; one that cannot be made is an error that names its samples."""
        for number, samples in enumerate(self._mine(step), start=1):
            activity.current.enter("data")
            try:
                batch = next(batches)
            except Exception as error:
                if isinstance(error, (OSError, EngineError)) or LOADER_WORKER in str(error):
                    raise
                raise Interrupted(
                    f"step {step.number + 1}, micro-batch {number} of rank {self.world.rank} cannot be made of "
                    f"{', '.join(self.train.names(samples))}; `higgs-engine validate` looks at every sample:",
                    str(error).strip().splitlines()[-1:],
                ) from error
            yield batch

    def again(self, step: Step) -> tuple[Iterator[PackedBatch], Targets]:
        """A step that has been: its rows, and the targets of all of it."""
        return self.rows.packed(self.train, self._mine(step)), self.size(step).targets

    def _mine(self, step: Step) -> list[MicroBatch]:
        return step.share(self.rows.reader, self.rows.readers, self.rounds)

    def size(self, step: Step) -> StepSize:
        """What is in a step, over all processes."""
        return StepSize.of(self.train, step)

    def size_before(self, start: int) -> StepSize:
        """What is in all steps before number `start`."""
        parts = (StepSize.of_samples(self.train, samples) for samples in self.plan.samples_before(start))
        return total(parts, self.train.codebooks)

    def describe(self) -> Iterator[str]:
        """Lines for the start-up print."""
        settings, planned = self.settings, self.plan.total_steps
        steps = len(self.plan.epoch(0))
        yield (
            f"plan: {planned} steps ({steps} an epoch) of {settings.micro_batches_per_step} micro-batch(es), "
            f"{self.rounds} on each of {self.world.size} process(es); "
            f"about {int(self.train.lengths.sum()) / steps:,.0f} tokens a step"
        )
        if settings.sequence_parallel_size > 1:
            yield f"sequence_parallel_size: {settings.sequence_parallel_size} processes share each row"
        at_once = self.rows.readers
        idle = self.rounds * at_once - settings.micro_batches_per_step
        if idle:
            yield f"note: {at_once} rows at a time do not divide micro_batches_per_step: {idle} idle slot(s) a step"
        if settings.warmup_steps >= planned:
            yield f"note: warmup_steps {settings.warmup_steps} is not reached within {planned} steps"
        if settings.early_stopping_patience is not None and self.held_out is None:
            yield "note: early_stopping_patience stops nothing, for nothing is evaluated → give validation_split"
