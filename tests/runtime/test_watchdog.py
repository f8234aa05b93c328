"""The watchdog's own end: whatever the disk does, it is not kept from ending its process."""

import os
import time

import pytest
import torch

from engine.runtime import beats, watchdog
from engine.runtime.distributed import World
from engine.runtime.watchdog import Watchdog


@pytest.fixture
def dog(monkeypatch, tmp_path):
    monkeypatch.setattr(beats, "Beats", lambda world: None)
    monkeypatch.setattr(watchdog, "STACKS_S", 0.2)
    return Watchdog(World(0, 0, 1, torch.device("cpu")), 60.0, tmp_path / "stacks")


def test_stacks_are_written_line_by_line(dog, tmp_path):
    assert dog._dump_stacks() and "in test_stacks_are_written" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_a_disk_that_refuses_or_does_not_answer_is_not_waited_for(dog, tmp_path):
    (tmp_path / "stacks").write_text("in the way")
    assert not dog._dump_stacks()
    (tmp_path / "stacks").unlink()
    (tmp_path / "stacks").mkdir()
    os.mkfifo(tmp_path / "stacks" / "rank-0.txt")  # to open it is to wait for a reader
    began = time.monotonic()
    assert not dog._dump_stacks() and time.monotonic() - began < 2
    with open(tmp_path / "stacks" / "rank-0.txt") as reader:  # lets the thread go
        reader.read()
