"""A training run, top to bottom: settings, data, plan, engine, resume, steps, checkpoints, final weights."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
from peft import PeftModel
from transformers.utils import logging as transformers_log

from engine.checkpoint import lifecycle
from engine.checkpoint.lifecycle import MODEL_FILES
from engine.checkpoint.manifest import Manifest, load_manifest, versions, write_atomically
from engine.checkpoint.saver import Saved, Saver
from engine.checkpoint.stored import StoredWeights
from engine.config import Settings, prepare_output_dir
from engine.data.batches import BatchPlan, Step
from engine.data.dataset import Dataset, open_data, write_dropped
from engine.data.encoder import FRAMES_PER_SECOND
from engine.data.loader import packed_batches
from engine.data.mels import MelExtractor
from engine.data.packing import PackedBatch
from engine.data.split import split
from engine.doctor.preflight import preflight, require
from engine.errors import CheckpointError, ConfigError, EngineError, Interrupted, ModelError
from engine.exit_codes import DONE, STOPPED
from engine.export.adapters import write_adapter
from engine.export.consolidate import consolidate
from engine.export.model_folder import copy_side_files
from engine.higgs_engine import HiggsEngine, Targets
from engine.model import whisper_source
from engine.model.adapter_folder import SUBFOLDER as ADAPTERS
from engine.model.weights import WeightFiles, load_tokenizer
from engine.observe.health import Health
from engine.observe.metrics import Meter, MetricsFile, eos_loss, losses
from engine.observe.progress import Progress, format_step
from engine.observe.stragglers import Stragglers
from engine.plan.activations import Row, longest_row
from engine.runtime import activity, garbage
from engine.runtime.distributed import World, init_process_group, raise_together, shutdown
from engine.runtime.faults import LOADER_WORKER, in_words
from engine.runtime.signals import Response, StopRequests, StopVote
from engine.runtime.watchdog import GOES_FIRST_S, Watchdog
from engine.schedule import learning_rate

RESTART = "HIGGS_ENGINE_RESTART"
"""Environment variable in which a launcher says that the run has failed before: it goes on from its last checkpoint."""


def train(settings: Settings) -> int:
    """One process's part in a run; every process of the launcher calls it with the same settings.

    Returns:
        The exit code: the run is complete, or was asked to stop and can be resumed (engine/exit_codes.py).
    """
    transformers_log.disable_progress_bar()
    world = init_process_group(settings.timeout_s + GOES_FIRST_S)
    stop = StopRequests(settings.max_train_hours)
    watchdog = Watchdog(world, settings.timeout_s, Path(settings.output_dir) / "stacks")
    with stop.listening():
        try:
            with watchdog.watching():
                code = _train(settings, world, stop)
        except Exception as error:
            stop.response = Response.NONE
            raise_together(world, in_words(error, watchdog.beats))
    shutdown(world)
    return code


def _train(settings: Settings, world: World, stop: StopRequests) -> int:
    output_dir, say = Path(settings.output_dir), Progress(world).say
    findings = preflight(settings, world)
    for finding in findings:
        if finding.level == "warning":
            say(f"note: {finding}")
    require(findings)
    if os.environ.get(RESTART) and lifecycle.checkpoints(output_dir):
        settings = replace(settings, resume="auto")
    checkpoint = lifecycle.find(settings.resume, output_dir, world, say)
    return Run(_resolved(settings, world, checkpoint), world, checkpoint).execute(stop)


def _resolved(settings: Settings, world: World, checkpoint: Path | None) -> Settings:
    """The settings for this world; a resumed run keeps the size of its steps unless it is told another."""
    before = load_manifest(checkpoint).plan["micro_batches_per_step"] if checkpoint else None
    return settings.with_resolved(world.size, world.device.type == "cuda", resumed_step=before)


class Run:
    """The parts of a run, made in `__init__` in the order in which they depend on each other.

    Args:
        settings: resolved.
        checkpoint: to resume from.
    """

    def __init__(self, settings: Settings, world: World, checkpoint: Path | None):
        self.settings, self.world, self.checkpoint = settings, world, checkpoint
        self.output_dir = Path(settings.output_dir)
        self.progress = Progress(world)
        self._prepare_output()
        # dropout differs between processes, but not between those that compute the same
        torch.manual_seed(settings.seed + world.rank // settings.tensor_parallel_size)

        self.files = WeightFiles(settings.model_path)
        self.base = self.files.fingerprint()
        tokenizer = load_tokenizer(settings.model_path)
        _check_tokenizer(self.files, tokenizer)
        self._open_data(tokenizer)

        self.plan = _plan(self.data, settings)
        self.total = self.plan.total_steps
        self.reader, self.readers = world.in_groups(of=settings.processes_per_row)
        self.piece = world.rank % settings.sequence_parallel_size, settings.sequence_parallel_size
        self.rounds = self.plan.rounds(self.readers)
        row = Row.of(self.data, longest_row(self.data.lengths, settings))
        self.engine = HiggsEngine(settings, world, self.files, self.rounds, row)
        self.saver = Saver(
            self.output_dir, world, limit=settings.save_total_limit, keep_every=settings.keep_every,
            background=settings.async_save, say=self.progress.say, done=self._saved,
        )  # fmt: skip
        self._describe()

    def _prepare_output(self) -> None:
        error = None
        try:
            if self.world.is_main:
                prepare_output_dir(self.settings)
                if self.settings.resume == "none" and lifecycle.checkpoints(self.output_dir):
                    raise CheckpointError(
                        f"{self.output_dir} holds checkpoints of an earlier run → continue it with --resume auto, "
                        "or give another --output_dir."
                    )
        except Exception as failure:
            error = failure
        raise_together(self.world, error)

    def _open_data(self, tokenizer) -> None:
        """The data to train on and, unless there is none, to evaluate on."""
        settings = self.settings
        whisper, _ = whisper_source.resolve(settings.whisper_conditioning, self.files)
        mels = MelExtractor(whisper.preprocessor) if whisper else None
        reuse = self.checkpoint is not None

        def opened(name: str, sources: list[str]) -> Dataset:
            return open_data(
                name, sources, settings, tokenizer, self.files.config, self.world, mels, reuse, self.progress.say
            )

        data, evaluation = opened("train", settings.train_data_file), None
        if whisper and not any(store.is_heard for store in data.stores):
            self._nothing_to_hear()
        if settings.eval_data_file:
            evaluation = opened("eval", settings.eval_data_file) if not settings.disable_evaluation else None
        elif settings.validation_split:
            parts = split(data, settings.validation_split, settings.seed)
            if self.world.is_main:
                parts.write(self.output_dir / "validation_split.json", data)
            self.progress.say(f"validation_split: by {parts.by}, {len(parts.evaluation)} of {len(data)} samples aside")
            data, evaluation = data.subset(parts.train), data.subset(parts.evaluation, weighted=False)
            evaluation = None if settings.disable_evaluation else evaluation
        self.data = self._within_budget("train", data)
        self.eval_data = evaluation and self._within_budget("eval", evaluation)
        if self.eval_data is not None:
            steps = _plan(self.eval_data, settings, epochs=1).epoch(0)
            self.eval_rows = tuple(batch for step in steps for batch in step)

    def _nothing_to_hear(self) -> None:
        """Whisper was asked for, or is part of the model, and no sample has a clip that it may hear."""
        line = (
            "whisper_conditioning: no sample has audio in a user or system message, so Whisper hears nothing → set "
            "prompt_layout: reference_in_system, or whisper_conditioning: off"
        )
        if self.settings.whisper_conditioning != "auto":
            raise ConfigError("the settings cannot be used with these data", [line])
        self.progress.say(f"note: {line}")

    def _within_budget(self, name: str, data: Dataset) -> Dataset:
        data = data.within(self.settings.max_tokens_per_micro_batch, self.settings.drop_long_samples)
        self.progress.say(f"{name}: {data.describe()}")
        if self.world.is_main:
            write_dropped(data, self.output_dir / f"dropped_{name}_samples.json", self.progress.say)
        return data

    def _describe(self) -> None:
        say, settings, engine = self.progress.say, self.settings, self.engine
        for line in engine.summary:
            say(line)
        say(f"backend: {settings.backend}, {engine.backend.precision}; attention: {engine.attention}")
        steps = len(self.plan.epoch(0))
        say(
            f"plan: {self.total} steps ({steps} an epoch) of {settings.micro_batches_per_step} micro-batch(es), "
            f"{self.rounds} on each of {self.world.size} process(es); "
            f"about {int(self.data.lengths.sum()) / steps:,.0f} tokens a step"
        )
        if settings.sequence_parallel_size > 1:
            say(f"sequence_parallel_size: {settings.sequence_parallel_size} processes share each row")
        idle = self.rounds * self.readers - settings.micro_batches_per_step
        if idle:
            say(f"note: {self.readers} rows at a time do not divide micro_batches_per_step: {idle} idle slot(s) a step")
        if settings.warmup_steps >= self.total:
            say(f"note: warmup_steps {settings.warmup_steps} is not reached within {self.total} steps")

    # ---------------------------------------------------------------- the loop

    def execute(self, stop: StopRequests) -> int:
        """Resumes if there is a checkpoint, trains to the end or until `stop`; returns the exit code."""
        start = self._resume()
        self.health = Health(
            self.settings, self.engine, self.data, self._share_again, self.progress.say, resumed_step=start
        )
        if self.world.is_main:
            self.settings.to_yaml(self.output_dir / "config.yaml")
            self.metrics = MetricsFile(self.output_dir / "metrics.jsonl", start)
        batches = self._batches(start)
        self.stragglers = Stragglers(self.world)
        self.progress.start(start, self.total)
        try:
            code = self._steps(start, batches, stop)
            self.saver.finish()
        except BaseException:
            self.saver.leave()
            raise
        self.progress.stop()
        if code == DONE:
            self._finish()
        return code

    def _steps(self, start: int, batches: Iterator[PackedBatch], stop: StopRequests) -> int:
        self.saved_step = start
        vote = StopVote(stop, self.world, timedelta(seconds=self.settings.timeout_s + GOES_FIRST_S))
        stop.response = Response.SAVE
        code = DONE
        with garbage.at_chosen_steps() as collect:
            for step in self.plan.steps(start):
                activity.current.enter("between steps", step.number + 1)
                self.saver.poll()
                self._step(step, batches)
                collect(step.number)
                if code := vote.after_step():
                    self._stop(step, code)
                    break
        vote.close()
        activity.current.outside("end of the steps")
        stop.response = Response.LEAVE
        return code

    def _stop(self, step: Step, code: int) -> None:
        """Leaves nothing unsaved behind."""
        done = step.number + 1
        why = "a signal asked for it" if code == STOPPED else f"max_train_hours ({self.settings.max_train_hours:g})"
        if self.saved_step != done:
            self._save(done, step.epoch, None)
        self.progress.say(f"stopped after step {done} of {self.total}: {why}; go on with --resume auto")

    def _batches(self, start: int) -> Iterator[PackedBatch]:
        steps = self.plan.steps(start)
        micro_batches = (m for step in steps for m in step.share(self.reader, self.readers, self.rounds))
        return packed_batches(
            self.data, micro_batches, audio_token_id=self.files.config.audio_token_id,
            workers=self.settings.dataloader_num_workers, device=self.world.device, piece=self.piece,
        )  # fmt: skip

    def _share(self, step: Step, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """This process's batches of a step; one that cannot be made is an error that names its samples."""
        for number, samples in enumerate(step.share(self.reader, self.readers, self.rounds), start=1):
            activity.current.enter("data")
            try:
                batch = next(batches)
            except Exception as error:
                if isinstance(error, (OSError, EngineError)) or LOADER_WORKER in str(error):
                    raise
                raise Interrupted(
                    f"step {step.number + 1}, micro-batch {number} of rank {self.world.rank} cannot be made of "
                    f"{', '.join(self.data.names(samples))}; `higgs-engine validate` looks at every sample:",
                    str(error).strip().splitlines()[-1:],
                ) from error
            yield batch

    def _step(self, step: Step, batches: Iterator[PackedBatch]) -> None:
        settings, data, targets = self.settings, self.data, self._targets(step)
        chosen = [i for batch in step.micro_batches for i in batch]
        rate = learning_rate(settings, step.number, self.total)
        result = self.engine.train_step(self._share(step, batches), targets, rate)
        tokens = int(data.lengths[chosen].sum())
        self.meter.add(result, targets, tokens, float(data.audio_frames[chosen].sum()) / FRAMES_PER_SECOND)
        self.health.add(step, rate, result)
        self.progress.step()
        done = step.number + 1
        last = done == self.total
        if done == 1 or done % settings.logging_steps == 0 or last:
            activity.current.enter("log")
            steps, values = self.meter.steps, self.meter.read()
            for line in self.stragglers.report(steps, values["seconds_per_step"]):
                self.progress.say(line)
            self._log({"step": done, "epoch": step.epoch, "learning_rate": rate} | self.health.report() | values)
            self.health.require_progress()
        eval_loss = None
        if self.eval_data is not None and (done % settings.eval_steps == 0 or last):
            eval_loss = self._evaluate(done)
        if last or done % settings.save_steps == 0 and self.health.may_save():
            self._save(done, step.epoch, eval_loss)

    def _targets(self, step: Step) -> Targets:
        chosen = [i for batch in step.micro_batches for i in batch]
        text, audio = self.data.text_targets[chosen].sum(), self.data.audio_targets[chosen].sum()
        return Targets(int(text), (int(audio),) * self.data.codebooks)

    def _share_again(self, step: Step) -> tuple[Iterator[PackedBatch], Targets]:
        """This process's batches of a step that has been, and the targets of all of it."""
        share, token = step.share(self.reader, self.readers, self.rounds), self.files.config.audio_token_id
        batches = packed_batches(
            self.data, share, audio_token_id=token, workers=0, device=self.world.device, piece=self.piece
        )
        return batches, self._targets(step)

    def _log(self, values: dict) -> None:
        if self.world.is_main:
            self.metrics.write(values | self.health.alarm(values))
            self.progress.say(format_step(values, self.total))

    def _evaluate(self, done: int) -> float | None:
        """The loss on the held-out data, the same on all processes; None if it is not finite."""
        settings, data = self.settings, self.eval_data
        activity.current.enter("evaluate")
        rounds = -(-len(self.eval_rows) // self.readers)
        mine = Step(0, 0, self.eval_rows).share(self.reader, self.readers, rounds)
        token = self.files.config.audio_token_id
        sums = self.engine.evaluate(
            packed_batches(data, mine, audio_token_id=token, workers=0, device=self.world.device, piece=self.piece)
        )
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        audio_targets = [int(data.audio_targets.sum())] * data.codebooks
        *sums, eos, eos_targets = sums.tolist()
        values = losses(sums, int(data.text_targets.sum()), audio_targets, settings) | eos_loss(eos, eos_targets)
        if not math.isfinite(values["loss"]):
            self.progress.say(f"step {done}/{self.total} | eval loss is not finite")
            return None
        if self.world.is_main:
            alarm = self.health.alarm_held_out(values, audio_targets[0])
            self.metrics.write({"step": done} | {f"eval_{name}": value for name, value in values.items()} | alarm)
            self.progress.say(f"step {done}/{self.total} | eval loss {values['loss']:.4f}")
        return values["loss"]

    # ---------------------------------------------------------------- checkpoints

    def _manifest(self, step: int, epoch: int = 0, eval_loss: float | None = None) -> Manifest:
        s = self.settings
        plan = {
            "data": self.data.fingerprint,
            "data_weights": s.data_weights,
            "seed": s.seed,
            "max_tokens_per_micro_batch": s.max_tokens_per_micro_batch,
            "per_device_train_batch_size": s.per_device_train_batch_size,
            "micro_batches_per_step": s.micro_batches_per_step,
        }
        return Manifest(
            step=step, epoch=epoch, tokens_seen=self.meter.tokens_seen, backend=s.backend,
            world_size=self.world.size, use_lora=s.use_lora, base=self.base, plan=plan,
            settings=asdict(s), versions=versions(), eval_loss=eval_loss, shapes=self.engine.stored_shapes(),
        )  # fmt: skip

    def _resume(self) -> int:
        """Loads the checkpoint found; returns the steps done."""
        folder, found = self.checkpoint, None if self.checkpoint is None else load_manifest(self.checkpoint)
        self.meter = Meter(
            self.settings, self.world, self.files.config.num_codebooks, found.tokens_seen if found else 0
        )
        if found is None:
            return 0
        present = self._manifest(0)
        lifecycle.require_same_run(found, present, folder)
        if found.step > self.total:
            raise CheckpointError(
                f"{folder}: step {found.step} is beyond the {self.total} steps of this run → raise max_steps or "
                "num_train_epochs."
            )
        self.engine.load(folder)
        same_draws = lifecycle.restore_random_state(folder, found, self.world)
        self.progress.say(
            f"resumed {folder.name}: step {found.step} of {self.total}, written by {found.world_size} process(es) of "
            f"{found.backend}"
        )
        for name, (was, now) in lifecycle.changes(found, present, "Optimisation"):
            self.progress.say(f"note: {name} was {was}, is {now} from here on")
        if not same_draws and self.settings.use_lora and self.settings.lora_dropout:
            self.progress.say("note: another number of processes draws other dropout; the data are the same")
        return found.step

    def _save(self, step: int, epoch: int, eval_loss: float | None) -> None:
        activity.current.enter("save")
        self.saved_step = step
        manifest = self._manifest(step, epoch, eval_loss)
        self.saver.save(manifest, self.engine.state(), self._write_once)
        if self.settings.async_save:
            self.progress.say(f"saving step {step} behind the training, which waited {self.saver.waited:.2f} s")

    def _write_once(self, folder: Path, manifest: Manifest) -> None:
        """What a checkpoint holds beside the state; perhaps in a thread, so nothing here may look at the model."""
        self.settings.to_yaml(folder / "config.yaml")
        (folder / MODEL_FILES).mkdir()
        copy_side_files(self.files, folder / MODEL_FILES)
        if self.engine.whisper:
            self.engine.whisper.describe(folder / whisper_source.FOLDER)
        if isinstance(self.engine.backend.model, PeftModel):
            self.engine.backend.model.peft_config["default"].save_pretrained(folder)
            stored = StoredWeights(folder, manifest)  # what has just been written, so it is known to be readable
            self.adapter = write_adapter(stored, folder / ADAPTERS, folder / "adapter_config.json", self.settings)

    def _saved(self, saved: Saved) -> None:
        state = {
            "step": lifecycle.step_of(saved.folder),
            "total_steps": self.total,
            "latest": saved.folder.name,
            "best": lifecycle.pointer(self.output_dir, "best"),
            "tokens_seen": load_manifest(saved.folder).tokens_seen,
        }
        try:
            write_atomically(self.output_dir / "trainer_state.json", json.dumps(state, indent=1))
        except OSError as error:
            self.progress.say(f"note: trainer_state.json could not be written: {error}")
        adapter = f"; {ADAPTERS}: {self.adapter}" if self.settings.use_lora else ""
        gone = f"; removed {', '.join(folder.name for folder in saved.pruned)}" if saved.pruned else ""
        size = f"{saved.bytes / 2**20:,.1f} MiB in {saved.seconds:.1f} s"
        self.progress.say(f"saved {saved.folder} ({size}){adapter}{gone}")
        for warning in saved.warnings:
            self.progress.say(f"note: {warning}")

    def _finish(self) -> None:
        """Final weights from the final checkpoint, so that what is handed over is what can be read back."""
        out = self.output_dir / (ADAPTERS if self.settings.use_lora else "model")
        error = None
        try:
            if self.world.is_main:
                consolidate(self.output_dir / f"checkpoint-{self.total}", out)
                self.progress.say(f"done: {out}")
                self.progress.say(_next_command(self.settings, out))
        except Exception as failure:
            error = failure
        raise_together(self.world, error)


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


def _next_command(settings: Settings, out: Path) -> str:
    if settings.use_lora:
        return (
            f"next: higgs-engine merge --base_model_path {settings.model_path} --lora_adapter_path {out} "
            f"--output_path {out.parent / 'merged'}"
        )
    return f"next: HiggsAudioV2ForConditionalGeneration.from_pretrained({str(out)!r}, use_text_head=True)"
