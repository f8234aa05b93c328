"""What the loop does when numbers go wrong."""

import json

from engine.cli import main
from tests.checkpoint.test_resume import command


def test_a_diverged_run_stops_and_saves_nothing_of_it(demo, tmp_path, capsys):
    arguments = command(demo, tmp_path / "out", "--backend", "none", "--learning_rate", "1e30", "--save_steps", "1")
    assert main(arguments[2:]) == 2
    error = capsys.readouterr().err
    assert "training has diverged → resume from the last checkpoint with a lower learning_rate" in error
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < len(lines) < 6
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == len(lines), "a step that diverged was saved"
