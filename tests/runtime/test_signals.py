"""What a signal does: asks to save and leave, once; leaves at once, twice; also while the main thread is in C code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from engine.exit_codes import STOPPED, TIME_IS_UP
from engine.runtime import signals
from engine.runtime.signals import Response, StopRequests
from tests.processes import ROOT

WAITS_IN_C = """
import ctypes, os, sys
from engine.runtime.signals import Response, StopRequests
stop = StopRequests()
with stop.listening():
    stop.response = Response[sys.argv[1]]
    os.write(1, b"ready")
    left = int(sys.argv[2])
    while left and not (stop.signal and sys.argv[3] == "end"):
        left = ctypes.CDLL(None).sleep(left)   # as a collective does: no Python runs in the main thread
print(stop.code)
"""


def child(response: str, seconds: int, end: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", WAITS_IN_C, response, str(seconds), end]
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
    time.sleep(0.2)
    process.send_signal(number)  # an echo: some launchers repeat what the terminal has sent
    time.sleep(signals.ECHO_S + 1)
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
    process = child("SAVE", 4, "")
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(signals.ECHO_S)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out.strip()) == (0, str(STOPPED))
    assert errors.count("saves after this step") == 1


def test_twice_leaves_also_when_another_signal_came_first():
    process = child("SAVE", 60)
    for number, pause in ((signal.SIGUSR1, 0.2), (signal.SIGTERM, signals.ECHO_S + 1), (signal.SIGTERM, 0)):
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(pause)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_before_the_first_step_a_signal_ends_the_process():
    process = child("LEAVE", 60)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and "leaves; no step has been trained" in errors


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
