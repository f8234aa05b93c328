"""ZeRO++ keeps a second copy of the weights in each node: it is dropped when a checkpoint changes the first one.

Four processes in two "nodes" of two. No weight is small enough to be kept whole, so every layer is gathered, from
the other node or from its own.
"""

import json

import pytest
import torch

from engine.backends.deepspeed import complete_config
from engine.errors import ConfigError
from engine.runtime.distributed import World
from tests.backends.parity_worker import settings_for
from tests.checkpoint.anywhere_worker import FIRST, STEPS
from tests.checkpoint.small_run import SmallRun
from tests.processes import ROOT, run
from tests.tiny import tiny_model


def test_nodes_of_different_sizes_are_refused():
    settings = settings_for("zero3_hpz", str(ROOT), 2)
    assert complete_config(settings, 2, 1) and complete_config(settings, 16, 1)
    with pytest.raises(ConfigError, match="zero_hpz_partition_size: 8 does not divide 12 processes → "):
        complete_config(settings, 12, 1)


@pytest.mark.slow
def test_a_run_with_a_copy_in_each_node_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    config = json.loads((ROOT / "ds_configs" / "zero3_hpz.json").read_text())
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 8
    config["zero_optimization"] |= {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3_nodes.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)  # where `ds_config: zero3_nodes` is looked for
    tiny_model().save_pretrained(tmp_path / "model")
    jobs = ["zero3_nodes", "zero3_nodes<zero3_nodes@4"]
    run(["-m", "tests.checkpoint.anywhere_worker", str(tmp_path / "model"), str(tmp_path), *jobs], world_size=4)

    alone = SmallRun("none", tmp_path / "model", tmp_path, World(0, 0, 1, torch.device("cpu")))
    wanted = [alone.step(number) for number in range(STEPS)]
    for job, first in zip([f"{jobs[0]}@4", "zero3_nodes@4<zero3_nodes@4"], (0, FIRST), strict=True):
        losses = json.loads((tmp_path / job / "losses.json").read_text())
        assert [int(step) for step in losses] == list(range(first, STEPS))
        for step, values in losses.items():
            assert values == pytest.approx(wanted[int(step)], rel=1e-5), f"{job}, step {step}"
