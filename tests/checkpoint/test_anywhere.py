"""A checkpoint goes on at another number of processes and on another backend, with weights and optimizer state.

Each continuation is compared with the run that was never interrupted; that all elements of weights and moments have
arrived is asserted in the processes themselves (SmallRun.load).
"""

import json

import pytest
import torch

from engine.runtime.distributed import World
from tests.checkpoint.anywhere_worker import FIRST, STEPS
from tests.checkpoint.small_run import SmallRun
from tests.processes import run
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow

# (processes, what they run), in this order
LAUNCHES = [
    (2, ["fsdp", "zero1", "zero2", "zero3", "fsdp-lora", "zero3-lora",
         "zero0<fsdp@2", "fsdp<zero2@2", "zero1<zero3@2", "zero3<zero2@2", "zero2_offload<zero1@2", "zero3<zero3@2",
         "zero3_hpz<zero3@2",
         "fsdp-lora<zero3-lora@2"]),
    (1, ["none", "zero2", "zero3<fsdp@2", "zero2<zero2@2", "fsdp<zero3@2", "none<zero1@2", "none-lora",
         "none-lora<fsdp-lora@2"]),
    (3, ["fsdp<fsdp@2", "zero3<zero3@2", "zero2<zero2@2", "zero3<zero2@1", "zero3_offload<fsdp@2",
         "zero2-lora<zero3-lora@2"]),
    (2, ["fsdp<none@1", "zero1<zero2@1", "zero3<none@1", "zero3-lora<none-lora@1"]),
]  # fmt: skip
CONTINUED = ["@{1}<".join(job.split("<")).format(0, world) for world, jobs in LAUNCHES for job in jobs if "<" in job]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anywhere")
    tiny_model().save_pretrained(folder / "model")
    for world, jobs in LAUNCHES:
        run(["-m", "tests.checkpoint.anywhere_worker", str(folder / "model"), str(folder), *jobs], world_size=world)
    return folder


def losses(folder, name):
    """step -> losses by head and gradient norm."""
    return {int(step): values for step, values in json.loads((folder / name / "losses.json").read_text()).items()}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_run_goes_on_as_if_uninterrupted(name, folder):
    got, wanted = losses(folder, name), losses(folder, "none-lora@1" if "-lora" in name else "none@1")
    assert list(got) == list(range(FIRST, STEPS)) and list(wanted) == list(range(STEPS))
    for step, values in got.items():
        assert values == pytest.approx(wanted[step], rel=1e-5), f"step {step}"


def test_the_comparison_would_see_a_lost_optimizer(folder, tmp_path):
    alone = SmallRun("none", folder / "model", tmp_path, World(0, 0, 1, torch.device("cpu")))
    step = alone.load(folder / "none@1" / f"checkpoint-{FIRST}")
    for key, fragment in alone.engine.state().items():
        if key.startswith("exp_avg."):
            fragment.local.zero_()
    alone.step(step)
    assert alone.step(step + 1) != pytest.approx(losses(folder, "none@1")[step + 1], rel=1e-4)
