"""A training run, top to bottom: settings, data, plan, engine, resume, steps, checkpoints, final weights."""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from transformers.utils import logging as transformers_log

from engine.checkpoint import lifecycle
from engine.checkpoint.manifest import load_manifest
from engine.config import Settings, prepare_output_dir
from engine.data.batches import Step
from engine.data.encoder import FRAMES_PER_SECOND
from engine.data.packing import PackedBatch
from engine.doctor.preflight import preflight, require
from engine.errors import CheckpointError
from engine.exit_codes import DONE, STOPPED
from engine.higgs_engine import HiggsEngine
from engine.model.weights import WeightFiles
from engine.observe.health import Health
from engine.observe.metrics import Meter, MetricsFile, eos_loss, losses
from engine.observe.progress import Progress, format_step
from engine.observe.stragglers import Stragglers
from engine.plan.activations import Row, longest_row
from engine.run_checkpoints import RunCheckpoints
from engine.run_data import RunData
from engine.runtime import activity, garbage
from engine.runtime.distributed import World, init_process_group, raise_together, shutdown
from engine.runtime.faults import in_words
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
        say = self.progress.say
        self._prepare_output()
        # dropout differs between processes, but not between those that compute the same
        torch.manual_seed(settings.seed + world.rank // settings.tensor_parallel_size)

        files = WeightFiles(settings.model_path)
        activity.current.outside("reading the data")
        self.data = RunData(settings, world, files, reuse=checkpoint is not None, say=say)
        self.total = self.data.plan.total_steps
        row = Row.of(self.data.train, longest_row(self.data.train.lengths, settings))
        activity.current.outside("loading the model")
        self.engine = HiggsEngine(settings, world, files, self.data.rounds, row)
        self.checkpoints = RunCheckpoints(settings, world, self.data, self.engine, say)
        backend = f"backend: {settings.backend}, {self.engine.backend.precision}; attention: {self.engine.attention}"
        for line in (*self.engine.summary, backend, *self.data.describe()):
            say(line)

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

    def execute(self, stop: StopRequests) -> int:
        """Resumes if there is a checkpoint, trains to the end or until `stop`; returns the exit code."""
        settings, say = self.settings, self.progress.say
        found = self.checkpoints.resume(self.checkpoint) if self.checkpoint else None
        start, tokens_seen = (found.step, found.tokens_seen) if found else (0, 0)
        self.meter = Meter(settings, self.world, self.data.train.codebooks, tokens_seen)
        self.stragglers = Stragglers(self.world)
        self.health = Health(settings, self.engine, self.data.train, self.data.again, say, resumed_step=start)
        if self.world.is_main:
            settings.to_yaml(self.output_dir / "config.yaml")
            self.metrics = MetricsFile(self.output_dir / "metrics.jsonl", start)
        self.progress.start(start, self.total)
        try:
            code = self._steps(start, stop)
            self.checkpoints.saver.finish()
        except BaseException:
            self.checkpoints.saver.leave()
            raise
        self.progress.stop()
        if code == DONE:
            self.checkpoints.hand_over()
        return code

    def _steps(self, start: int, stop: StopRequests) -> int:
        batches = self.data.batches(start)
        vote = StopVote(stop, self.world, timedelta(seconds=self.settings.timeout_s + GOES_FIRST_S))
        stop.response = Response.SAVE
        code = DONE
        with garbage.at_chosen_steps() as collect:
            for step in self.data.plan.steps(start):
                activity.current.enter("between steps", step.number + 1)
                self.checkpoints.saver.poll()
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
        if self.checkpoints.last_step != done:
            self.checkpoints.save(done, step.epoch, self.meter.tokens_seen, eval_loss=None)
        self.progress.say(f"stopped after step {done} of {self.total}: {why}; go on with --resume auto")

    def _step(self, step: Step, batches: Iterator[PackedBatch]) -> None:
        settings, data, done = self.settings, self.data, step.number + 1
        rate, targets = learning_rate(settings, step.number, self.total), data.targets(step)
        result = self.engine.train_step(data.share(step, batches), targets, rate)
        self.meter.add(result, targets, data.tokens(step), data.audio_frames(step) / FRAMES_PER_SECOND)
        self.health.add(step, rate, result)
        self.progress.step()
        last = done == self.total
        if done == 1 or done % settings.logging_steps == 0 or last:
            self._log(done, step.epoch, rate)
        eval_loss = None
        if data.held_out is not None and (done % settings.eval_steps == 0 or last):
            eval_loss = self._evaluate(done)
        if last or done % settings.save_steps == 0 and self.health.may_save():
            self.checkpoints.save(done, step.epoch, self.meter.tokens_seen, eval_loss)

    def _log(self, done: int, epoch: int, rate: float) -> None:
        activity.current.enter("log")
        steps, values = self.meter.steps, self.meter.read()
        for line in self.stragglers.report(steps, values["seconds_per_step"]):
            self.progress.say(line)
        values = {"step": done, "epoch": epoch, "learning_rate": rate} | self.health.report() | values
        if self.world.is_main:
            self.metrics.write(values | self.health.alarm(values))
            self.progress.say(format_step(values, self.total))
        self.health.require_progress()

    def _evaluate(self, done: int) -> float | None:
        """The loss on the held-out data, the same on all processes; None if it is not finite."""
        activity.current.enter("evaluate")
        sums = self.engine.evaluate(self.data.held_out_batches())
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        *sums, eos, eos_targets = sums.tolist()
        targets = self.data.held_out_targets()
        values = losses(sums, targets.text, targets.codebooks, self.settings) | eos_loss(eos, eos_targets)
        if not math.isfinite(values["loss"]):
            self.progress.say(f"step {done}/{self.total} | eval loss is not finite")
            return None
        if self.world.is_main:
            alarm = self.health.alarm_held_out(values, targets.codebooks[0])
            self.metrics.write({"step": done} | {f"eval_{name}": value for name, value in values.items()} | alarm)
            self.progress.say(f"step {done}/{self.total} | eval loss {values['loss']:.4f}")
        return values["loss"]
