"""Hooks of a run: what they are told and when, how they end it, and what is said of one that cannot be used."""

import json
from types import SimpleNamespace

import pytest

from engine.callbacks import Callback, Callbacks, load
from engine.checkpoint.manifest import load_manifest
from engine.config import SCHEMA, Settings
from engine.config_checks import path_problems
from engine.errors import ConfigError
from engine.observe import journal
from engine.observe.early_stopping import EarlyStopping
from engine.runtime.distributed import World
from tests.commands import done
from tests.evaluate import judges

RECORDER = '''
import json
from engine.callbacks import Callback

class Recorder(Callback):
    def _tell(self, run, *what):
        with (run.output_dir / "told.jsonl").open("a") as file:
            file.write(json.dumps(what) + chr(10))

    def on_start(self, run, step):
        self._tell(run, "start", step, run.total)

    def on_step(self, run, step, result):
        self._tell(run, "step", step, float(result.grad_norm))

    def on_log(self, run, step, values):
        values["mine"] = step / 2
        self._tell(run, "log", step, values["grad_norm"])

    def on_evaluate(self, run, step, values):
        self._tell(run, "evaluate", step, values["loss"])

    def on_save(self, run, step, folder):
        self._tell(run, "save", step, (folder / "manifest.json").is_file())

    def on_end(self, run, step, code):
        self._tell(run, "end", step, code)
'''


def test_hooks_are_told_in_order_and_a_run_ends_when_nothing_gets_better(demo, tmp_path):
    """At a learning rate of nothing the first evaluation stays the best one."""
    (tmp_path / "hooks.py").write_text(RECORDER)
    out = tmp_path / "out"
    said = done(
        "train", "--drop_long_samples", model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path,
        train_data_file=demo.data_file, codes_cache_dir=demo.data_file.parent / "codes", backend="none",
        output_dir=out, max_tokens_per_micro_batch=900, dataloader_num_workers=0, max_steps=9, warmup_steps=0,
        learning_rate=1e-30, eval_steps=1, validation_split=0.2, early_stopping_patience=2, save_steps=50,
        report_to="none", logging_steps=2, callbacks=f"{tmp_path / 'hooks.py'}:Recorder", sample_every=8,
        sample_count=1, sample_seconds=0.6, sample_prompts=demo.data_file,
        asr_model_path=judges.ctc(tmp_path / "asr", "B"), speaker_model_path=judges.voices(tmp_path / "voices"),
    )  # fmt: skip
    told = [tuple(json.loads(line)) for line in (out / "told.jsonl").read_text().splitlines()]
    assert [line[:2] for line in told] == [
        ("start", 0), ("step", 1), ("log", 1), ("evaluate", 1), ("save", 1), ("step", 2), ("log", 2), ("evaluate", 2),
        ("step", 3), ("evaluate", 3), ("log", 3), ("save", 3), ("end", 3),
    ]  # fmt: skip
    assert told[0][2] == 9 and told[-1][2] == 0 and all(line[2] for line in told if line[0] == "save")
    assert told[1][2] == told[2][2] > 0, "the same norm on the device and in the log"
    lines = journal.read(out / "metrics.jsonl")
    assert [line["mine"] for line in lines if "mine" in line] == [0.5, 1.0, 1.5], "what a hook adds is written down"
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 3 and len(set(losses)) == 1 and losses[0] == told[3][2]
    assert "ends after step 3 of 9: the held-out loss has not fallen for 2 evaluation(s); the best was" in said
    spoken = journal.read(out / "samples/samples.jsonl")
    assert [line["step"] for line in spoken] == [3] and spoken[0]["file"], "its last weights are heard"
    assert spoken[0]["name"] == "demo.json row 0" and spoken[0]["scores"]["transcript"] == "B", "of sample_prompts"
    assert spoken[0]["scores"]["speaker_similarity"] and "samples: " in said and "WER 1" in said
    best = (out / "best").read_text()
    assert f"done: {out / 'model'} (of {best}, the best)" in said
    assert load_manifest(out / best).eval_loss == losses[0]
    (start,) = map(json.loads, (out / "starts.jsonl").read_text().splitlines())
    assert start["step"] == 0 and start["total_steps"] == 9 and start["resumed_from"] is None
    assert start["data"]["train"]["samples"] + start["data"]["eval"]["samples"] == 20
    tokens = start["data"]["train"]["lengths"]["tokens"]
    samples = start["data"]["train"]["samples"]
    assert tokens["count"] == sum(tokens["histogram"]["counts"]) + tokens["histogram"]["above"] == samples
    assert tokens["mean"] * samples == pytest.approx(start["data"]["train"]["tokens"])
    assert start["model"]["trained"] == start["model"]["parameters"] > 10**6


def test_patience_by_hand(tmp_path):
    """A tie is no gain, a loss that is no number counts as one; a resume counts on from what is written."""
    asked = []
    run = SimpleNamespace(ask_to_stop=asked.append, output_dir=tmp_path, world=World(0, 0, 1, None))
    stopping = EarlyStopping(patience=3)
    stopping.on_start(run, 0)
    for step, loss in enumerate([4.0, 3.0, 3.5, 3.0, 2.9, 3.1, None], start=1):
        stopping.on_evaluate(run, step, {"loss": loss})
    assert not asked and (stopping.best, stopping.best_step, stopping.worse) == (2.9, 5, 2)
    lines = [{"step": step, "eval_loss": loss} for step, loss in ((1, 4.0), (2, 3.0), (3, 3.5), (4, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resumed = EarlyStopping(patience=2)
    resumed.on_start(run, 3)
    assert (resumed.best, resumed.worse) == (3.0, 1)
    resumed.on_evaluate(run, 4, {"loss": 3.2})
    assert len(asked) == 1 and "has not fallen for 2 evaluation(s); the best was 3.0000 at step 2" in asked[0]


def test_all_hooks_that_cannot_be_used_are_named_at_once(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("class Plain:\n    pass\n\nclass Broken:\n    def __init__(self):\n        1 / 0\n")
    (tmp_path / "odd.py").write_text("import math\nmath.nothing\n")
    with pytest.raises(ConfigError) as caught:
        load([*(f"{file}:{name}" for name in ("Missing", "Plain", "Broken")), "json", f"{tmp_path}/none.py:A",
              f"{tmp_path}/odd.py:A"])  # fmt: skip
    message = str(caught.value)
    assert message.count("→") == 6
    for part in (
        "none.py:A: there is no such file", "bad.py has no Missing → one", "is no engine.callbacks.Callback",
        "ZeroDivisionError", "'nothing' → mend the file",
    ):  # fmt: skip
        assert part in message


def test_several_are_called_in_their_order():
    """Every hook of the interface is passed on."""
    told = []

    def hook(name):
        return lambda self, run, step, *more: told.append((self.name, name, step, *more))

    hooks = [name for name in vars(Callback) if name.startswith("on_")]
    Noted = type("Noted", (Callback,), {name: hook(name) for name in hooks})
    first, second = Noted(), Noted()
    first.name, second.name = "first", "second"
    both = Callbacks([first, second])
    for name in hooks:
        more = () if name == "on_start" else ("x",)
        getattr(both, name)(None, 7, *more)
        assert told == [("first", name, 7, *more), ("second", name, 7, *more)]
        told.clear()


def test_hooks_are_named_from_anywhere(tmp_path, monkeypatch):
    """A relative path means the same when the run is repeated in another folder; one of no file is told at once."""
    (tmp_path / "hooks.py").write_text(RECORDER)
    monkeypatch.chdir(tmp_path)
    settings = Settings(callbacks=["hooks.py:Recorder", "none.py:A"])
    assert settings.callbacks == [f"{tmp_path}/hooks.py:Recorder", f"{tmp_path}/none.py:A"]
    problems = [line for line in path_problems(settings, SCHEMA, excused=()) if line.startswith("callbacks")]
    assert problems == [f"callbacks: {tmp_path}/none.py:A: there is no such file → give path.py:Class"]
    (found,) = load(settings.callbacks[:1])
    assert type(found).__name__ == "Recorder"
