"""A training run, top to bottom: settings, data, plan, engine, resume, steps, checkpoints, final weights."""

import os
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch

from engine import callbacks
from engine.checkpoint import lifecycle
from engine.checkpoint.manifest import load_manifest
from engine.config import Settings, prepare_output_dir
from engine.data.batches import Step
from engine.data.packing import PackedBatch
from engine.doctor.preflight import preflight, require
from engine.errors import CheckpointError
from engine.exit_codes import DONE, STOPPED
from engine.higgs_engine import HiggsEngine, require_possible
from engine.model.weights import WeightFiles
from engine.observe import communication
from engine.observe.early_stopping import EarlyStopping
from engine.observe.health import Health
from engine.observe.metrics import Meter, MetricsFile
from engine.observe.profiling import Profiler
from engine.observe.progress import Progress
from engine.observe.provenance import Provenance
from engine.observe.shares import TimeShares
from engine.observe.stragglers import Stragglers
from engine.observe.trackers import Trackers
from engine.on_all_processes import on_all_processes
from engine.plan.activations import Row, longest_row
from engine.report.writer import ReportWriter
from engine.run_checkpoints import RunCheckpoints
from engine.run_data import RunData
from engine.runtime import activity, garbage
from engine.runtime.distributed import World, on_main, together
from engine.runtime.signals import Response, StopRequests, StopVote
from engine.runtime.watchdog import GOES_FIRST_S
from engine.schedule import learning_rate

RESTART = "HIGGS_ENGINE_RESTART"
"""Environment variable in which a launcher says that the run has failed before: it goes on from its last checkpoint."""


def train(settings: Settings) -> int:
    """One process's part in a run; every process of the launcher calls it with the same settings.

    Returns:
        The exit code: the run is complete, or was asked to stop and can be resumed (engine/exit_codes.py).
    """
    return on_all_processes(settings, lambda world, stop: _train(settings, world, stop))


def _train(settings: Settings, world: World, stop: StopRequests) -> int:
    output_dir, say = Path(settings.output_dir), Progress(world).say
    findings = preflight(settings, world)
    for finding in findings:
        if finding.level == "warning":
            say(f"note: {finding}")
    require(findings)
    if settings.max_restarts and activity.FOLDER not in os.environ:
        say("note: max_restarts: this run was not started by `bash launch/train.sh`, so nobody starts it again")
    checkpoint = lifecycle.find(settings.resume, output_dir, world, say, again=RESTART in os.environ)
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
        on_main(world, self._prepare_output)
        self.callbacks = together(world, self._callbacks)
        # dropout differs between processes, but not between those that compute the same
        torch.manual_seed(settings.seed + world.rank // settings.tensor_parallel_size)

        files = WeightFiles(settings.model_path)
        require_possible(settings, files.config, world.device)
        activity.current.outside("reading the data")
        self.data = RunData(settings, world, files, reuse=checkpoint is not None, say=self.say)
        self.total = self.data.plan.total_steps
        row = Row.of(self.data.train, longest_row(self.data.train.lengths, settings))
        activity.current.outside("loading the model")
        self.engine = HiggsEngine(settings, world, files, self.data.rounds, row)
        self.checkpoints = RunCheckpoints(settings, world, self.data, self.engine, self.say, self._published)
        self.why_stop: str | None = None
        backend = f"backend: {settings.backend}, {self.engine.backend.precision}; attention: {self.engine.attention}"
        self.summary = [*self.engine.summary, backend, *self.data.describe()]
        for line in self.summary:
            self.say(line)

    def say(self, line: str) -> None:
        """Prints it, on the main process."""
        self.progress.say(line)

    def ask_to_stop(self, why: str) -> None:
        """The run ends after this step as if it were complete. All processes have to ask."""
        self.why_stop = self.why_stop or why

    def _prepare_output(self) -> None:
        prepare_output_dir(self.settings)
        if self.checkpoint is None and lifecycle.checkpoints(self.output_dir):
            raise CheckpointError(
                f"{self.output_dir} holds checkpoints of an earlier run → continue it with --resume auto, "
                "or give another --output_dir."
            )

    def _callbacks(self) -> callbacks.Callbacks:
        """The user's first: what they add to the metrics, ours write down."""
        settings = self.settings
        members = callbacks.load(settings.callbacks)
        members += [self.progress, Stragglers(), Provenance(), MetricsFile(), Trackers(settings, self.world)]
        if settings.early_stopping_patience is not None:
            members.append(EarlyStopping(settings.early_stopping_patience))
        if settings.sample_every is not None:
            from engine.evaluate.sampler import Sampler  # half a second of imports, for runs that speak

            members.append(Sampler())
        if settings.profile_steps is not None:
            members.append(Profiler())
        members.append(ReportWriter())  # after those whose files it reads
        return callbacks.Callbacks(members)

    def execute(self, stop: StopRequests) -> int:
        """Resumes if there is a checkpoint, trains to the end or until `stop`; returns the exit code."""
        settings = self.settings
        found = self.checkpoints.resume(self.checkpoint) if self.checkpoint else None
        start = found.step if found else 0
        recomputed = self.engine.checkpointing == "full"
        seen = self.data.size_before(start)
        self.meter = Meter(settings, self.world, self.engine.config, recomputed, seen, self.total)
        self.health = Health(settings, self.engine, self.data.train, self.data.again, self.say, resumed_step=start)
        if self.world.is_main:
            settings.to_yaml(self.output_dir / "config.yaml")
        with closing(self.callbacks):
            try:
                self.callbacks.on_start(self, start)
                code = self._steps(start, stop)
                self.checkpoints.saver.finish()
                if code == DONE:
                    stop.nothing_is_left_to_save()
            except BaseException:
                self.checkpoints.leave()
                raise
            self.progress.close()  # what follows draws bars of its own
            if code == DONE:
                self.checkpoints.hand_over()
            self.callbacks.on_end(self, self.checkpoints.last_step, code)
        return code

    def _steps(self, start: int, stop: StopRequests) -> int:
        batches = self.data.batches(start)
        vote = StopVote(stop, self.world, timedelta(seconds=self.settings.timeout_s + GOES_FIRST_S))
        stop.response = Response.SAVE
        code = DONE
        clock = communication.measured(self.world, self.settings.logging_steps)
        with garbage.at_chosen_steps() as collect, clock as communicated:
            self.shares = TimeShares(self.world, communicated)
            for step in self.data.plan.steps(start):
                activity.current.enter("between steps", step.number + 1)
                self.checkpoints.saver.poll()
                self._step(step, batches)
                collect(step.number)
                if self.why_stop:
                    self.say(f"ends after step {step.number + 1} of {self.total}: {self.why_stop}")
                    break
                if code := vote.after_step():
                    self._stop(step, code)
                    break
        vote.close()
        activity.current.outside("end of the steps")
        return code

    def _stop(self, step: Step, code: int) -> None:
        """Leaves nothing unsaved behind."""
        done = step.number + 1
        why = "a signal asked for it" if code == STOPPED else f"max_train_hours ({self.settings.max_train_hours:g})"
        if self.checkpoints.last_step != done:
            self._save(step, eval_loss=None)
        self.say(f"stopped after step {done} of {self.total}: {why}; go on with --resume auto")

    def _step(self, step: Step, batches: Iterator[PackedBatch]) -> None:
        settings, done, size = self.settings, step.number + 1, self.data.size(step)
        rate = learning_rate(settings, step.number, self.total)
        result = self.engine.train_step(self.data.share(step, batches), size.targets, rate)
        self.meter.add(result, size)
        self.health.add(step, rate, result)
        self.callbacks.on_step(self, done, result)
        if logged := done == 1 or done % settings.logging_steps == 0 or self._is_last(done):
            self._log(step, rate)
        eval_loss = better = None
        if self.data.held_out is not None and (done % settings.eval_steps == 0 or self._is_last(done)):
            eval_loss = self._evaluate(done)
            better = self._is_best(done)
        if self._is_last(done) and not logged:  # an evaluation has just ended the run
            self._log(step, rate)
        if self._is_last(done) or (better or done % settings.save_steps == 0) and self.health.may_save():
            self._save(step, eval_loss)

    def _is_last(self, done: int) -> bool:
        return done == self.total or self.why_stop is not None

    def _is_best(self, done: int) -> bool:
        """Whether to keep these weights, where the run hands over its best ones."""
        return any(isinstance(member, EarlyStopping) and member.best_step == done for member in self.callbacks.members)

    def _log(self, step: Step, rate: float) -> None:
        activity.current.enter("log")
        steps = self.meter.steps
        values = self.meter.read(step.number + 1)
        with self.meter.paused():
            values |= self.shares.read(steps * values["seconds_per_step"], steps)
            values = {"step": step.number + 1, "epoch": step.epochs_done, "learning_rate": rate} | values
            values |= self.health.report()
            values |= self.health.alarm(values)
            self.callbacks.on_log(self, step.number + 1, values)
            self.health.require_progress()

    def _evaluate(self, done: int) -> float | None:
        """The loss on the held-out data, the same on all processes; None if it is not finite."""
        with self.meter.paused():
            activity.current.enter("evaluate")
            held_out = self.data.held_out
            values = {"step": done} | held_out.evaluate(self.engine)
            values |= self.health.alarm_held_out(values, held_out.targets.codebooks[0])
            self.callbacks.on_evaluate(self, done, values)
            return values["loss"]

    def _save(self, step: Step, eval_loss: float | None) -> None:
        with self.meter.paused():
            self.checkpoints.save(step.number + 1, step.epoch, self.meter.tokens_seen, eval_loss)

    def _published(self, step: int, folder: Path) -> None:
        self.callbacks.on_save(self, step, folder)
