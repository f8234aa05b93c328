"""One launcher and its ranks, from the first to the last."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.exit_codes import DONE, MISTAKE, STOPPED, TIME_IS_UP
from engine.launch import processes, verdict
from engine.launch.signals import Signals
from engine.runtime.activity import read_records

LOOK_S = 0.1
LOOK_AT_STATES_S = 5.0
"""Between two looks at which ranks are stopped."""
JUST_ENDING_S = 5.0
"""What is left this long after the launcher has ended is no longer just ending."""


@dataclass
class Attempt:
    """
    Args:
        command: of the launcher, complete.
        env: what it runs in; HIGGS_ENGINE_RECORDS is among it.
        records: the folder that this names, empty.
        expected: ranks of this machine; None: not known.
        patience: seconds that a rank may be stopped (SIGSTOP); None: for ever.
    """

    command: Sequence[str]
    env: Mapping[str, str]
    records: Path
    expected: int | None
    signals: Signals
    patience: float | None = None
    ended: dict[int, float] = field(default_factory=dict)
    """Rank -> when it ended, by time.time()."""
    _watched: dict[int, int] = field(default_factory=dict)
    """Process -> rank."""
    _stopped: dict[int, float] = field(default_factory=dict)
    """Process -> seconds that it has been stopped."""
    _states_seen: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """Starts it, hands signals on, waits for the last process; the exit code of the run."""
        # A session of its own: Ctrl-C in a terminal reaches this process alone, which tells the ranks.
        launcher = subprocess.Popen(
            self.command, env=dict(self.env), stdin=subprocess.DEVNULL, start_new_session=True
        )  # fmt: skip
        insisted, endings = 0, processes.Endings()
        while launcher.poll() is None:
            for number in self.signals.take():
                if not self._tell_ranks(number):
                    _signal_group(launcher, signal.SIGTERM)
            if self.signals.insisted > insisted:
                insisted = self.signals.insisted
                self._insist(launcher, insisted)
            self._look(endings)
            self._end_stopped()
        self._clear_up(endings)
        return self._judge(launcher.returncode)

    def _tell_ranks(self, number: int) -> int:
        """A launcher told to stop gives its ranks 30 s, too little to save a large model, and the DeepSpeed runner
        dies at once and leaves them behind. So the ranks are told, and the launcher ends when they have."""
        told = processes.tell(processes.ranks(self.records), number)
        name = signal.Signals(number).name
        say(f"{name}: told {told} rank(s)" if told else f"{name}: no rank runs here yet; ends the launcher")
        return told

    def _insist(self, launcher: subprocess.Popen, times: int) -> None:
        say("once more: ends everything" if times == 1 else "once more: kills everything")
        if times > 1:
            processes.tell(processes.of_run(self.records), signal.SIGKILL)
        else:
            processes.tell(processes.ranks(self.records), self.signals.urged)  # the same again: they leave at once
            _signal_group(launcher, signal.SIGTERM)

    def _look(self, endings: processes.Endings) -> None:
        """Takes as long as `LOOK_S` unless a rank ends. What is found gone in one look has ended at one time: whoever
        looks rarely, on a busy machine, cannot say who was first."""
        gone = self._watch(endings)
        gone += endings.wait(0 if gone else LOOK_S)
        if gone:  # the first to end may have begun and ended within this look
            gone += self._watch(endings) + endings.wait(0)
        self.ended |= dict.fromkeys((self._watched[pid] for pid in gone), time.time())

    def _end_stopped(self) -> None:
        """A hung run is ended by the watchdogs of its ranks, and one that is stopped has none: if all are, nobody
        would. What this process has not seen itself, while it was stopped too, does not count."""
        passed = time.monotonic() - self._states_seen
        if self.patience is None or passed < LOOK_AT_STATES_S:
            return
        self._states_seen += passed
        stopped = [pid for pid in self._watched if processes.is_stopped(pid, self.records)]
        self._stopped = {pid: self._stopped.get(pid, 0.0) + min(passed, 2 * LOOK_AT_STATES_S) for pid in stopped}
        for pid, seconds in self._stopped.items():
            if seconds > self.patience:
                say(f"rank {self._watched[pid]} (process {pid}) has been stopped for {seconds:.0f} s: kills it")
                processes.kill(pid)

    def _watch(self, endings: processes.Endings) -> list[int]:
        """Watches the ranks that are new; those among them that have ended already."""
        new = [record for record in read_records(self.records) if record["pid"] not in self._watched]
        self._watched |= {record["pid"]: record["rank"] for record in new}
        return [record["pid"] for record in new if not endings.watch(record["pid"])]

    def _clear_up(self, endings: processes.Endings) -> None:
        """Nothing outlives the run. Ranks that do have lost their launcher, whose code says nothing about them."""
        deadline = time.monotonic() + JUST_ENDING_S
        while (left := processes.of_run(self.records)) and time.monotonic() < deadline and not self._in_a_hurry():
            self._look(endings)
        if left:
            say(f"the launcher has ended and left {len(left)} process(es) behind: ends them")
            processes.end_all(self.records, self._in_a_hurry)
        self._look(endings)
        endings.close()

    def _in_a_hurry(self) -> bool:
        self.signals.take()
        return self.signals.insisted > 1

    def _judge(self, launcher: int) -> int:
        found = read_records(self.records)
        code = verdict.exit_code(found, self.expected, launcher)
        first = self.signals.first
        if first and code not in (DONE, MISTAKE, STOPPED, TIME_IS_UP):
            begun = any(record["step"] is not None or record["code"] is not None for record in found)
            code = 128 + self.signals.urged if self.signals.insisted else code if begun else STOPPED
        if code not in (DONE, STOPPED, TIME_IS_UP) and found and {record["code"] for record in found} != {MISTAKE}:
            heading = f"ended with exit code {code}, {verdict.meaning(code)}"
            silent = (self.expected or 0) - len(found)
            more = [f"{silent} more ended before they could say anything"] if silent > 0 else []
            say("\n  ".join([heading, *verdict.table(found, self.ended), *more]))
        return code


def _signal_group(launcher: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(launcher.pid, number)
    except ProcessLookupError:
        pass


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
