"""`profile_steps: 10:13`: these steps under torch's profiler, and what came of it in `output_dir/profile/`.

    trace-rank-0.json.gz   every operator and kernel: open it at https://ui.perfetto.dev
    kernels.txt            time by phase, and the kernels (operators, on a CPU) that take most of their own
    phases.json            time by phase, of each process, and communication that nothing hides
    memory.pickle          of a GPU: every allocation, to be opened at https://pytorch.org/memory_viz

Phases are taken of every process, so that the slowest shows; all else of the main one, for a trace has 100 MB easily.
Profiled steps take longer, above all on the main process, and compute the same.
"""

import json
import os
import time
import warnings

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from engine.callbacks import Callback
from engine.config_checks import profiled_steps
from engine.observe.kernels import exposed_communication, kernel_table
from engine.observe.phases import PhaseTimes, phase_shares, phase_table
from engine.runtime import activity

FOLDER = "profile"
MEMORY_EVENTS = 200_000
"""Allocations and releases that a memory snapshot goes back; some 100 MB of host memory."""


class Profiler(Callback):
    """Warms up in the step before the first, where there is one; a run that is stopped leaves what it has."""

    _steps: range | None = None
    _done = 0
    _trace: profile | None = None
    _phases: PhaseTimes | None = None

    def on_start(self, run, step):
        if run.settings.profile_steps is None:
            return
        wanted = profiled_steps(run.settings.profile_steps)
        self._steps = range(max(wanted.start, step + 1), min(wanted.stop, run.total + 1))
        if not self._steps:
            where = f"before step {step + 1}, where it goes on" if wanted.start <= step else "after its last"
            run.say(f"note: profile_steps {run.settings.profile_steps}: this run has no such step, they lie {where}")
            self._steps = None
            return
        if len(self._steps) < len(wanted):
            run.say(f"note: profile_steps: only steps {self._name()} of {run.settings.profile_steps} are to come")
        self._before(run, step + 1)

    def on_step(self, run, step, result):
        if self._steps is None:
            return
        self._done = step
        if self._phases is not None:
            with self._phases.interrupted():
                self._advance()
            if step == self._steps[-1]:
                self._finish(run)
                return
        elif self._trace is not None:
            self._advance()
        self._before(run, step + 1)

    def on_end(self, run, step, code):
        if self._phases is not None and self._done >= self._steps[0]:
            self._finish(run)
        elif self._steps is not None:
            self._drop(run)

    def _name(self) -> str:
        return f"{self._steps[0]}:{self._steps[-1]}"

    def _advance(self) -> None:
        if self._trace is not None:
            self._trace.step()

    def _before(self, run, step: int) -> None:
        """What has to be on before `step` begins."""
        first = self._steps[0]
        warms_up = step == first - 1
        if run.world.is_main and self._trace is None and (warms_up or step == first):
            self._trace = self._start_trace(run, warmup=int(warms_up))
        if step == first:
            run.say(f"profile: steps {self._name()} are recorded, and take longer")
            self._phases = PhaseTimes(run.world.device)
            self._phases.start()

    def _start_trace(self, run, warmup: int) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print two lines about itself
        activities = [ProfilerActivity.CPU]
        if run.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*warmup")  # there is no step before the first to warm up in
            plan = schedule(wait=0, warmup=warmup, active=len(self._steps), repeat=1)
        started = profile(activities=activities, schedule=plan, record_shapes=True, profile_memory=True)
        started.start()
        return started

    def _drop(self, run) -> None:
        """The run ends before a step was recorded."""
        run.say(f"note: profile_steps {self._name()}: the run ends before, nothing is recorded")
        if self._phases is not None:
            self._phases.stop()
        if self._trace is not None:
            self._trace.stop()
        self._steps = self._trace = self._phases = None

    def _finish(self, run) -> None:
        """Every process comes here after the same step; the main one writes."""
        self._phases.stop()
        spent, trace, steps = self._phases.seconds(), self._trace, self._done + 1 - self._steps[0]
        if trace is not None:
            trace.stop()
        self._steps = self._trace = self._phases = None
        activity.current.enter("profile")
        with run.meter.paused():
            everyone = [spent]
            if run.world.size > 1:
                everyone = [{} for _ in range(run.world.size)]
                dist.all_gather_object(everyone, spent)
            if run.world.is_main:
                try:
                    _write(run, trace, everyone, steps)
                except OSError as error:
                    run.say(f"note: the profile could not be written, training goes on: {error}")
            if run.world.size > 1:
                dist.barrier()  # else the others would wait in their next step, and count it as communication


def _write(run, trace: profile, seconds: list[dict[str, float]], steps: int) -> None:
    folder, on_gpu, began = run.output_dir / FOLDER, run.world.device.type == "cuda", time.perf_counter()
    folder.mkdir(exist_ok=True)
    run.say("profile: writing the trace, which takes its time")
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    trace.export_chrome_trace(str(folder / "trace-rank-0.json.gz"))
    rows = phase_shares(seconds, steps)
    exposed = exposed_communication(trace) / steps if on_gpu and run.world.size > 1 else None
    said = {"steps": steps, "phases": rows, "exposed_communication_seconds": exposed, "by_rank": seconds}
    (folder / "phases.json").write_text(json.dumps(said, indent=2) + "\n")
    table = phase_table(rows, run.world.size)
    if exposed is not None:
        table.append(f"communication that nothing hides: {1000 * exposed:,.1f} ms a step")
    kernels = kernel_table(trace, on_gpu, steps)
    (folder / "kernels.txt").write_text("\n".join([*table, "", *kernels]) + "\n")
    for line in (*table, f"profile: {folder}, written in {time.perf_counter() - began:.0f} s"):
        run.say(line)
    run.say("profile: open trace-rank-0.json.gz at https://ui.perfetto.dev")
    if on_gpu:
        run.say("profile: open memory.pickle at https://pytorch.org/memory_viz")
