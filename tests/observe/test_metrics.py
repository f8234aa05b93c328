"""The arithmetic of what is logged, against hand-computed cases."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import HiggsAudioV2Config

from engine.config import Settings
from engine.higgs_engine import StepResult, Targets
from engine.model.flops import step_flops
from engine.observe import journal, metrics
from engine.observe.metrics import Meter, MetricsFile, head_metrics
from engine.observe.schema import BESIDE, BY_NAME, METRICS, scalars
from engine.runtime.distributed import World
from engine.step_size import StepSize

WORLD = World(0, 0, 1, torch.device("cpu"))
CONFIG = HiggsAudioV2Config(
    num_codebooks=2, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
NOTHING = StepSize(Targets(0, (0, 0)))


def meter(settings: Settings | None = None, seen: StepSize = NOTHING, world: World = WORLD) -> Meter:
    return Meter(settings or Settings(), world, CONFIG, recomputed=False, seen=seen, total_steps=12)


def step_of(losses, right=(0.0, 0.0, 0.0), eos=(0.0, 0.0, 0.0), norm=1.5, skipped=0.0, positions=100) -> StepResult:
    """Tallies of text and two codebooks; the numbers of targets there are not looked at."""
    tallies = torch.tensor([*([loss, hit, 0.0] for loss, hit in zip(losses, right, strict=True)), list(eos)])
    return StepResult(tallies, positions, *map(torch.tensor, (norm, skipped, torch.inf)))


def size_of(text: int, book: int, tokens: int = 50, frames: int = 25, squares: int = 0, rows: int = 0) -> StepSize:
    return StepSize(Targets(text, (book, book)), tokens, squares, frames, rows)


def heads(losses, right, targets: Targets, eos=(0.0, 0.0, 0.0), **settings) -> dict:
    tallies = [[loss, hit, 0.0] for loss, hit in zip(losses, right, strict=True)]
    return head_metrics([*tallies, list(eos)], targets, Settings(**settings))


def test_losses_and_accuracies_are_means_over_targets():
    values = heads(
        [6.0, 10.0, 30.0], [1.0, 4.0, 5.0], Targets(4, (5, 10)), eos=(3.0, 1.0, 2.0),
        text_loss_weight=0.5, audio_loss_weight=2.0,
    )  # fmt: skip
    assert values["text_loss"] == 1.5 and values["codebook_losses"] == [2.0, 3.0] and values["audio_loss"] == 2.5
    assert values["loss"] == 0.5 * 1.5 + 2.0 * 2.5
    assert values["text_accuracy"] == 0.25 and values["codebook_accuracies"] == [0.8, 0.5]
    assert values["audio_accuracy"] == pytest.approx(0.65)
    assert values["eos_loss"] == 1.5 and values["eos_accuracy"] == 0.5 and values["eos_targets"] == 2


def test_codebook_weights_make_weighted_means():
    values = heads([0.0, 10.0, 30.0], [0.0, 5.0, 0.0], Targets(0, (5, 10)), codebook_weights=[3.0, 1.0])
    assert values["audio_loss"] == 2.25 and values["audio_accuracy"] == 0.75


def test_what_has_no_target_has_no_loss():
    values = heads([0.0] * 3, [0.0] * 3, Targets(0, (0, 0)))
    assert values.pop("loss") == 0.0 and values.pop("eos_targets") == 0
    assert values.pop("codebook_losses") == values.pop("codebook_accuracies") == [None, None]
    assert set(values.values()) == {None} and len(values) == 6


def test_the_meter_weighs_steps_by_their_targets():
    counted = meter(seen=size_of(0, 0, tokens=100, frames=90_000 - 60))
    counted.add(step_of([2.0, 4.0, 6.0], (1.0, 1.0, 0.0), (3.0, 1.0, 2.0)), size_of(1, 2, frames=25))
    counted.add(step_of([4.0, 2.0, 0.0], (1.0, 2.0, 0.0), (1.0, 1.0, 2.0), norm=0.5), size_of(2, 1, 30, frames=35))
    assert counted.steps == 2 and counted.tokens_seen == 180
    values = counted.read(step=2)
    assert values["text_loss"] == 2.0 and values["codebook_losses"] == [2.0, 2.0]
    assert values["text_accuracy"] == pytest.approx(2 / 3) and values["codebook_accuracies"] == [1.0, 0.0]
    assert values["eos_loss"] == 1.0 and values["eos_accuracy"] == 0.5 and values["eos_targets"] == 4
    assert values["grad_norm"] == 0.5 and values["skipped_since"] == 0
    assert values["tokens_seen"] == 180 and values["audio_hours_seen"] == 1.0, "90,000 frames at 25 a second"
    assert values["padding_share"] == pytest.approx(1 - 80 / 200)
    assert counted.steps == 0


def test_a_skipped_step_counts_in_no_mean():
    counted, nan = meter(), [torch.nan] * 3
    counted.add(step_of([2.0, 4.0, 6.0]), size_of(1, 2))
    counted.add(step_of(nan, nan, nan, torch.nan, skipped=1.0), size_of(7, 9, tokens=30))
    values = counted.read(step=2)
    assert values["text_loss"] == 2.0 and values["codebook_losses"] == [2.0, 3.0] and values["eos_loss"] is None
    assert values["grad_norm"] == 1.5, "the last that counted"
    assert values["skipped_since"] == 1 and values["tokens_seen"] == 80, "its data have been passed over"
    assert values["text_targets"] == 1 and values["audio_targets"] == 2
    counted.add(step_of(nan, nan, nan, torch.nan, skipped=1.0), size_of(7, 9, tokens=30))
    values = counted.read(step=3)
    assert values["loss"] is values["grad_norm"] is values["text_loss"] is values["text_accuracy"] is None
    json.dumps(values, allow_nan=False)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_rates_are_of_the_time_of_steps(clock):
    """Ten seconds, four of them an evaluation (one of these a hook that pauses by itself): two steps of three seconds;
    but what is left takes all of it."""
    two = World(0, 0, 1, torch.device("cpu"))
    counted = meter(world=two)
    for _ in range(2):
        counted.add(step_of([0.0] * 3), size_of(1, 1, tokens=300, frames=150))
        clock[0] += 3
    with counted.paused():
        clock[0] += 3
        with counted.paused():
            clock[0] += 1
    values = counted.read(step=2)
    assert values["seconds_per_step"] == 3 and values["eta_seconds"] == 10 * 5
    assert values["tokens_per_second"] == values["tokens_per_second_per_gpu"] == 100
    assert values["audio_seconds_per_second"] == 150 * 2 / 25 / 6


@pytest.mark.parametrize("processes", [1, 4])
def test_processes_add_up_and_have_one_clock(clock, monkeypatch, processes):
    """So many that all do the same: a quarter each of 800 tokens in 2 seconds."""
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda sums: sums.mul_(processes))
    counted = meter(world=World(0, 0, processes, torch.device("cpu")))
    size = size_of(processes, 2 * processes, tokens=800, frames=100)
    counted.add(step_of([2.0, 4.0, 6.0], positions=1000 // processes), size)
    clock[0] += 2
    values = counted.read(step=1)
    assert values["seconds_per_step"] == 2 and values["eta_seconds"] == 2 * 11
    assert values["tokens_per_second"] == 400 and values["tokens_per_second_per_gpu"] == 400 / processes
    assert values["audio_seconds_per_second"] == 2 and values["audio_seconds_per_second_per_gpu"] == 2 / processes
    assert values["text_loss"] == 2.0 and values["codebook_losses"] == [2.0, 3.0]
    assert values["padding_share"] == pytest.approx(0.2)


def test_flops_utilisation_by_hand():
    """Two samples, of 10 and 20 positions. Active parameters of a position: see test_flops; here the plumbing."""
    counted = meter()
    counted._peak = 1e9
    size = size_of(7, 25, tokens=30, squares=10**2 + 20**2, rows=26)
    flops = step_flops(CONFIG, [10, 20], 7, 26)
    values = counted._rates(size, seconds=2.0)
    assert values["tflops_per_gpu"] == flops / 2 / 1e12 and values["mfu"] == flops / 2 / 1e9 == values["hfu"]
    counted.recomputed = True
    values = counted._rates(size, seconds=2.0)
    twice_forward = step_flops(CONFIG, [10, 20], 7, 26, recomputed=True)
    assert values["mfu"] == flops / 2 / 1e9 < values["hfu"] == twice_forward / 2 / 1e9


def test_flops_of_adapters_and_of_frozen_parts():
    counted = meter(Settings(use_lora=True, lora_rank=4, lora_target_modules=["q_proj"]))
    q = 4 * (64 + 4 * 16) * 2
    values = counted._rates(size_of(7, 25, tokens=30, squares=500, rows=26), seconds=1.0)
    assert values["tflops_per_gpu"] * 1e12 == pytest.approx(step_flops(CONFIG, [10, 20], 7, 26, adapters=q))
    assert values["mfu"] is None, "of what peak, on a CPU?"
    values = meter(Settings(freeze_llm=True))._rates(size_of(7, 25), seconds=1.0)
    assert values["tflops_per_gpu"] is values["mfu"] is values["hfu"] is None


def test_a_step_is_as_large_as_its_samples():
    """Three samples, the second has no audio target, the third is left out."""
    import numpy as np

    data = SimpleNamespace(
        lengths=np.array([10, 20, 99], np.int32), audio_targets=np.array([6, 0, 9], np.int32),
        text_targets=np.array([1, 3, 9], np.int32), audio_frames=np.array([13, 4, 9], np.int32), codebooks=8,
    )  # fmt: skip
    size = StepSize.of_samples(data, np.array([0, 1]))
    assert size.targets == Targets(4, (6,) * 8) and size.tokens == 30 and size.squares == 500
    assert size.audio_frames == 17 and size.audio_rows == 6 + 7, "the last codebook is 7 frames late"


def test_every_metric_is_described_once():
    counted = meter()
    counted.add(step_of([2.0, 4.0, 6.0]), size_of(1, 2))
    found = counted.read(step=1).keys() | {"step", "epoch", "learning_rate", "skipped_steps"}
    of_shares = {"data_share", "communication_share", "memory_gib", "memory_peak_gib"}
    assert found - set(BESIDE) == BY_NAME.keys() - of_shares
    assert len(BY_NAME) == len(METRICS)


def test_trackers_are_told_every_number_under_its_group():
    record = {"step": 3, "loss": 1.5, "codebook_losses": [2.0, None], "mfu": None, "eval_loss": 4.0, "mine": 7,
              "eos_targets": 9, "alarm": ["!"]}  # fmt: skip
    expected = {"loss/loss": 1.5, "loss/codebook_losses/0": 2.0, "eval_loss/loss": 4.0, "other/mine": 7}
    assert dict(scalars(record)) == expected


def run_in(folder) -> SimpleNamespace:
    return SimpleNamespace(output_dir=folder, world=WORLD, say=print)


def test_a_full_disk_loses_no_line_and_ends_no_run(tmp_path, monkeypatch):
    lines, said, really = MetricsFile(), [], journal.add
    run = SimpleNamespace(output_dir=tmp_path, world=WORLD, say=said.append)
    lines.on_start(run, 0)

    def full(file, lines):
        file.write_text('{"step": 1, "lo')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "add", full)
    lines.on_log(run, 1, {"step": 1, "loss": 2.0})
    assert len(said) == 1 and "metrics.jsonl could not be written, its lines wait" in said[0] and "No space" in said[0]
    monkeypatch.setattr(journal, "add", really)
    lines.on_evaluate(run, 1, {"step": 1, "loss": 3.0})
    lines.on_log(run, 2, {"step": 2})
    told = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2}]
    assert journal.read(tmp_path / "metrics.jsonl") == told


def test_resuming_drops_lines_after_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4)) + '{"step": 5, "lo')
    lines = MetricsFile()
    lines.on_start(run_in(tmp_path), 2)
    lines.on_log(None, 3, {"step": 3, "new": True})
    lines.on_evaluate(None, 3, {"step": 3, "loss": math.pi, "alarm": ["odd"]})
    expected = [{"step": 1}, {"step": 2}, {"step": 3, "new": True}, {"step": 3, "eval_loss": math.pi, "alarm": ["odd"]}]
    assert journal.read(file) == expected
    MetricsFile().on_start(run_in(tmp_path), 0)
    assert file.read_text() == ""
