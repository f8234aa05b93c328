"""What a run trains and evaluates on: its samples, the plan of its steps, and this process's packed rows of each."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from engine.config import Settings
from engine.data.batches import BatchPlan, MicroBatch, Step
from engine.data.dataset import Dataset, open_data, write_dropped
from engine.data.loader import packed_batches
from engine.data.mels import MelExtractor
from engine.data.packing import PackedBatch
from engine.data.split import split
from engine.errors import ConfigError, EngineError, Interrupted, ModelError
from engine.higgs_engine import Targets
from engine.model import whisper_source
from engine.model.weights import WeightFiles, load_tokenizer
from engine.runtime import activity
from engine.runtime.distributed import World
from engine.runtime.faults import LOADER_WORKER


class RunData:
    """
    Args:
        settings: resolved.
        reuse: take what an earlier start of this run prepared.
        say: prints a line, on the main process.

    Attributes:
        train, held_out: samples; the latter None where nothing is evaluated.
        plan: the steps of the run.
        rounds: micro-batches of each process in a step.
        readers: processes, or groups of those that share a row.

    Raises:
        DataError, ConfigError, ModelError: data or tokenizer do not fit the run.
    """

    def __init__(self, settings: Settings, world: World, files: WeightFiles, reuse: bool, say: Callable[[str], None]):
        self.settings, self.world, self.files, self._say = settings, world, files, say
        self._open(reuse)
        self.plan = _plan(self.train, settings)
        self.reader, self.readers = world.in_groups(of=settings.processes_per_row)
        self.rounds = self.plan.rounds(self.readers)

    def _open(self, reuse: bool) -> None:
        """The data to train on and, unless there is none, to evaluate on."""
        settings = self.settings
        tokenizer = load_tokenizer(settings.model_path)
        _check_tokenizer(self.files, tokenizer)
        whisper, _ = whisper_source.resolve(settings.whisper_conditioning, self.files)
        mels = MelExtractor(whisper.preprocessor) if whisper else None

        def opened(name: str, sources: list[str]) -> Dataset:
            return open_data(name, sources, settings, tokenizer, self.files.config, self.world, mels, reuse, self._say)

        data, evaluation = opened("train", settings.train_data_file), None
        if whisper and not any(store.is_heard for store in data.stores):
            self._nothing_to_hear()
        if settings.eval_data_file:
            evaluation = opened("eval", settings.eval_data_file) if not settings.disable_evaluation else None
        elif settings.validation_split:
            parts = split(data, settings.validation_split, settings.seed)
            if self.world.is_main:
                parts.write(Path(settings.output_dir) / "validation_split.json", data)
            self._say(f"validation_split: by {parts.by}, {len(parts.evaluation)} of {len(data)} samples aside")
            data, evaluation = data.subset(parts.train), data.subset(parts.evaluation, weighted=False)
            evaluation = None if settings.disable_evaluation else evaluation
        self.train = self._within_budget("train", data)
        self.held_out = evaluation and self._within_budget("eval", evaluation)
        if self.held_out is not None:
            steps = _plan(self.held_out, settings, epochs=1).epoch(0)
            self._held_out_rows = tuple(batch for step in steps for batch in step)

    def _nothing_to_hear(self) -> None:
        """Whisper was asked for, or is part of the model, and no sample has a clip that it may hear."""
        line = (
            "whisper_conditioning: no sample has audio in a user or system message, so Whisper hears nothing → set "
            "prompt_layout: reference_in_system, or whisper_conditioning: off"
        )
        if self.settings.whisper_conditioning != "auto":
            raise ConfigError("the settings cannot be used with these data", [line])
        self._say(f"note: {line}")

    def _within_budget(self, name: str, data: Dataset) -> Dataset:
        data = data.within(self.settings.max_tokens_per_micro_batch, self.settings.drop_long_samples)
        self._say(f"{name}: {data.describe()}")
        if self.world.is_main:
            write_dropped(data, Path(self.settings.output_dir) / f"dropped_{name}_samples.json", self._say)
        return data

    # ---------------------------------------------------------------- this process's rows

    def batches(self, start: int) -> Iterator[PackedBatch]:
        """Of all steps from number `start` on, made ahead by the loader's workers."""
        steps = self.plan.steps(start)
        mine = (micro_batch for step in steps for micro_batch in self._mine(step))
        return self._packed(self.train, mine, self.settings.dataloader_num_workers)

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
        return self._packed(self.train, self._mine(step), workers=0), self.targets(step)

    def held_out_batches(self) -> Iterator[PackedBatch]:
        """As many on every process; an empty row stands where there is none left."""
        rounds = -(-len(self._held_out_rows) // self.readers)
        mine = Step(0, 0, self._held_out_rows).share(self.reader, self.readers, rounds)
        return self._packed(self.held_out, mine, workers=0)

    def _mine(self, step: Step) -> list[MicroBatch]:
        return step.share(self.reader, self.readers, self.rounds)

    def _packed(self, data: Dataset, micro_batches: Iterable[MicroBatch], workers: int) -> Iterator[PackedBatch]:
        pieces = self.settings.sequence_parallel_size
        return packed_batches(
            data, micro_batches, audio_token_id=self.files.config.audio_token_id, workers=workers,
            device=self.world.device, piece=(self.world.rank % pieces, pieces),
        )  # fmt: skip

    # ---------------------------------------------------------------- a whole step, over all processes

    def targets(self, step: Step) -> Targets:
        text, audio = self._sum(self.train.text_targets, step), self._sum(self.train.audio_targets, step)
        return Targets(text, (audio,) * self.train.codebooks)

    def tokens(self, step: Step) -> int:
        return self._sum(self.train.lengths, step)

    def audio_frames(self, step: Step) -> int:
        return self._sum(self.train.audio_frames, step)

    @staticmethod
    def _sum(of_samples: np.ndarray, step: Step) -> int:
        return int(of_samples[[i for batch in step.micro_batches for i in batch]].sum())

    def held_out_targets(self) -> Targets:
        data = self.held_out
        return Targets(int(data.text_targets.sum()), (int(data.audio_targets.sum()),) * data.codebooks)

    def describe(self) -> Iterator[str]:
        """Lines for the start-up print."""
        settings, total = self.settings, self.plan.total_steps
        steps = len(self.plan.epoch(0))
        yield (
            f"plan: {total} steps ({steps} an epoch) of {settings.micro_batches_per_step} micro-batch(es), "
            f"{self.rounds} on each of {self.world.size} process(es); "
            f"about {int(self.train.lengths.sum()) / steps:,.0f} tokens a step"
        )
        if settings.sequence_parallel_size > 1:
            yield f"sequence_parallel_size: {settings.sequence_parallel_size} processes share each row"
        at_once, idle = self.readers, self.rounds * self.readers - settings.micro_batches_per_step
        if idle:
            yield f"note: {at_once} rows at a time do not divide micro_batches_per_step: {idle} idle slot(s) a step"
        if settings.warmup_steps >= total:
            yield f"note: warmup_steps {settings.warmup_steps} is not reached within {total} steps"


def _plan(data: Dataset, settings: Settings, epochs: int | None = None) -> BatchPlan:
    return BatchPlan(
        data.lengths,
        max_tokens=settings.max_tokens_per_micro_batch,
        max_samples=settings.per_device_train_batch_size,
        micro_batches_per_step=settings.micro_batches_per_step,
        epochs=epochs or settings.num_train_epochs,
        max_steps=None if epochs else settings.max_steps,
        seed=settings.seed,
        mixture=data.mixture(settings.seed),
    )


def _check_tokenizer(files: WeightFiles, tokenizer) -> None:
    token = tokenizer.convert_tokens_to_ids("<|AUDIO_OUT|>")
    if token != files.config.audio_token_id or len(tokenizer) > files.config.vocab_size:
        raise ModelError(
            f"{files.folder}: tokenizer and config.json do not belong together: <|AUDIO_OUT|> is {token}, "
            f"audio_token_id {files.config.audio_token_id}; {len(tokenizer)} tokens, vocab_size "
            f"{files.config.vocab_size} → take both from the same release."
        )
