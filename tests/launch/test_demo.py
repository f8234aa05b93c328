"""The README's first command, as a newcomer runs it: `bash launch/train.sh` without arguments, in another directory."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.slow
def test_the_demo_trains_resumes_and_speaks(tmp_path):
    environment = os.environ | {"HIGGS_ENGINE_PYTHON": sys.executable}
    result = subprocess.run(
        ["bash", str(ROOT / "launch" / "train.sh")], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    out = result.stdout
    assert result.returncode == 0, out
    assert "resumed checkpoint-60" in out
    assert "missing keys: 0, unexpected keys: 0" in out
    lines = [json.loads(line) for line in (tmp_path / "output/demo/run-1/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "eval_loss" in line] == [30, 60, 90]
    assert steps[0]["audio_loss"] > 6.5 and steps[-1]["audio_loss"] < 0.5
    assert int(re.search(r"(\d+) % of its codes equal$", out, re.MULTILINE).group(1)) > 90
    assert "and stopped by itself" in out
    assert (tmp_path / "output/demo/run-1/spoken.wav").stat().st_size > 10_000
    assert re.search(r"^next +bash launch/train.sh", out, re.MULTILINE)
    for noise in ("Traceback", "Warning"):
        assert noise not in out, out
