"""Saves that fail and saves behind the training's back: the run goes on, says so, and loses nothing."""

import errno
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.backends.tensors import Fragment, Reader
from engine.checkpoint import lifecycle, saver
from engine.checkpoint.lifecycle import checkpoints, find
from engine.checkpoint.saver import Saver
from engine.errors import CheckpointError
from engine.runtime.distributed import World
from tests.checkpoint.test_lifecycle import WORLD, manifest, names, silent, write_once
from tests.processes import run


class Run:
    """A saver, its state, and what it said."""

    def __init__(self, folder: Path, background: bool = False):
        self.folder, self.said, self.saved = folder, [], []
        self.weights = torch.full((100_000,), 1.0)
        self.saver = Saver(
            folder, WORLD, limit=None, keep_every=None, background=background, say=self.said.append,
            done=lambda saved: self.saved.append(saved.folder.name),
        )  # fmt: skip

    def save(self, step: int, write_once=write_once) -> None:
        state = {"model.w": Fragment.whole(self.weights), "step": Fragment.whole(torch.tensor(float(step)))}
        self.saver.save(manifest(step, shapes={"w": [100_000]}), state, write_once)


def full_disk(folder: Path, monkeypatch):
    """A disk that breaks off in the middle of a shard: a limit on the size of files, the real system call failing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_room(folder: Path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(lifecycle.shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    return lambda: monkeypatch.setattr(lifecycle.shutil, "disk_usage", real)


def vanished(folder: Path, monkeypatch):
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    return lambda: elsewhere.rename(folder)


def read_only(folder: Path, monkeypatch):
    """Every attempt to make something fails, as on a file system that the kernel has remounted read-only."""
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        if folder in self.parents:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return lambda: monkeypatch.setattr(Path, "mkdir", real)


FAULTS = {
    full_disk: "File too large",
    no_room: "a checkpoint needs 0.00 GiB, 0.00 GiB are free → make room",
    vanished: "No such file or directory",
    read_only: "Read-only file system",
}


def test_the_thread_is_on_its_process_own_gpu(tmp_path, monkeypatch):
    on = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: on.append((device, threading.current_thread())))
    world = World(3, 3, 1, torch.device("cuda", 3))
    saver = Saver(tmp_path, world, limit=None, keep_every=None, background=True, say=silent)
    thread = saver._thread.submit(threading.current_thread).result()
    saver.finish()
    assert on == [(world.device, thread)]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_one_failure_is_said_and_survived(tmp_path, monkeypatch, fault, background):
    out = tmp_path / "out"
    out.mkdir()
    run = Run(out, background)
    run.save(1)
    run.saver.wait()
    mend = fault(out, monkeypatch)
    run.save(2)
    run.saver.wait()
    mend()
    assert len(run.said) == 1 and run.said[0].startswith("NOT SAVED, training goes on"), run.said
    assert "process 0" in run.said[0] and FAULTS[fault] in run.said[0]
    assert names(out) == ["checkpoint-1"] and find("auto", out, WORLD, silent) == out / "checkpoint-1"
    run.save(3)
    run.saver.finish()
    assert run.saved == ["checkpoint-1", "checkpoint-3"] and not list(out.glob(".*"))


@pytest.mark.parametrize("background", [False, True])
def test_two_failures_in_a_row_end_the_run(tmp_path, background):
    run = Run(tmp_path, background)

    def fails(folder, _manifest):
        raise OSError(errno.EIO, "Input/output error", str(folder / "config.yaml"))

    run.save(1, fails)
    run.saver.wait()
    with pytest.raises(CheckpointError, match="two checkpoints in a row(.|\n)*Input/output error.*config.yaml"):
        run.save(2, fails)
        run.saver.wait()
    assert checkpoints(tmp_path) == []


def test_a_success_between_two_failures_forgives(tmp_path, monkeypatch):
    run = Run(tmp_path)
    for step in (1, 2, 3, 4):
        mend = no_room(tmp_path, monkeypatch) if step % 2 else None
        run.save(step)
        if mend:
            mend()
    run.saver.finish()
    assert run.saved == ["checkpoint-2", "checkpoint-4"] and len(run.said) == 2


def test_a_run_whose_last_checkpoint_failed_does_not_end_well(tmp_path, monkeypatch):
    run = Run(tmp_path)
    no_room(tmp_path, monkeypatch)
    run.save(1)
    with pytest.raises(CheckpointError, match="the last checkpoint could not be written"):
        run.saver.finish()


def test_a_failure_in_tidying_up_is_no_failure_of_the_save(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.saver._limit = 1
    warnings = []
    run.saver._done = lambda saved: warnings.extend(saved.warnings)
    run.save(1)

    def stuck(folder):
        raise OSError(errno.EBUSY, "Device or resource busy", str(folder))

    monkeypatch.setattr(lifecycle, "remove", stuck)
    run.save(2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"] and not run.said
    assert len(warnings) == 1 and "Device or resource busy" in warnings[0]


def test_training_may_change_the_weights_as_soon_as_a_background_save_has_begun(tmp_path, monkeypatch):
    """The thread is held until the weights have changed; the checkpoint has those of the moment of saving."""
    run = Run(tmp_path, background=True)
    go_on = threading.Event()
    real = saver.write_tensors

    def held(*args):
        assert go_on.wait(10)
        real(*args)

    monkeypatch.setattr(saver, "write_tensors", held)
    buffers = set()
    for step in (1, 2):
        go_on.clear()
        run.weights.fill_(step)
        run.save(step)
        run.weights.fill_(-1.0)
        run.saver.poll()
        assert len(run.saved) == step - 1, "heard of a save before it ended"
        go_on.set()
        run.saver._under_way.result()
        run.saver.poll()
        assert run.saved[-1] == f"checkpoint-{step}", "not heard of at the next step"
        buffers.add(run.saver._copies["model.w"].data_ptr())
        assert Reader(tmp_path / f"checkpoint-{step}").tensor("model.w").eq(step).all()
    assert len(buffers) == 1, "host memory is not reused"
    run.saver.finish()


def test_one_background_save_at_a_time(tmp_path):
    run = Run(tmp_path, background=True)
    for step in (1, 2, 3):
        run.save(step)
        assert run.saved == [f"checkpoint-{n}" for n in range(1, step)]
    run.saver.finish()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_who_leaves_after_an_error_lets_a_save_come_to_its_end(tmp_path, monkeypatch):
    run = Run(tmp_path, background=True)
    real = saver.write_tensors
    monkeypatch.setattr(saver, "write_tensors", lambda *args: (time.sleep(0.2), real(*args)))
    run.save(1)
    run.saver.leave()
    assert run.saved == ["checkpoint-1"] and names(tmp_path) == ["checkpoint-1"]


def test_two_processes_fail_and_go_on_together(tmp_path):
    """A fault on process 1 alone fails the save on both, at the same step, and a second one ends both."""
    _, outputs = run(["-m", "tests.checkpoint.saver_worker", str(tmp_path)], world_size=2, timeout=120)
    for output in outputs:
        assert "as expected" in output, output
