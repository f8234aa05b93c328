"""What the loop does when it is resumed, and when numbers go wrong."""

import json
import shutil

import pytest

from engine import train
from engine.cli import main
from tests.checkpoint.test_resume import command
from tests.commands import done
from tests.processes import run


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_sees_divergence_too(stage, demo, tmp_path):
    """DeepSpeed skips a step whose gradients are not finite, and says so in the norm: the run stops there as well."""
    arguments = command(demo, tmp_path / "out", "--ds_config", stage, "--learning_rate", "1e30", "--save_steps", "1")
    codes, outputs = run([*arguments, "--logging_steps", "100"], world_size=2, check=False)
    assert codes == [2, 2] and "training has diverged" in "".join(outputs), outputs
    saved = [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")]
    assert saved == ["checkpoint-1"], "the gradients of the first step are finite, those of the second are not"


def test_a_checkpoint_beyond_the_end_is_not_taken_for_the_end(demo, tmp_path, capsys):
    arguments = command(demo, tmp_path / "out", "--backend", "none")[2:]
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    assert main([*arguments, "--resume", "auto", "--max_steps", "3"]) == 2
    assert "step 6 is beyond the 3 steps of this run → raise max_steps" in capsys.readouterr().err


def test_a_diverged_run_stops_and_saves_nothing_of_it(demo, tmp_path, capsys):
    arguments = command(demo, tmp_path / "out", "--backend", "none", "--learning_rate", "1e30", "--save_steps", "1")
    assert main(arguments[2:]) == 2
    error = capsys.readouterr().err
    assert "training has diverged → resume from the last checkpoint with a lower learning_rate" in error
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < len(lines) < 6
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == len(lines), "a step that diverged was saved"


def test_a_resumed_run_reads_no_data_of_the_steps_done(demo, tmp_path, monkeypatch):
    """Its first packed rows are those of its first step: nothing is replayed to get there."""
    run = {
        "model_path": demo.model_path, "audio_tokenizer_path": demo.audio_tokenizer_path, "output_dir": tmp_path,
        "train_data_file": demo.data_file, "codes_cache_dir": demo.data_file.parent / "codes", "backend": "none",
        "max_tokens_per_micro_batch": 900, "gradient_accumulation_steps": 2, "save_steps": 2, "warmup_steps": 1,
        "logging_steps": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    asked: list[list[tuple[int, ...]]] = []
    real = train.packed_batches

    def recorded(data, micro_batches, **options):
        asked.append(list(micro_batches))
        return real(data, asked[-1], **options)

    monkeypatch.setattr(train, "packed_batches", recorded)
    done("train", "--drop_long_samples", **run, max_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-4")
    said = done("train", "--drop_long_samples", **run, max_steps=4, resume="auto")
    assert "resumed checkpoint-2: step 2 of 4" in said
    straight, resumed = asked
    assert len(straight) == 8 and resumed == straight[4:]
