"""`higgs-engine doctor`: all checks, from those that need nothing to those that need the whole cluster to work.

Ranks meet at the store first, then each gathers its facts, then machines call each other, then a process group is made
and timed. What would surely fail is left out, and every wait is bounded: a broken network is told in seconds.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import Settings, parse
from engine.doctor import disk, ports, preflight, report, speed
from engine.doctor.filesystem import Traces
from engine.doctor.findings import FAILURE, Facts, Finding, who, worst
from engine.doctor.meeting import Meeting, open_store
from engine.errors import ConfigError
from engine.exit_codes import DONE, MISTAKE
from engine.runtime import distributed
from engine.runtime.distributed import World, launcher_variables

OPTIONAL = ("model_path", "audio_tokenizer_path", "train_data_file")


def examine(argv: Sequence[str], patience_s: float, json_file: Path | None) -> int:
    """All checks by all ranks; rank 0 prints. Returns the exit code, on every rank the same.

    Args:
        argv: settings of a run, or none.
        patience_s: for ranks that are missing, and for the network.

    Raises:
        EngineError: ranks are missing, or this one does not reach the meeting place.
    """
    settings, problems = _settings(argv)
    with _launched():
        world, trouble = _place()
        meeting = Meeting(open_store(world, patience_s), world, patience_s)
        examination = Examination(meeting, settings)
        try:
            examination.run(problems, trouble)
            if world.is_main:
                examination.say(json_file)
            return meeting.tell(examination.code)
        finally:
            meeting.close()


@contextlib.contextmanager
def _launched() -> Iterator[None]:
    """The environment as torchrun would make it, whatever the launcher; as it was, afterwards."""
    placed = {name: value for name, value in launcher_variables(os.environ).items() if name not in os.environ}
    os.environ.update(placed)
    try:
        yield
    finally:
        for name in placed:
            os.environ.pop(name, None)


def _settings(argv: Sequence[str]) -> tuple[Settings | None, list[str]]:
    """The settings, or what is wrong with them here: a machine that lacks a file is a finding, not an end."""
    if not argv:
        return None, []
    try:
        return parse(list(argv), "higgs-engine doctor", optional=OPTIONAL), []
    except ConfigError as error:
        return None, error.problems or [error.heading]


def _place() -> tuple[World, str | None]:
    """This process's place, and why it has no device, if so."""
    variables = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    device, trouble = torch.device("cpu"), None
    try:
        device = distributed._device(variables["LOCAL_RANK"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.mem_get_info(device)
    except (ConfigError, RuntimeError) as error:
        device, trouble = torch.device("cpu"), str(error)
    world = World(
        variables["RANK"], variables["LOCAL_RANK"], variables["WORLD_SIZE"], device, variables["LOCAL_WORLD_SIZE"]
    )
    return world, trouble


class Examination:
    """What has been found so far; facts and findings are rank 0's alone."""

    def __init__(self, meeting: Meeting, settings: Settings | None):
        self.meeting, self.world, self.settings = meeting, meeting.world, settings
        self.everyone: list[Facts] | None = None
        self.findings: list[Finding] = []
        self.rows: list[dict] = []
        self.seconds: dict[str, float] = {}

    @property
    def code(self) -> int:
        return MISTAKE if worst(self.findings) == FAILURE else DONE

    def run(self, problems: Sequence[str], trouble: str | None) -> None:
        traces = Traces(self.meeting)
        try:
            with self._timed("software"):
                mine = preflight.own_facts(self.world, self.settings, problems, trouble)
            self.everyone = preflight.collect(traces, self.settings, mine)
            self._judge(lambda everyone: preflight.judge(everyone, connected=False))
            with self._timed("files"):
                self._add("disk", disk.probe(traces))
            self._judge(disk.judge)
        finally:
            traces.clear()
        with self._timed("network"):
            self._add("ports", ports.probe(self.meeting, mine["network"]))
        self._judge(ports.judge)
        with self._timed("speed"):
            self._speed()

    def _add(self, name: str, value: object) -> None:
        gathered = self.meeting.gather(name, value)
        for facts, found in zip(self.everyone or (), gathered or (), strict=True):
            facts[name] = found

    def _judge(self, judge) -> None:
        if self.everyone is not None:
            self.findings += judge(self.everyone)

    @contextlib.contextmanager
    def _timed(self, section: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[section] = self.seconds.get(section, 0.0) + time.monotonic() - began

    def _speed(self) -> None:
        """Matrix products, then collectives, unless what was found so far says that they would hang."""
        self.meeting.gather("ready", None)
        self.meeting.tell(None)  # all compute at once, as in training: ranks that share cores show
        self._add("compute", speed.compute(self.world.device))
        self._judge(speed.judge_compute)
        if self.world.size == 1:
            return
        if self.meeting.tell(self._hopeless()):
            self._note("collectives: not measured, for the failures above would make them hang", "mend those first")
            return
        error, rows = self._collectives()
        outcomes = self.meeting.gather("collectives", error, 2 * self.meeting.patience_s)
        broken = [(facts, text) for facts, text in zip(self.everyone or (), outcomes or (), strict=True) if text]
        for facts, text in broken:
            self._note(
                f"collectives: {who([facts], self.everyone)}: {text}",
                "look at the network between these ranks: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO",
            )
        if not broken and self.everyone:
            self.rows = rows
            self.findings += speed.judge_collectives(rows, self.world.device.type == "cuda")

    def _hopeless(self) -> bool:
        """Some ranks would wait for others in vain: machines do not reach each other, or not all ranks have GPUs."""
        mixed = len({facts["machine"]["gpu"] is None for facts in self.everyone or ()}) > 1
        return mixed or worst([finding for finding in self.findings if finding.section == "network"]) == FAILURE

    def _note(self, text: str, remedy: str) -> None:
        if self.world.is_main:
            self.findings.append(Finding("speed", FAILURE, text, remedy))

    def _collectives(self) -> tuple[str | None, list[dict]]:
        """What went wrong, and the times."""
        on_gpu = self.world.device.type == "cuda"
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a late collective raises; it does not end the process
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=dist.PrefixStore("group", self.meeting.store),
                rank=self.world.rank, world_size=self.world.size,
                timeout=datetime.timedelta(seconds=self.meeting.patience_s),
            )  # fmt: skip
            rows = speed.collectives(self.world)
            dist.destroy_process_group()
        except (RuntimeError, OSError) as error:
            return str(error).strip().splitlines()[0], []
        return None, rows

    def say(self, json_file: Path | None) -> None:
        """Prints the report, and writes it; that it cannot be written is a finding too."""
        if json_file is not None:
            try:
                report.write_json(json_file, self.findings, self.everyone, self.rows, self.seconds)
            except OSError as error:
                text = f"--json: {json_file}: {error.strerror or error}"
                self.findings.append(Finding("files", FAILURE, text, "give a file that can be written"))
        text = "\n".join(report.lines(self.findings, self.everyone, speed.table(self.rows), self.seconds))
        print(report.printable(text, sys.stdout.encoding), flush=True)
