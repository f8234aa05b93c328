"""Kills a process at every moment of a save that also prunes, or of a consolidation, one after the other.

kill_worker.py save|consolidate FOLDER [CHECKPOINT]       prints how many moments there were

Each moment has a fresh fork, so that a hundred of them take seconds. After each kill the world must be in order:
nothing incomplete has a final name, the newest complete checkpoint is found, and the next attempt leaves no trace of
the one that was killed.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint.lifecycle import checkpoints, find, pointer
from engine.checkpoint.manifest import content_problems, read_manifest
from engine.export.consolidate import consolidate
from engine.model.weights import WeightFiles
from tests.checkpoint.killing import Trap
from tests.checkpoint.test_lifecycle import WORLD, silent, write


def forked(action: Callable[[], object]) -> bool:
    """Runs it in a child; whether it was killed."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the child failed: {status}"
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def saves(folder: Path) -> int:
    """Checkpoints 1 and 2 stand there; 3 is saved and 1 goes for it."""
    out = folder / "out"
    trap = Trap(out)
    moment = 0
    while True:
        moment += 1
        shutil.rmtree(out, ignore_errors=True)
        for step in (1, 2):
            write(out, step, keep=2)
        killed = forked(lambda at=moment: (trap.arm(at), write(out, 3, keep=2)))
        complete = checkpoints(out)
        for checkpoint in complete:
            assert not content_problems(checkpoint, read_manifest(checkpoint)), f"moment {moment}: {checkpoint}"
        names = [checkpoint.name for checkpoint in complete]
        assert "checkpoint-2" in names, f"moment {moment}: {names}"
        assert (out / pointer(out, "latest")).is_dir(), f"moment {moment}: latest names nothing"
        assert find("auto", out, WORLD, silent) == complete[-1]
        if not killed:
            assert names == ["checkpoint-2", "checkpoint-3"]
            return moment - 1
        write(out, 4, keep=2)
        assert [checkpoint.name for checkpoint in checkpoints(out)][-1] == "checkpoint-4"
        assert len(checkpoints(out)) == 2 and not list(out.glob(".*")), f"moment {moment}: something is left"


def consolidations(folder: Path, checkpoint: Path) -> int:
    """A model of an earlier consolidation stands there and is replaced."""
    out = folder / "out" / "model"
    wanted = sorted(p.name for p in consolidated(checkpoint, folder / "wanted").iterdir())
    trap = Trap(out.parent)
    moment = 0
    while True:
        moment += 1
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        shutil.copytree(folder / "wanted", out)
        killed = forked(lambda at=moment: (trap.arm(at), consolidate(checkpoint, out, say=silent)))
        if out.exists():
            assert sorted(p.name for p in out.iterdir()) == wanted, f"moment {moment}: half a model"
            files = WeightFiles(out)
            assert all(torch.isfinite(files.read(name)).all() for name in files.shapes)
        if not killed:
            return moment - 1
        consolidated(checkpoint, out)
        assert sorted(p.name for p in out.iterdir()) == wanted
        assert not list(out.parent.glob(".*")), f"moment {moment}: something is left"


def consolidated(checkpoint: Path, out: Path) -> Path:
    consolidate(checkpoint, out, say=silent)
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, *rest = sys.argv[1:]
    print(saves(Path(where)) if what == "save" else consolidations(Path(where), Path(rest[0])), "moments")
