"""Real training through the launchers, from another directory, with audio paths relative to the data file."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.processes import ROOT

TRAIN_SH = str(ROOT / "launch" / "train.sh")
LAUNCHERS = {
    "bash": (["bash", TRAIN_SH], {"LAUNCHER": "torchrun", "NPROC": "2"}),
    "deepspeed": ([sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", TRAIN_SH], {}),
    "torchrun": ([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", TRAIN_SH], {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_run_through_every_launcher(launcher, demo, tmp_path):
    data = tmp_path / "some folder" / "data"
    shutil.copytree(demo.data_file.parent, data, ignore=shutil.ignore_patterns("codes"))
    command, variables = LAUNCHERS[launcher]
    command = [
        *command, "--train_data_file", "data/demo.json", "--model_path", str(demo.model_path), "--max_steps", "2",
        "--audio_tokenizer_path", str(demo.audio_tokenizer_path), "--output_dir", "out", "--logging_steps", "1",
        "--codes_cache_dir", str(demo.data_file.parent / "codes"), "--dataloader_num_workers", "0",
    ]  # fmt: skip
    environment = os.environ | variables | {"HIGGS_ENGINE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        command, cwd=tmp_path / "some folder", env=environment | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    out = tmp_path / "some folder" / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads((out / "checkpoint-2" / "manifest.json").read_text())["world_size"] == 2
    assert (out / "model" / "model.safetensors").is_file()
    # whichever launcher: the same seeds, the same steps
    first = demo.data_file.parent / "first_launcher.json"
    losses = [line["loss"] for line in lines]
    if not first.exists():
        first.write_text(json.dumps(losses))
    assert losses == json.loads(first.read_text())
