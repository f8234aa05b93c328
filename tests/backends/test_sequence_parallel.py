"""Rows that two processes share are trained as one process trains them: losses, gradients, a run and its resume."""

import shutil

import numpy as np
import pytest
import torch

from engine.cli import main
from engine.config import Settings
from engine.errors import ConfigError
from engine.higgs_engine import HiggsEngine
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World
from tests.backends.test_parity import assert_same_run
from tests.checkpoint.test_resume import command, evaluations, trajectory
from tests.commands import LAUNCHER
from tests.model.whisper_tiny import save_whisper
from tests.processes import run
from tests.tiny import tiny_model

CASES = {
    "fsdp-sp2-whisper-tower-brief": "none-whisper-tower-brief",
    "fsdp-hybrid-sp2-selective-brief": "none-brief",
    "zero1-sp2-brief": "none-brief",
    "zero2-sp2-brief": "none-brief",
    "zero3-sp2-selective-lora-brief": "none-lora-brief",
}
"""Each beside the run of one process that it has to equal. Unless selective, all of a layer is computed again."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """case -> arrays of that run."""
    folder = tmp_path_factory.mktemp("pieces")
    tiny_model().save_pretrained(folder / "model")
    save_whisper(folder / "whisper")
    worker = ["-m", "tests.backends.parity_worker", str(folder / "model"), str(folder)]
    run([*worker, *set(CASES.values())], world_size=1)
    run([*worker, *CASES], world_size=2)
    return lambda case: dict(np.load(folder / f"{case}-world{1 if case in CASES.values() else 2}.npz"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_pieces_equal_one_with_rows(case, results):
    """Rows of odd lengths, some of text or of audio only, so that pieces lack one of them, or any target."""
    assert_same_run(results(case), results(CASES[case]))


def test_the_processes_did_exchange(results):
    """Two layers, four rows: two exchanges forward, two again in the recomputation, two backward."""
    exchanges = {case: int(results(case)["collectives of a step: alltoall_base"]) for case in CASES}
    assert set(exchanges.values()) == {4 * 2 * (2 + 2 + 2)}, exchanges


def test_a_run_goes_on_without_pieces(demo, tmp_path, monkeypatch):
    """Two processes that share rows, then one from their checkpoint: the losses of one process all the way."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    options = ["--backend", "fsdp", "--validation_split", "0.2", "--eval_steps", "2"]
    alone, shared, resumed = (tmp_path / name for name in ("alone", "shared", "resumed"))
    assert main(command(demo, alone, *options)[2:]) == 0
    _, outputs = run(command(demo, shared, *options, "--sequence_parallel_size", "2"), world_size=2)
    assert "sequence_parallel_size: 2 processes share each row" in outputs[0]
    resumed.mkdir()
    shutil.copytree(shared / "checkpoint-3", resumed / "checkpoint-3")
    assert main([*command(demo, resumed, *options)[2:], "--resume", "auto"]) == 0
    for what in (trajectory, evaluations):
        wanted, continued = what(alone), what(resumed)
        assert len(wanted) == (6 if what is trajectory else 3) and len(continued) == len(wanted) // 2 + (
            what is evaluations
        )
        for found in (what(shared), continued):
            for step, values in found.items():
                assert values == pytest.approx(wanted[step], rel=1e-4), f"step {step}"


def test_heads_that_cannot_be_shared_are_a_mistake(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    settings = Settings(model_path=str(tmp_path), backend="fsdp", sequence_parallel_size=4).with_resolved(
        4, has_gpu=False
    )
    with pytest.raises(
        ConfigError, match="sequence_parallel_size: 4 does not divide the model's 2 key-value heads → one of 1, 2"
    ):
        HiggsEngine(settings, World(0, 0, 4, torch.device("cpu")), WeightFiles(tmp_path), rounds=1)
