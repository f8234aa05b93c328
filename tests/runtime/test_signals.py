"""What a signal does: asks to save and leave, once; leaves at once, twice; also while the main thread is in C code."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from engine.exit_codes import STOPPED, TIME_IS_UP
from engine.launch.processes import _is_gone
from engine.runtime import signals
from engine.runtime.signals import Response, StopRequests
from tests.processes import ROOT

ECHO_S = 0.5
WAITS_IN_C = f"""
import ctypes, os, sys
from engine.runtime import signals
from engine.runtime.signals import Response, StopRequests
signals.ECHO_S = {ECHO_S}
stop = StopRequests()
with stop.listening():
    stop.response = Response[sys.argv[1]]
    os.write(1, b"ready")
    left = int(sys.argv[2])
    while left:
        left = ctypes.CDLL(None).sleep(left)   # as a collective does: no Python runs in the main thread
print(stop.code)
"""


def child(response: str, seconds: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WAITS_IN_C, response, str(seconds)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell runs behind ignores it
    )  # fmt: skip
    assert process.stdout.read(5) == "ready"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_once_asks_and_twice_leaves(number):
    process = child("SAVE", 60)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)  # an echo: some launchers repeat what the terminal has sent
    time.sleep(ECHO_S + 0.5)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number and time.monotonic() - began < 5
    name = signal.Signals(number).name
    assert f"{name}: saves after this step and leaves; once more leaves at once" in errors
    assert f"{name}: leaves at once, without saving" in errors


def test_usr1_may_come_again_and_other_signals_after_it():
    """A batch system sends USR1, then TERM when the time is up: the save is not to be cut short by that."""
    process = child("SAVE", 3)
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(1.2 * ECHO_S)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out.strip()) == (0, str(STOPPED))
    assert errors.count("saves after this step") == 1


def test_twice_leaves_also_when_another_signal_came_first():
    process = child("SAVE", 60)
    for number, pause in ((signal.SIGUSR1, 0.2), (signal.SIGTERM, ECHO_S + 0.5), (signal.SIGTERM, 0)):
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(pause)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_where_nothing_is_to_be_saved_a_signal_ends_the_process():
    """With the code that asks for another start: launch/slurm.sbatch queues the job again after it."""
    process = child("LEAVE", 60)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == STOPPED and "leaves; there is nothing to save" in errors


def test_a_signal_during_the_last_save_ends_the_process_after_it(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(signals.os, "_exit", left.append)
    stop = StopRequests()
    stop.response = Response.SAVE
    stop.hear(signal.SIGTERM)
    assert left == []
    stop.nothing_is_left_to_save()
    assert left == [STOPPED] and "SIGTERM: leaves; everything is saved" in capsys.readouterr().err


def test_everything_is_as_before_afterwards():
    before = [signal.getsignal(number) for number in signals.HEARD], signal.set_wakeup_fd(-1)
    with StopRequests().listening():
        assert signal.getsignal(signal.SIGTERM) is not before[0][0]
    assert ([signal.getsignal(number) for number in signals.HEARD], signal.set_wakeup_fd(-1)) == before


def test_the_time_is_up():
    stop = StopRequests(max_hours=0.2 / 3600)
    assert stop.code == 0
    time.sleep(0.3)
    assert stop.code == TIME_IS_UP
    stop.response = Response.SAVE
    stop.hear(signal.SIGUSR1)
    assert stop.code == STOPPED  # whoever sent it waits for this code
    assert StopRequests(None).code == 0


def test_a_loader_worker_leaves_signals_to_its_rank_and_dies_with_it():
    reading, writing = os.pipe()
    rank = os.fork()
    if rank == 0:
        if os.fork() == 0:
            signals.begin_worker()
            os.write(writing, str(os.getpid()).encode())
        time.sleep(60)
        os._exit(0)
    worker = psutil.Process(int(os.read(reading, 20)))
    worker.terminate()
    time.sleep(0.1)
    assert worker.status() == psutil.STATUS_SLEEPING
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    deadline = time.monotonic() + 10
    while not _is_gone(worker.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
