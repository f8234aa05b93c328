"""Trackers are told what metrics.jsonl is told, go on where a run goes on, and never stop or stall it.

TensorBoard's files are read back. The others are run for real where they are installed (pip install
'higgs-engine[trackers]'); everywhere, what we call of them is recorded.
"""

import json
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config import Settings
from engine.errors import ConfigError
from engine.exit_codes import DONE, FAILED, STOPPED
from engine.observe import journal
from engine.observe.schema import scalars
from engine.observe.trackers import Trackers, background, problems
from engine.observe.trackers.background import Background
from engine.observe.trackers.rounds import caption, curves, recordings
from engine.observe.trackers.tracker import NullTracker
from engine.runtime.distributed import World
from tests.commands import done

RATE = 16000
SAMPLE = {
    "step": 2, "prompt": 0, "name": "anna", "text": "Hello there.", "file": "samples/step-000002/00.wav",
    "reference": "samples/prompts/00-reference.wav", "target": None, "stopped": True, "frames": 25, "seconds": 1.0,
    "target_seconds": 1.2, "generation_seconds": 2.0, "real_time_factor": 2.0, "error": None,
    "scores": {"wer": 0.5, "word_errors": 1, "words": 2, "speaker_similarity": 0.8},
}  # fmt: skip
FAILED_SAMPLE = SAMPLE | {"prompt": 1, "file": None, "reference": None, "stopped": None, "seconds": None, "error": "oh"}


class Run:
    """As much of engine.train.Run as trackers use, with a round of samples in its folder."""

    def __init__(self, output_dir: Path, rank: int = 0):
        self.output_dir, self.world, self.said = output_dir, World(rank, rank, 1, torch.device("cpu")), []
        for name in (SAMPLE["file"], SAMPLE["reference"]):
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(output_dir / name, np.sin(np.arange(RATE) / 10) / 2, RATE)

    def say(self, line: str) -> None:
        self.said.append(line)

    def trackers(self, *names: str, **settings) -> Trackers:
        return Trackers(Settings(report_to=list(names), output_dir=str(self.output_dir), **settings), self.world)

    def go(self, trackers: Trackers, start: int, stop: int, code: int = DONE, scale: float = 1.0) -> None:
        """Steps after `start` up to `stop`, the second of them with an evaluation and samples."""
        trackers.on_start(self, start)
        for step in range(start + 1, stop + 1):
            trackers.on_log(
                self, step, {"step": step, "loss": scale * step, "codebook_losses": [5.0, None], "mfu": None}
            )
            if step == start + 2:
                trackers.on_evaluate(self, step, {"step": step, "loss": scale * 100})
                trackers.on_sample(self, step, [SAMPLE, FAILED_SAMPLE])
        trackers.on_end(self, stop, code)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), {"scalars": 0, "audio": 0, "tensors": 0}).Reload()


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


# --- TensorBoard, read back


def test_tensorboard_has_curves_settings_and_sound(tmp_path):
    run = Run(tmp_path)
    run.go(run.trackers("tensorboard", learning_rate=3e-4), 0, 3)
    found = events(tmp_path / "tensorboard")
    assert points(found, "loss/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert points(found, "loss/codebook_losses/0") == [(1, 5.0), (2, 5.0), (3, 5.0)]
    assert points(found, "eval_loss/loss") == [(2, 100.0)] and points(found, "samples/wer") == [(2, 0.5)]
    assert not {"loss/codebook_losses/1", "throughput/mfu"} & set(found.Tags()["scalars"]), "not known, not told"
    [generated], [reference] = found.Audio("samples/00/generated"), found.Audio("samples/00/reference")
    assert (generated.step, generated.sample_rate, generated.length_frames) == (2, RATE, RATE)
    assert generated.encoded_audio_string[:4] == b"RIFF" and reference.step == 2
    [text] = found.Tensors("samples/00/generated/text/text_summary")
    assert text.tensor_proto.string_val[0].decode() == caption(SAMPLE)
    [settings] = found.Tensors("settings/text_summary")
    assert b"learning_rate: 0.0003" in settings.tensor_proto.string_val[0]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(found.summary_metadata)
    assert run.said == [f"tracker: tensorboard --logdir {tmp_path / 'tensorboard'}"]


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path):
    run = Run(tmp_path)
    run.go(run.trackers("tensorboard"), 0, 5, STOPPED)
    run.go(run.trackers("tensorboard"), 3, 6, scale=10.0)
    wanted = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert points(events(tmp_path / "tensorboard"), "loss/loss") == wanted
    run.go(run.trackers("tensorboard"), 0, 1, scale=7.0)
    assert points(events(tmp_path / "tensorboard"), "loss/loss") == [(1, 7.0)], "another run in the same folder"


def test_runs_that_share_a_logging_dir_stay_apart(tmp_path):
    logs = tmp_path / "logs"
    first, second = Run(tmp_path / "first"), Run(tmp_path / "second")
    first.go(first.trackers("tensorboard", logging_dir=str(logs)), 0, 1)
    second.go(second.trackers("tensorboard", logging_dir=str(logs), run_name="named"), 0, 1, scale=2.0)
    assert points(events(logs / "first"), "loss/loss") == [(1, 1.0)]
    assert points(events(logs / "named"), "loss/loss") == [(1, 2.0)]


def test_what_was_logged_is_there_before_the_end(tmp_path):
    """A process that is killed, or leaves by os._exit, clears nothing up."""
    run = Run(tmp_path)
    trackers = run.trackers("tensorboard")
    trackers.on_start(run, 0)
    trackers.on_log(run, 1, {"loss": 4.0})
    deadline = time.monotonic() + 10
    while not events(tmp_path / "tensorboard").Tags()["scalars"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trackers.close()
    trackers.close()


def test_only_the_main_process_tracks(tmp_path):
    run = Run(tmp_path, rank=1)
    run.go(run.trackers("tensorboard", "no such package"), 0, 3)
    assert not (tmp_path / "tensorboard").exists() and run.said == []


def test_no_tracker_is_no_file(tmp_path):
    run = Run(tmp_path)
    run.go(run.trackers(), 0, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples"] and run.said == []


def test_a_run_tells_tensorboard_what_it_tells_its_metrics_file(demo, tmp_path):
    out = tmp_path / "out"
    done(
        "train", "--drop_long_samples", model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path,
        train_data_file=demo.data_file, codes_cache_dir=demo.data_file.parent / "codes", backend="none",
        output_dir=out, max_tokens_per_micro_batch=900, dataloader_num_workers=0, max_steps=3, logging_steps=2,
        eval_steps=3, validation_split=0.2, save_steps=50,
    )  # fmt: skip
    wanted = {(line["step"], *point) for line in journal.read(out / "metrics.jsonl") for point in scalars(line)}
    found = events(out / "tensorboard")
    told = {(step, tag, value) for tag in found.Tags()["scalars"] for step, value in points(found, tag)}
    assert len(told) > 80 and {tag for _, tag, _ in told} >= {"loss/codebook_losses/7", "eval_accuracy/eos_accuracy"}
    assert told == {(step, tag, float(np.float32(value))) for step, tag, value in wanted}


# --- what cannot be used is told before training; what fails later is switched off


def test_what_is_not_installed_is_told_at_once(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()  # W&B leaves a folder `wandb` where it is run, and Python would import it
    monkeypatch.syspath_prepend(tmp_path)
    settings = Settings(report_to=["tensorboard", "no_such_tracker", "nor_this"])
    assert [line.split(" → ")[0] for line in problems(settings)] == [
        "report_to: no_such_tracker is not installed", "report_to: nor_this is not installed",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"nor_this is not installed → pip install 'higgs-engine\[trackers\]'"):
        Trackers(settings, World(0, 0, 1, torch.device("cpu")))


def test_one_that_cannot_start_ends_the_run_in_words(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"report_to: tensorboard: .*Exists.* → mend it, or leave tensorboard out"):
        run.trackers("tensorboard").on_start(run, 0)


class Failing(NullTracker):
    def __init__(self):
        self.calls = []

    def scalars(self, step, values):
        self.calls.append(step)
        if step == 2:
            raise OSError("No space left on device")

    def close(self, code):
        self.calls.append(("closed", code))


def test_one_that_fails_is_named_once_and_switched_off():
    said, tracker = [], Failing()
    behind = Background("wandb", tracker, said.append)
    for step in (1, 2, 3):
        behind.call("scalars", step, {})
    behind.close(DONE)
    assert tracker.calls == [1, 2, ("closed", FAILED)]
    [line] = said
    assert line.startswith("report_to: wandb is switched off: OSError: No space left on device; training goes on")


def test_a_slow_one_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(background, "MOST_WAITING", 2)
    monkeypatch.setattr(background, "HURRY_S", 0.1)
    said, server_answers = [], threading.Event()

    class Slow(NullTracker):
        def scalars(self, step, values):
            server_answers.wait(30)

    slow = Background("mlflow", Slow(), said.append)
    began = time.monotonic()
    for step in range(10):
        slow.call("scalars", step, {})
    slow.close(DONE)
    assert time.monotonic() - began < 5
    server_answers.set()
    assert len(said) == 1 and "mlflow is switched off: 2 calls wait for it" in said[0]


def test_what_is_not_sent_in_time_is_told(monkeypatch):
    monkeypatch.setattr(background, "PATIENCE_S", 0.1)
    said, server_answers = [], threading.Event()

    class Slow(NullTracker):
        def close(self, code):
            server_answers.wait(30)

    Background("wandb", Slow(), said.append).close(DONE)
    server_answers.set()
    assert len(said) == 1 and "not sent everything after 0.1 s" in said[0]


# --- rounds of samples


def test_curves_of_a_round_by_hand():
    scores = {"word_errors": 3, "words": 8, "wer": 0.375, "speaker_similarity": 0.4, "silence_share": None}
    other = SAMPLE | {"prompt": 2, "stopped": False, "generation_seconds": 7.0, "seconds": 2.0, "scores": scores}
    other |= {"real_time_factor": 3.5, "target_seconds": None}
    assert dict(curves([SAMPLE, FAILED_SAMPLE, other])) == {
        "samples/made_share": pytest.approx(2 / 3), "samples/stopped_share": 0.5,
        "samples/wer": 0.4,  # (1 + 3) errors of (2 + 8) words, not the mean of 0.5 and 0.375
        "samples/speaker_similarity": pytest.approx(0.6),
        "samples/real_time_factor": 3.0,  # 2 + 7 seconds for 1 + 2 of speech
        "samples/length_of_target": pytest.approx(1 / 1.2),  # of the one that has a target
    }  # fmt: skip
    assert dict(curves([FAILED_SAMPLE])) == {"samples/made_share": 0.0}


def test_recordings_of_a_round(tmp_path):
    found = recordings([SAMPLE, FAILED_SAMPLE], tmp_path, with_prompts=True)
    assert [(sound.tag, sound.file) for sound in found] == [
        ("samples/00/reference", tmp_path / SAMPLE["reference"]), ("samples/00/generated", tmp_path / SAMPLE["file"]),
    ]  # fmt: skip
    assert [sound.tag for sound in recordings([SAMPLE], tmp_path, with_prompts=False)] == ["samples/00/generated"]
    assert caption(SAMPLE) == (
        'anna: "Hello there." 1.0 s of 1.2 s, stopped by itself, wer 0.50, speaker_similarity 0.80'
    )
    assert caption(SAMPLE | {"stopped": False, "target_seconds": None, "scores": None}).endswith('" 1.0 s, cut')


# --- the others: their calls recorded


def modules(monkeypatch, **made: object) -> None:
    """Modules that are imported instead of the real ones; `a_b` stands for `a.b`."""
    for name, attributes in made.items():
        module = ModuleType(name.replace("_", "."))
        vars(module).update(attributes)
        module.__spec__ = SimpleNamespace(origin="here")
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    inits, tracked = [], mock.MagicMock(id="abc", url="https://tracker/abc")
    modules(monkeypatch, wandb={"init": lambda **how: inits.append(how) or tracked, "Audio": lambda *a, **k: (a, k)})
    run = Run(tmp_path)
    run.go(run.trackers("wandb", run_name="first"), 0, 3, STOPPED)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "abc"}
    run.go(run.trackers("wandb", run_name="first"), 2, 3, DONE)
    common = {"project": "higgs-engine", "name": "first", "resume": "allow", "dir": str(tmp_path)}
    assert inits == [common | {"id": None}, common | {"id": "abc"}]
    logged = [call.args[0] for call in tracked.log.call_args_list]
    assert logged[0] == {"loss/loss": 1.0, "loss/codebook_losses/0": 5.0, "step": 1}
    assert {"eval_loss/loss": 100.0, "step": 2} in logged
    [sounds] = [values for values in logged if "samples/00/generated" in values]
    assert sounds["samples/00/generated"] == ((str(tmp_path / SAMPLE["file"]),), {"caption": caption(SAMPLE)})
    assert [call.kwargs for call in tracked.finish.call_args_list] == [{"exit_code": STOPPED}, {"exit_code": DONE}]
    assert mock.call("*", step_metric="step") in tracked.define_metric.call_args_list
    assert "tracker: https://tracker/abc" in run.said


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    client = mock.MagicMock()
    client.get_experiment_by_name.return_value = None
    client.create_run.return_value.info.run_id = "abc"
    made = mock.MagicMock(return_value=client)
    entities = {"Param": lambda name, value: (name, value), "Metric": lambda *all: all}
    modules(monkeypatch, mlflow={"MlflowClient": made}, mlflow_entities=entities)
    run = Run(tmp_path)
    run.go(run.trackers("mlflow"), 0, 3, STOPPED)
    made.assert_called_with(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    given = [call.kwargs["params"] for call in client.log_batch.call_args_list if "params" in call.kwargs]
    assert max(map(len, given)) <= 100, "a server takes no more"
    assert ("learning_rate", str(Settings().learning_rate)) in sum(given, [])
    metrics = [call.args[1] for call in client.log_batch.call_args_list if len(call.args) == 2]
    assert [(tag, value, step) for tag, value, _, step in metrics[0]] == [
        ("loss/loss", 1.0, 1), ("loss/codebook_losses/0", 5.0, 1),
    ]  # fmt: skip
    file, place = str(tmp_path / SAMPLE["file"]), "samples/step-000002/generated"
    client.log_artifact.assert_called_with("abc", file, place)
    client.set_terminated.assert_called_with("abc", "KILLED")
    run.go(run.trackers("mlflow"), 2, 3, DONE)
    assert client.create_run.call_count == 1
    client.update_run.assert_called_once_with("abc", status="RUNNING")
    client.set_terminated.assert_called_with("abc", "FINISHED")


def test_trackio_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    tracked = mock.MagicMock()
    init = mock.MagicMock(return_value=tracked)
    modules(monkeypatch, trackio={"init": init, "Audio": lambda *a, **k: (a, k)})
    run = Run(tmp_path)
    run.go(run.trackers("trackio"), 0, 3, STOPPED)
    run.go(run.trackers("trackio"), 2, 3, DONE)
    assert [call.args for call in init.call_args_list] == [("higgs-engine", tmp_path.name)] * 2
    assert [call.kwargs["resume"] for call in init.call_args_list] == ["never", "allow"]
    assert tracked.log.call_args_list[0] == mock.call({"loss/loss": 1.0, "loss/codebook_losses/0": 5.0}, step=1)
    assert tracked.finish.call_count == 2


# --- the others for real, where they are installed


def test_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Run(tmp_path)
    run.go(run.trackers("wandb"), 0, 3)
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert (folder / f"run-{known}.wandb").stat().st_size > 0
    assert list((folder / "files/media/audio/samples/00").glob("generated_*.wav"))


def test_real_mlflow_in_a_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = Run(tmp_path)
    run.go(run.trackers("mlflow"), 0, 3, STOPPED)
    run.go(run.trackers("mlflow"), 3, 4)
    known = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    history = client.get_metric_history(known, "loss/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    found = client.get_run(known)
    assert found.info.status == "FINISHED" and found.data.params["lora_rank"] == str(Settings().lora_rank)
    assert [file.path for file in client.list_artifacts(known, "samples/step-000002/generated")] == [
        "samples/step-000002/generated/00.wav"
    ]


def test_real_trackio_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when it is imported
    pytest.importorskip("trackio")
    run = Run(tmp_path)
    run.go(run.trackers("trackio"), 0, 3, STOPPED)
    run.go(run.trackers("trackio"), 3, 4)
    with closing(sqlite3.connect(tmp_path / "store/higgs-engine.db")) as store:
        rows = [(step, json.loads(text)) for step, text in store.execute("select step, metrics from metrics")]
        assert len(set(store.execute("select run_id from metrics"))) == 1, "the same run"
    assert sorted((step, row["loss/loss"]) for step, row in rows if "loss/loss" in row) == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0),
    ]  # fmt: skip
    assert any("samples/00/generated" in row for _, row in rows)
