"""The report of skipped steps: what it says of each, when the run ends, and a whole run of two processes."""

import json

import pytest
import torch

from engine.data.batches import Step
from engine.errors import Diverged
from engine.exit_codes import DIVERGED
from engine.higgs_engine import StepResult
from engine.observe.skipped import FILE, SEARCHES, Skipped, SkippedSteps, describe
from tests.checkpoint.test_resume import command, lines
from tests.processes import run


class Named:
    def names(self, samples):
        return [f"row {i}" for i in samples]


def taken(steps: SkippedSteps, first: int, *norms: float, limit: float = torch.inf) -> None:
    """Steps one after the other; None: one that counts."""
    for number, norm in enumerate(norms, start=first):
        values = (0.0, 0.0, 1.0 if norm is None else norm, float(norm is not None), limit)
        result = StepResult(*map(torch.tensor, values))
        steps.add(Step(number, 0, ((number, 7), (3,))), 1e-3, result)


def test_the_record_of_a_step(tmp_path):
    steps = SkippedSteps(10, tmp_path / FILE)
    taken(steps, 4, torch.nan, None, 50.0, limit=9.5)
    first, spike = steps.read()
    found = {"rank": 1, "module": "model.layers.3.mlp", "micro_batch": 1, "samples": ["row 4", "row 7"]}
    records = [first.record(Named(), found), spike.record(Named(), None)]
    steps.write(records)
    assert [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()] == records
    assert records[0] == {
        "step": 5, "epoch": 0, "reason": "loss or gradient not finite", "grad_norm": None, "limit": 9.5,
        "learning_rate": 1e-3, "micro_batches": [["row 4", "row 7"], ["row 3"]], "found": found,
    }  # fmt: skip
    assert records[1]["step"] == 7 and records[1]["reason"] == "spike of the gradient norm"
    assert (records[1]["grad_norm"], records[1]["limit"]) == (50.0, 9.5)
    where = "first in: model.layers.3.mlp, row 4, row 7"
    assert describe(records[0]) == f"step 5: skipped, loss or gradient not finite ({where})"
    assert describe(records[1]) == "step 7: skipped, the gradient norm 50 is above 9.5 (skip_spikes_sigma)"
    assert steps.read() == [], "told once"


def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path):
    (tmp_path / FILE).write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "re')
    SkippedSteps(10, tmp_path / FILE, resumed_step=2)
    assert [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_the_run_ends_after_so_many_in_a_row():
    """Counted beyond logged steps, and also if a good step follows before the next of these."""
    steps = SkippedSteps(3, None)
    taken(steps, 0, torch.nan, torch.nan, None, torch.nan, torch.inf)
    steps.read()
    steps.require_progress(0.8)
    taken(steps, 5, torch.nan, None)
    steps.read()
    with pytest.raises(
        Diverged, match=r"step 6: 3 step\(s\) in a row .* last good gradient norm was 0.8 .* →"
    ) as error:
        steps.require_progress(0.8)
    assert error.value.code == DIVERGED and error.value.problems == []
    with pytest.raises(Diverged, match="no step before was good"):
        steps.require_progress(None)


def test_a_row_of_spikes_names_their_setting():
    steps = SkippedSteps(1, None)
    taken(steps, 0, 50.0, limit=9.0)
    steps.read()
    with pytest.raises(Diverged, match="a higher skip_spikes_sigma lets them through"):
        steps.require_progress(1.0)


def test_few_steps_are_searched():
    steps = SkippedSteps(10, None)
    spike, bad = (Skipped(Step(0, 0, ()), 1e-3, norm, 9.0) for norm in (50.0, torch.nan))
    assert [steps.searches(s) for s in (spike, bad, bad, bad, bad)] == [False] + [True] * SEARCHES + [False]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_report_a_diverged_run(stage, demo, tmp_path):
    """A learning rate that throws the weights beyond fp32: the gradients of the steps after the first are not finite.

    DeepSpeed leaves such a step out by itself, and says so in the norm.
    """
    arguments = command(demo, tmp_path / "out", "--ds_config", stage, "--learning_rate", "1e30")
    arguments += ["--max_skipped_steps", "2", "--save_steps", "1"]
    codes, outputs = run(arguments, world_size=2, check=False)
    assert codes == [DIVERGED] * 2, outputs
    assert "step 3: 2 step(s) in a row were skipped" in "".join(outputs)
    report = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()]
    assert [record["step"] for record in report] == [2, 3]
    for record in report:
        assert record["found"]["module"].startswith("model.") and record["micro_batches"][0][0].startswith("row ")
    logged = lines(tmp_path / "out")
    assert [(line["loss"] is None, line["skipped_steps"]) for line in logged] == [(False, 0), (True, 1), (True, 2)]
    saved = {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")}
    assert saved == {"checkpoint-1", "checkpoint-2"}
