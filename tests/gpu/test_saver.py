"""Saving behind the training from a GPU: pinned host memory, and weights that may change at once."""

import pytest
import torch

from engine.backends.tensors import Fragment, Reader
from engine.checkpoint.saver import Saver
from engine.runtime.distributed import World
from tests.checkpoint.test_lifecycle import manifest, silent, write_once

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_snapshot_is_of_the_moment_and_its_memory_is_pinned_and_reused(tmp_path):
    world = World(0, 0, 1, torch.device("cuda", 0))
    saver = Saver(tmp_path, world, limit=None, keep_every=None, background=True, say=silent)
    weights = torch.empty(50_000_000, device="cuda")
    buffers = set()
    for step in (1, 2):
        weights.fill_(step)
        state = {"model.w": Fragment.whole(weights), "step": Fragment.whole(torch.tensor(float(step)))}
        saver.save(manifest(step, shapes={"w": [len(weights)]}), state, write_once)
        weights.fill_(-1)
        saver.wait()
        buffers.add(saver._copies["model.w"].data_ptr())
        assert saver._copies["model.w"].is_pinned()
        assert Reader(tmp_path / f"checkpoint-{step}").tensor("model.w").eq(step).all()
    saver.finish()
    assert len(buffers) == 1
