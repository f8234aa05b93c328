"""Steps whose numbers went wrong change nothing, on any process of any backend, and the run goes on as if unasked."""

import json
import shutil

import numpy as np
import pytest
import torch

from engine.backends.guard import ENOUGH, WINDOW, Guard
from engine.backends.tensors import Reader
from engine.data.packing import pack
from engine.errors import ModelError
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World
from tests.backends.guard_worker import FAULTS, STEPS, run_with_faults
from tests.backends.moments_worker import compact_run
from tests.backends.parity_worker import settings_for
from tests.checkpoint.small_run import SmallRun
from tests.processes import run
from tests.tiny import AUDIO, CODEBOOKS, random_sample, tiny_model

ALONE = World(0, 0, 1, torch.device("cpu"))
CPU = torch.device("cpu")
CASES = ["fsdp", "zero0", "zero2", "zero3"]
LORA_CASES = ["fsdp-lora", "zero3-lora"]
BF16_CASES = ["zero2-bf16"]
"""DeepSpeed's ZeRO 2 leaves out what is not finite by itself in fp32, in bf16 it does not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes of each case left; every assertion of guard_worker.py has held."""
    folder = tmp_path_factory.mktemp("guard")
    tiny_model().save_pretrained(folder / "model")
    cases = [*CASES, *LORA_CASES, *BF16_CASES]
    run(["-m", "tests.backends.guard_worker", str(folder / "model"), str(folder), *cases], world_size=2)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """case -> the same in this process, and a run that never had the steps that go wrong."""
    return {
        case: [run_with_faults(case, folder / "model", folder, ALONE, faulty) for faulty in (True, False)]
        for case in ("none", "none-lora")
    }


@pytest.mark.parametrize("case", ["none", "none-lora"])
def test_a_skipped_step_is_as_one_that_was_not_planned(case, alone):
    faulty, without = alone[case]
    assert faulty["rows"] == without["rows"] and sorted(faulty["rows"]) == [0, 3, 6]
    assert faulty["counts"] == (len(FAULTS), 0) and without["counts"] == (0, 0)
    assert faulty["last_good"] == pytest.approx(faulty["rows"][STEPS - 1][-1])


@pytest.mark.parametrize("case", [*CASES, *LORA_CASES, *BF16_CASES])
def test_every_backend_skips_the_same_steps(case, folder, alone):
    got = json.loads((folder / f"{case}-world2.json").read_text())
    wanted = alone["none-lora" if "-lora" in case else "none"][0]
    assert got["counts"] == list(wanted["counts"])
    for number, numbers in wanted["rows"].items():
        assert got["rows"][str(number)] == pytest.approx(numbers, rel=5e-2 if "bf16" in case else 1e-5), number


@pytest.mark.parametrize("case", [*CASES, *LORA_CASES, *BF16_CASES])
def test_a_search_names_process_and_module(case, folder):
    """The second micro-batch of the step is the first of the second process."""
    got = json.loads((folder / f"{case}-world2.json").read_text())["found"]
    wanted = {"rank": 1, "round": 0, "module": "model.layers.1.audio_mlp"}
    assert got == {str(number): wanted for number, name in FAULTS.items() if name == "module"}


# ---------------------------------------------------------------- the decision


def judged(guard: Guard, *norms: float) -> list[bool]:
    return [bool(guard.judge(torch.tensor(norm))) for norm in norms]


def test_what_is_not_finite_is_skipped_and_counted():
    guard = Guard(None, CPU)
    assert guard.last_good() is None
    assert judged(guard, torch.nan, 1.0, torch.inf, torch.nan, 1e30) == [True, False, True, True, False]
    assert guard.counts() == (3, 0) and guard.last_good() == pytest.approx(1e30)
    assert judged(guard, torch.nan) == [True] and guard.counts() == (4, 1), "and how many in a row"


def test_the_limit_is_that_of_the_accepted_norms():
    guard, norms = Guard(3.0, CPU), 2 + torch.rand(WINDOW + 50, generator=torch.Generator().manual_seed(0))
    for number, norm in enumerate(norms):
        assert not guard.judge(norm)
        assert bool(guard.limit.isfinite()) == (number >= ENOUGH), "with few norms nothing is a spike"
    guard.judge(torch.tensor(1e3))
    window = norms[-WINDOW:]
    torch.testing.assert_close(guard.limit, window.mean() + 3.0 * window.std(correction=0))
    assert judged(guard, float(guard.limit) * 1.001, float(guard.limit) * 0.999) == [True, False]


def test_a_spike_does_not_raise_the_limit():
    guard = Guard(6.0, CPU)
    judged(guard, *[1.0, 1.1] * 20)
    assert judged(guard, *[50.0] * 10) == [True] * 10


def test_norms_that_hardly_differ_make_no_spike():
    guard = Guard(6.0, CPU)
    judged(guard, *[1.0] * 40)
    assert judged(guard, 1.05, 1.2) == [False, True]


# ---------------------------------------------------------------- what a checkpoint knows of it


def test_a_resumed_run_judges_as_the_straight_one(folder, tmp_path):
    def made() -> SmallRun:
        run = SmallRun("none", folder / "model", tmp_path, ALONE)
        run.engine.backend.guard.sigma = 6.0
        return run

    straight = made()
    judged(straight.engine.backend.guard, *[3.0, 3.3] * 30, torch.nan)
    straight.save(1)
    again = made()
    again.load(tmp_path / "checkpoint-1")
    for guard in (straight.engine.backend.guard, again.engine.backend.guard):
        assert guard.counts() == (1, 1) and judged(guard, 3.4, 4.5) == [False, True]


def test_a_checkpoint_of_before_has_no_guard(folder, tmp_path):
    run = SmallRun("none", folder / "model", tmp_path, ALONE)
    state = run.engine.state()
    guard = state.pop("guard")
    run.saver.save(run.manifest(1), state, run._write_once)
    assert "guard" not in Reader(tmp_path / "checkpoint-1").metadata.state_dict_metadata
    run.engine.load(tmp_path / "checkpoint-1")
    assert not guard.local.any()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_moments_in_few_bits_are_left_alone_too(dtype, folder, tmp_path):
    """And a resume after a skipped step rounds as the straight run did."""
    straight = compact_run(f"none:{dtype}", folder / "model", tmp_path, ALONE)
    straight.step(0)
    before = {key: fragment.local.clone() for key, fragment in straight.engine.state().items() if key != "guard"}
    real = straight.engine.backend.forward
    straight.engine.backend.forward = lambda *inputs: (real(*inputs)[0] * torch.nan, real(*inputs)[1])
    straight.step(1)
    straight.engine.backend.forward = real
    for key, value in before.items():
        assert torch.equal(straight.engine.state()[key].local, value), f"{key} has changed"
    straight.save(2)
    again = compact_run(f"none:{dtype}", folder / "model", tmp_path, ALONE)
    again.load(tmp_path / "checkpoint-2")
    assert [again.step(n) for n in (2, 3)] == [straight.step(n) for n in (2, 3)]


# ---------------------------------------------------------------- what no step could mend


def test_a_model_with_broken_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="not finite, nothing can be trained .* another copy") as error:
        HiggsEngine(settings_for("none", str(tmp_path / "model"), 1), ALONE, WeightFiles(tmp_path / "model"), 1)
    assert error.value.problems == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("given, message", [(1, "1 of 2 micro-batches for a step"), (3, "more than 2 micro-batches")])
def test_a_step_has_as_many_micro_batches_as_were_said(given, message, folder):
    """With fewer FSDP would never put gradients together; with more it would twice."""
    engine = HiggsEngine(settings_for("none", str(folder / "model"), 1), ALONE, WeightFiles(folder / "model"), 2)
    batch = pack([random_sample(np.random.default_rng(0), 5, 9)], AUDIO)
    with pytest.raises(ValueError, match=message):
        engine.accumulate([batch] * given, Targets(1, (1,) * CODEBOOKS))
