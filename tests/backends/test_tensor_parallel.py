"""Tensor parallelism gives the losses, gradients, norms and checkpoints of one process with the whole matrices.

Groups of two processes: one group, and two of them. What is left whole, what is cut and what is frozen is looked at
in the processes themselves (tensor_parallel_worker.py).
"""

import json

import numpy as np
import pytest
import torch

from engine.backends.deepspeed import complete_config
from engine.errors import ConfigError
from engine.export.consolidate import consolidate
from engine.model.cut import axis, require_divisible
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World
from tests.backends.parity_worker import run as parity_run
from tests.backends.parity_worker import settings_for
from tests.backends.tensor_parallel_worker import evaluated
from tests.backends.test_parity import assert_same_run
from tests.checkpoint.anywhere_worker import FIRST, STEPS, perform
from tests.checkpoint.small_run import SmallRun
from tests.processes import ROOT, run
from tests.tiny import tiny_model

ALONE = World(0, 0, 1, torch.device("cpu"))
WORKER = ["-m", "tests.backends.tensor_parallel_worker"]
CASES = ["zero0-tp2", "zero2-tp2-selective", "zero1-bf16-tp2"]
JOBS = ["zero2-tp2", "zero1-tp2<none@1", "fsdp<zero2-tp2@2", "zero1-bf16-tp2<none@1"]
JOBS_OF_FOUR = ["zero1-tp2", "zero0-tp2<zero2-tp2@2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One group of two processes; the yardsticks here, in one process."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tiny_model().save_pretrained(folder / "model")
    np.savez(folder / "none-world1.npz", **parity_run("none", str(folder / "model"), ALONE))
    perform("none", folder / "model", folder, ALONE)
    run([*WORKER, str(folder / "model"), str(folder), *CASES, *JOBS], world_size=2)
    return folder


@pytest.fixture(scope="module")
def folder_of_four(folder):
    """Two groups of two processes."""
    run([*WORKER, str(folder / "model"), str(folder), "look", *JOBS_OF_FOUR], world_size=4)
    perform("none<zero1-tp2@4", folder / "model", folder, ALONE)
    return folder


def losses(folder, name):
    """step -> losses by head and gradient norm."""
    return {int(step): values for step, values in json.loads((folder / name / "losses.json").read_text()).items()}


@pytest.mark.parametrize("case", CASES)
def test_one_group_equals_plain_torch(case, folder):
    got, wanted = (dict(np.load(folder / f"{name}.npz")) for name in (f"{case}-world2", "none-world1"))
    if "bf16" not in case:
        return assert_same_run(got, wanted)
    np.testing.assert_allclose(got["losses"], wanted["losses"], rtol=2e-2)
    np.testing.assert_allclose(got["grad_norms"], wanted["grad_norms"], rtol=2e-2)


@pytest.mark.parametrize("job", JOBS)
def test_checkpoints_go_on_with_and_without_tensor_parallelism(job, folder):
    assert_goes_on(folder, job, 2)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS_OF_FOUR)
def test_two_groups_equal_plain_torch(job, folder_of_four):
    assert_goes_on(folder_of_four, job, 4)


@pytest.mark.slow
def test_a_checkpoint_of_two_groups_goes_on_in_one_process(folder_of_four):
    assert_goes_on(folder_of_four, "none<zero1-tp2@4", 1)


def assert_goes_on(folder, job: str, processes: int) -> None:
    """A job's losses and norms are those of the run in one process, from the start or from its checkpoint on."""
    name = f"@{processes}<".join(job.split("<")) if "<" in job else f"{job}@{processes}"
    got, wanted = losses(folder, name), losses(folder, "none@1")
    assert list(got) == list(range(FIRST if "<" in job else 0, STEPS)) and list(wanted) == list(range(STEPS))
    for step, values in got.items():
        assert values == pytest.approx(wanted[step], rel=2e-2 if "bf16" in job else 1e-5), f"step {step}"


def test_a_checkpoint_is_consolidated(folder):
    """Element by element: a wrong order of the parts would have the right sizes."""
    for name in ("none@1", "zero2-tp2@2"):
        consolidate(folder / name / f"checkpoint-{FIRST}", folder / f"consolidated {name}")
    got, wanted = (WeightFiles(folder / f"consolidated {name}") for name in ("zero2-tp2@2", "none@1"))
    assert set(got.shapes) == set(wanted.shapes)
    for name in wanted.shapes:
        torch.testing.assert_close(got.read(name), wanted.read(name), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_row_is_evaluated_once(folder_of_four, tmp_path):
    wanted = evaluated(SmallRun("none", folder_of_four / "model", tmp_path, ALONE))
    np.testing.assert_allclose(np.load(folder_of_four / "evaluation.npy"), wanted, rtol=1e-5)


def test_a_whisper_encoder_is_left_whole():
    assert axis("whisper.encoder.layers.0.self_attn.q_proj.weight") is None
    assert axis("model.layers.11.audio_mlp.down_proj.weight") == 1


def test_what_cannot_be_cut_is_refused():
    config = tiny_model().config
    require_divisible(config, 2)
    with pytest.raises(ConfigError, match="tensor_parallel_size: 4 does not divide the model's 2 key-value heads → "):
        require_divisible(config, 4)
    with pytest.raises(ConfigError) as caught:
        require_divisible(config, 3)
    assert len(caught.value.problems) == 3


def test_configurations_that_contradict_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2, but stage 3 wants whole matrices → zero1 or zero2"):
        complete_config(settings_for("zero3-tp2", str(ROOT), 2), 2, 1)
    settings = settings_for("zero1-tp2", str(ROOT), 2)
    assert complete_config(settings, 2, 1)["tensor_parallel"]["autotp_size"] == 2
    settings.ds_config = str(tmp_path / "own.json")
    (tmp_path / "own.json").write_text('{"tensor_parallel": {"autotp_size": 2}}')
    with pytest.raises(ConfigError, match="tensor_parallel: the engine sets it itself → remove it, and set"):
        complete_config(settings, 2, 1)
