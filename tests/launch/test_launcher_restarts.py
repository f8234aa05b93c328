"""Attempts and restarts with a small launcher of real processes, which makes every exit code a 1, as torchrun does."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from engine.exit_codes import DIVERGED, DONE, FAILED, HUNG, MISTAKE, STOPPED, TIME_IS_UP
from engine.launch import attempt, processes, restarts, verdict
from engine.launch.attempt import Attempt
from engine.launch.meeting import OldMeetingPlace
from engine.launch.plan import LaunchPlan
from engine.launch.signals import Signals
from engine.runtime.activity import FOLDER, Activity, read_records
from tests.launch.stub import environment
from tests.processes import ROOT

LAUNCHER = """
import os, signal, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, sys.argv[1], *sys.argv[2:]], env=os.environ | {"RANK": str(rank)},
                          start_new_session=True) for rank in range(2)]
if "--desert" in sys.argv:
    time.sleep(0.5)
    os._exit(0)
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.02)
first = next(rank for rank in ranks if rank.poll() is not None)
for rank in ranks if first.returncode else ():
    rank.terminate()
codes = [rank.wait() for rank in ranks]
sys.exit(any(codes))
"""

# RANK 0 and RANK 1 follow the script of their start: what each does, and with which code it ends.
RANK = """
import os, signal, sys, time
from pathlib import Path
from engine.runtime import activity

rank, restart = int(os.environ["RANK"]), int(os.environ.get("HIGGS_ENGINE_RESTART", 0))
told = Path(sys.argv[1])
heard = []
if sys.argv[2] != "careless":
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), lambda number, frame: heard.append(number))
activity.current.keep(rank)
activity.current.enter("backward", step=7)
with open(told, "a") as file:
    file.write(f"{restart} {rank} {os.getpid()}\\n")
scripts = sys.argv[3:]
what = scripts[min(restart, len(scripts) - 1)].split(",")
what = what[min(rank, len(what) - 1)]
while what.startswith("wait") and not heard:
    time.sleep(0.01)
if what == "wait":
    time.sleep(0.3)  # for an echo
    open(told, "a").write(f"heard {len(heard)}\\n")
    time.sleep(0.2)  # the launcher ends the other one when the first has left; by then both have written
    what = "75"
while what == "deaf":
    time.sleep(1)
while what == "143" and heard.count(signal.SIGTERM) < 2:
    time.sleep(0.01)
activity.current.ends(int(what))
os._exit(int(what))
"""


class Runs:
    """Runs of two such ranks; `told` is what they wrote."""

    def __init__(self, folder: Path):
        self.folder, self.told = folder, folder / "told"
        (folder / "launcher.py").write_text(LAUNCHER)
        (folder / "rank.py").write_text(RANK)

    def plan(self, *options: str, **changes) -> LaunchPlan:
        command = (sys.executable, str(self.folder / "launcher.py"))
        known = dict(launcher="torchrun", processes={"here": 2}, fewest=None, node=0, by_ssh=False, host="localhost")
        return LaunchPlan(**known | {"port": 1, "command": command} | changes)

    def run(
        self, *scripts: str, limit: int = 0, kind: str = "careful", after=None, patience: float | None = None, **changes
    ) -> int:  # fmt: skip
        """The exit code of a run whose ranks follow `scripts`, one for each start; `after` is called meanwhile."""
        env = environment(PYTHONPATH=str(ROOT))
        arguments = [str(self.told), kind, *scripts]
        script = str(self.folder / "rank.py")
        run = restarts.Restarts(lambda: self.plan(**changes), env, script, arguments, limit, None, patience)
        thread = threading.Thread(target=after) if after else None
        if thread:
            thread.start()
        code = run.run()
        if thread:
            thread.join()
        return code

    def lines(self, count: int) -> list[list[str]]:
        """The first lines that ranks wrote, as soon as there are so many."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            lines = self.told.read_text().splitlines() if self.told.exists() else []
            if len(lines) >= count:
                return [line.split() for line in lines]
            time.sleep(0.02)
        raise AssertionError(f"not {count} lines: {lines}")

    @property
    def starts(self) -> int:
        return len({line.split()[0] for line in self.told.read_text().splitlines()} - {"heard"})


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.05)
    return Runs(tmp_path)


@pytest.mark.parametrize(
    "codes, launcher, code",
    [
        ([DONE, DONE], 0, DONE),
        ([DONE, DONE], 1, DONE),  # torn down badly, after all was done
        ([STOPPED, STOPPED], 1, STOPPED),
        ([TIME_IS_UP, TIME_IS_UP], 1, TIME_IS_UP),
        ([MISTAKE, FAILED], 1, MISTAKE),
        ([FAILED, None], 1, FAILED),
        ([HUNG, FAILED], 1, HUNG),
        ([None, HUNG], 247, HUNG),
        ([FAILED, DIVERGED], 1, DIVERGED),
        ([None, STOPPED], 247, FAILED),  # killed
        ([STOPPED, DONE], 0, STOPPED),
        ([DONE], 3, 3),  # the other one never said anything
        ([], 2, 2),
        ([], -9, 137),
    ],
)
def test_the_most_telling_code_of_the_ranks_is_the_run_s(codes, launcher, code):
    records = [{"rank": rank, "code": code} for rank, code in enumerate(codes)]
    assert verdict.exit_code(records, 2, launcher) == code


def test_a_rank_that_is_numbered_anew_takes_its_place_over(tmp_path, monkeypatch):
    """Where machines come and go: who was ended for that says nothing about how the run has ended."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank, code in ((0, STOPPED), (1, DONE)):
        process = Activity()
        process.keep(rank)
        process.ends(code)
    assert [(record["rank"], record["code"]) for record in read_records(tmp_path)] == [(1, DONE)]


@pytest.mark.parametrize("script, limit, code, starts", [
    ("0", 3, DONE, 1), ("2,wait", 3, MISTAKE, 1), ("3", 3, DIVERGED, 1), ("76", 3, TIME_IS_UP, 1),
    ("1", 2, FAILED, 3), ("4", 1, HUNG, 2), ("75", 1, STOPPED, 2), ("1", 0, FAILED, 1),
])  # fmt: skip
def test_only_what_a_restart_may_mend_is_started_again(runs, script, limit, code, starts):
    """75 without a signal to the launch: somebody told a rank, which is no reason to be away for long."""
    assert (runs.run(script, limit=limit), runs.starts) == (code, starts)


def test_pauses_grow_until_an_attempt_has_made_a_checkpoint(tmp_path, monkeypatch):
    latest, pauses = tmp_path / "latest", []

    def attempt(run, number, plan, signals):
        if number >= 8:
            latest.write_text(f"checkpoint-{number}")
        return FAILED

    monkeypatch.setattr(restarts.Restarts, "_attempt", attempt)
    monkeypatch.setattr(restarts.Restarts, "_pause", lambda run, seconds, place, signals: not pauses.append(seconds))
    assert restarts.Restarts(Runs(tmp_path).plan, {}, "rank.py", [], 10, latest).run() == FAILED
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 1, 1]


def test_an_earlier_run_is_not_what_a_restart_goes_on_with(tmp_path, monkeypatch):
    """The first attempts fail before they can say that the output folder holds another run."""
    latest, told = tmp_path / "latest", []
    latest.write_text("checkpoint-9")

    class Failing:
        def __init__(self, command, env, *more):
            told.append(env.get(restarts.RESTART))

        def run(self):
            if len(told) == 2:
                latest.write_text("checkpoint-1")
            return FAILED

    monkeypatch.setattr(restarts, "Attempt", Failing)
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)
    restarts.Restarts(Runs(tmp_path).plan, {}, "rank.py", [], 2, latest).run()
    assert told == [None, None, "2"]


def test_machines_stop_together(runs):
    """75 where several machines take part: another one was told to stop, and would not come back."""
    assert runs.run("75", limit=3, processes={"a": 2, "b": 2}, port=9) == STOPPED
    assert runs.starts == 1


def test_a_killed_rank_is_named_and_the_run_goes_on(runs, capfd):
    def kill():
        victim = next(int(line[2]) for line in runs.lines(2) if line[1] == "1")
        time.sleep(0.5)  # for the launch to see them both
        os.kill(victim, signal.SIGKILL)

    assert runs.run("wait", "0", limit=1, kind="careless", after=kill) == DONE
    said = capfd.readouterr().err
    host = re.escape(socket.gethostname())
    assert re.search(rf"killed from outside: rank 1 \({host}, pid \d+\): step 7, backward, for \d+ s", said), said
    rows = [line.split(maxsplit=4) for line in said.splitlines() if re.match(r"  [01]  ", line)]
    assert [row[4].split()[0] for row in rows] == ["ended", "killed"] and rows[0][2:4] == ["7", "backward"]
    assert "restart 1 of 1 in 0 s, after 1, failed" in said


def test_ranks_are_told_once_and_no_restart_follows(runs):
    def interrupt():
        runs.lines(2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)  # an echo

    assert runs.run("wait", limit=3, after=interrupt) == STOPPED
    assert [line for line in runs.lines(4) if line[0] == "heard"] == [["heard", "1"]] * 2
    assert runs.starts == 1


def test_a_signal_that_comes_again_later_ends_everything(runs):
    def insist():
        pids = [int(line[2]) for line in runs.lines(2)]
        for _ in range(3):  # these ranks obey nobody, so a third one kills them
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.1)
        gone.extend(not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie" for pid in pids)

    gone: list[bool] = []
    assert runs.run("deaf", limit=3, after=insist) == 128 + signal.SIGTERM
    assert gone == [True, True] and runs.starts == 1


def test_who_insists_after_usr1_repeats_what_ranks_leave_upon(runs, capfd):
    """USR1 asks to save however often it comes."""

    def insist():
        runs.lines(2)
        for number, pause in ((signal.SIGUSR1, 0.2), (signal.SIGTERM, 1.2), (signal.SIGTERM, 0)):
            os.kill(os.getpid(), number)
            time.sleep(pause)

    assert runs.run("143", limit=3, after=insist) == 128 + signal.SIGTERM
    assert "behind" not in capfd.readouterr().err  # they left by themselves


def test_a_run_whose_ranks_are_all_stopped_is_started_again(runs, monkeypatch, capfd):
    monkeypatch.setattr(attempt, "LOOK_AT_STATES_S", 0.1)

    def stop():
        for line in runs.lines(2):
            os.kill(int(line[2]), signal.SIGSTOP)

    assert runs.run("deaf", "0", limit=1, after=stop, patience=0.4) == DONE
    assert runs.starts == 2
    assert re.search(r"rank [01] \(process \d+\) has been stopped for [01] s: kills it", capfd.readouterr().err)


def test_usr1_again_is_no_insisting():
    signals = Signals()
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        signals._hear(number)
    assert signals.take() == [signal.SIGUSR1, signal.SIGTERM] and not signals.insisted
    assert signals.first == signal.SIGUSR1


def test_a_signal_before_any_step_or_in_a_pause_asks_to_come_again(runs, monkeypatch):
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 30.0)

    def interrupt():
        runs.lines(1)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGUSR1)

    started = time.monotonic()
    assert runs.run("1", limit=3, after=interrupt) == STOPPED
    assert runs.starts == 1 and time.monotonic() - started < 20


def test_nothing_outlives_a_launcher_that_goes_away(runs, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("engine.launch.attempt.JUST_ENDING_S", 0.2)
    records = tmp_path / "records"
    records.mkdir()
    env = environment(PYTHONPATH=str(ROOT), HIGGS_ENGINE_RECORDS=str(records))
    command = [*runs.plan().command, str(tmp_path / "rank.py"), str(runs.told), "careless", "wait", "--desert"]
    assert Attempt(command, env, records, 2, Signals()).run() == FAILED
    assert "left 2 process(es) behind" in capfd.readouterr().err
    assert not processes.of_run(records)


def test_ranks_are_told_from_their_launchers_and_their_children(tmp_path):
    child = "import time; time.sleep(60)"
    rank = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parents = "import os, subprocess, sys; "
    parents += f"subprocess.run([sys.executable, '-c', {rank!r}], env=os.environ | dict(RANK='0'))"
    launcher = subprocess.Popen([sys.executable, "-c", parents], env=environment(HIGGS_ENGINE_RECORDS=str(tmp_path)))
    try:
        deadline = time.monotonic() + 20
        while len(processes.of_run(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [rank.ppid() for rank in processes.ranks(tmp_path)] == [launcher.pid]
    finally:
        processes.end_all(tmp_path, hurry=lambda: False)
        launcher.wait()
    assert not processes.of_run(tmp_path)


@pytest.mark.parametrize("handles", [True, False])
def test_endings_are_seen_in_their_order(monkeypatch, handles):
    """Also of processes whose parent has not asked for them yet; with and without the system's handles."""
    if not handles:
        monkeypatch.setattr(processes, "_has_handles", lambda: False)
    first, second = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    endings = processes.Endings()
    assert endings.watch(first.pid) and endings.watch(second.pid)
    assert endings.wait(0.05) == []
    for process in (second, first):
        process.kill()
        seen = []
        while not seen:
            seen = endings.wait(0.05)
        assert seen == [process.pid]
    first.wait(), second.wait()
    endings.close()


def test_the_store_of_the_last_attempt_is_told_from_the_next_one():
    """At the same host and port; the first closes only after this machine has noticed that the attempt is over."""
    with socket.create_server(("127.0.0.1", 0)) as old:
        port = old.getsockname()[1]
        place = OldMeetingPlace("127.0.0.1", port)
        accepted, _ = old.accept()
        place._thread.join()
        place.attempt_is_over()
        assert not place.is_gone()
    accepted.close()
    with socket.create_server(("127.0.0.1", port)):
        assert place.is_gone()
        late = OldMeetingPlace("127.0.0.1", port)
        late.attempt_is_over()
        late.close()
    place.close()
