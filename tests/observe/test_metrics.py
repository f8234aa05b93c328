"""The arithmetic of what is logged, against hand-computed cases."""

import json

import pytest
import torch

from engine.config import Settings
from engine.higgs_engine import StepResult, Targets
from engine.observe.metrics import Meter, MetricsFile, losses
from engine.observe.progress import format_step
from engine.runtime.distributed import World

WORLD = World(0, 0, 1, torch.device("cpu"))


def step_of(sums, eos=(0.0, 0.0), norm=1.5, skipped=0.0) -> StepResult:
    return StepResult(*map(torch.tensor, (sums, eos, norm, skipped, torch.inf)))


def test_losses_are_means_over_targets():
    values = losses([6.0, 10.0, 30.0], 3, [5, 10], Settings(text_loss_weight=0.5, audio_loss_weight=2.0))
    assert values["text_loss"] == 2.0 and values["codebook_losses"] == [2.0, 3.0] and values["audio_loss"] == 2.5
    assert values["loss"] == 0.5 * 2.0 + 2.0 * 2.5


def test_codebook_weights_make_a_weighted_mean():
    assert losses([0.0, 10.0, 30.0], 0, [5, 10], Settings(codebook_weights=[3.0, 1.0]))["audio_loss"] == 2.25


def test_what_has_no_target_has_no_loss():
    values = losses([0.0, 0.0, 0.0], 0, [0, 0], Settings())
    assert values == {"loss": 0.0, "text_loss": None, "audio_loss": None, "codebook_losses": [None, None]}


def test_the_meter_weighs_steps_by_their_targets():
    meter = Meter(Settings(), WORLD, codebooks=2, tokens_seen=100)
    meter.add(step_of([2.0, 4.0, 6.0], eos=[3.0, 2]), Targets(1, (2, 2)), tokens=50, audio_seconds=1.0)
    meter.add(step_of([4.0, 2.0, 0.0], eos=[1.0, 2]), Targets(2, (1, 1)), tokens=30, audio_seconds=2.0)
    values = meter.read()
    assert values["text_loss"] == 2.0 and values["codebook_losses"] == [2.0, 2.0]
    assert values["tokens_seen"] == 180 and values["grad_norm"] == 1.5
    assert values["eos_loss"] == 1.0 and values["eos_targets"] == 4 and values["skipped_since"] == 0
    ratio = values["tokens_per_second"] / values["audio_seconds_per_second"]
    assert ratio == pytest.approx(80 / 3)


def test_a_skipped_step_counts_in_no_mean():
    meter = Meter(Settings(), WORLD, codebooks=2)
    nan = [torch.nan] * 3
    meter.add(step_of([2.0, 4.0, 6.0]), Targets(1, (2, 2)), tokens=50, audio_seconds=1.0)
    meter.add(step_of(nan, nan[:2], torch.nan, skipped=1.0), Targets(7, (9, 9)), tokens=30, audio_seconds=2.0)
    values = meter.read()
    assert values["text_loss"] == 2.0 and values["codebook_losses"] == [2.0, 3.0] and values["eos_loss"] is None
    assert values["grad_norm"] == 1.5, "the last that counted"
    assert values["skipped_since"] == 1 and values["tokens_seen"] == 80, "its data have been passed over"
    assert values["text_targets"] == 1 and values["audio_targets"] == 2
    meter.add(step_of(nan, nan[:2], torch.nan, skipped=1.0), Targets(7, (9, 9)), tokens=30, audio_seconds=2.0)
    values = meter.read()
    assert values["loss"] is values["grad_norm"] is values["text_loss"] is None
    line = format_step(values | {"step": 2, "learning_rate": 1e-5, "skipped_steps": 2}, total_steps=3)
    assert "loss - | text - audio - [- -]" in line and line.endswith("1 skipped (2 in all)")
    json.dumps(values, allow_nan=False)


def test_resuming_drops_lines_after_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "lo')
    MetricsFile(file, resumed_step=2).write({"step": 3, "new": True})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "new": True},
    ]  # fmt: skip
    MetricsFile(file, resumed_step=0)
    assert file.read_text() == ""


def test_the_progress_line_names_everything():
    values = losses([6.0, 10.0, 30.0], 3, [5, 10], Settings()) | {
        "step": 120, "learning_rate": 1.9e-5, "grad_norm": 0.82, "seconds_per_step": 1.5,
        "tokens_per_second": 25310.4, "audio_seconds_per_second": 961.2, "skipped_since": 0, "skipped_steps": 3,
    }  # fmt: skip
    line = format_step(values, total_steps=3000)
    assert line == (
        "step 120/3000 | loss 4.5000 | text 2.000 audio 2.500 [2.00 3.00] | lr 1.90e-05 | gnorm 0.820 | "
        "25,310 tok/s | 961 audio-s/s | eta 1h12m00s"
    )
