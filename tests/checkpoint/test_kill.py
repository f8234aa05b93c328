"""kill -9 at any moment of a save, of a pruning, of a consolidation, and of two processes of each backend at work."""

import pytest
import torch

from engine.runtime.distributed import World
from tests.checkpoint.small_run import SmallRun
from tests.processes import run
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


def moments(*arguments: str) -> int:
    """Runs a worker that makes its own assertions; how many moments it tried."""
    _, outputs = run(["-m", *arguments], world_size=1, timeout=300)
    return int(outputs[0].split()[-2])


def test_every_moment_of_a_save_and_of_its_pruning(tmp_path):
    assert moments("tests.checkpoint.kill_worker", "save", str(tmp_path)) >= 30


def test_every_moment_of_a_consolidation(model, tmp_path):
    small = SmallRun("none", model, tmp_path, World(0, 0, 1, torch.device("cpu")))
    small.step(0)
    checkpoint = small.save(1)
    assert moments("tests.checkpoint.kill_worker", "consolidate", str(tmp_path), str(checkpoint)) >= 20


@pytest.mark.parametrize("case", ["fsdp-lora", "zero2"])
def test_two_processes_go_on_from_the_newest_complete_checkpoint_with_the_same_bits(case, model, tmp_path):
    assert moments("tests.checkpoint.kill_ranks_worker", str(model), str(tmp_path), case) >= 10
