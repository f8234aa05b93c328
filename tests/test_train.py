"""What the loop does when it is resumed, and when numbers go wrong."""

import json
import shutil
from types import SimpleNamespace

import numpy as np

from engine import rows
from engine.cli import main
from engine.config import Settings
from engine.exit_codes import DIVERGED
from engine.run_data import RunData
from tests.checkpoint.test_resume import command
from tests.commands import done


def test_a_checkpoint_beyond_the_end_is_not_taken_for_the_end(demo, tmp_path, capsys):
    arguments = command(demo, tmp_path / "out", "--backend", "none")[2:]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    assert main([*arguments, "--resume", "auto", "--max_steps", "3"]) == 2
    assert "step 6 is beyond the 3 steps of this run → raise max_steps" in capsys.readouterr().err


def test_what_the_machine_cannot_do_is_told_before_data_are_prepared(demo, tmp_path, capsys):
    assert main([*command(demo, tmp_path / "out", "--backend", "none")[2:], "--attention", "flex"]) == 2
    assert "flex needs a GPU (its backward has no CPU kernel) → set attention: auto" in capsys.readouterr().err
    assert not (tmp_path / "out" / "data").exists()


def test_settings_that_do_nothing_are_told_at_the_start():
    settings = Settings(early_stopping_patience=2, warmup_steps=9, micro_batches_per_step=3, backend="none")
    data = SimpleNamespace(
        settings=settings, rows=SimpleNamespace(readers=2), rounds=2, held_out=None, world=SimpleNamespace(size=2),
        train=SimpleNamespace(lengths=np.array([10, 20])),
        plan=SimpleNamespace(total_steps=5, epoch=lambda _: [()] * 5),
    )  # fmt: skip
    notes = [line for line in RunData.describe(data) if line.startswith("note: ")]
    assert notes == [
        "note: 2 rows at a time do not divide micro_batches_per_step: 1 idle slot(s) a step",
        "note: warmup_steps 9 is not reached within 5 steps",
        "note: early_stopping_patience stops nothing, for nothing is evaluated → give validation_split",
    ]


def test_a_diverged_run_stops_and_stops_saving_before(demo, tmp_path, capsys):
    arguments = command(demo, tmp_path / "out", "--backend", "none", "--learning_rate", "1e30", "--save_steps", "1")
    assert main([*arguments[2:], "--max_skipped_steps", "3"]) == DIVERGED
    error = capsys.readouterr().err
    assert "training has diverged → resume from the last checkpoint with a lower learning_rate" in error
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 3]
    saved = {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")}
    assert saved == {"checkpoint-1", "checkpoint-2"}, "one step skipped is an accident, two in a row are none"


def test_a_resumed_run_reads_no_data_of_the_steps_done(demo, tmp_path, monkeypatch):
    """Its first packed rows are those of its first step: nothing is replayed to get there."""
    run = {
        "model_path": demo.model_path, "audio_tokenizer_path": demo.audio_tokenizer_path, "output_dir": tmp_path,
        "train_data_file": demo.data_file, "codes_cache_dir": demo.data_file.parent / "codes", "backend": "none",
        "max_tokens_per_micro_batch": 900, "gradient_accumulation_steps": 2, "save_steps": 2, "warmup_steps": 1,
        "logging_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    asked: list[list[tuple[int, ...]]] = []
    real = rows.packed_batches

    def recorded(data, micro_batches, **options):
        asked.append(list(micro_batches))
        return real(data, asked[-1], **options)

    monkeypatch.setattr(rows, "packed_batches", recorded)
    done("train", "--drop_long_samples", **run, max_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-4")
    said = done("train", "--drop_long_samples", **run, max_steps=4, resume="auto")
    assert "resumed checkpoint-2: step 2 of 4" in said
    straight, resumed = asked
    assert len(straight) == 8 and resumed == straight[4:]
