"""`--dry_run` with the real settings: what it shows is what a run would have, and nothing is started."""

import os
import shlex
import sys

import pytest
import yaml

from engine.config import FIELDS, Settings
from engine.launch import dry_run
from engine.launch.__main__ import main
from engine.launch.machine import Machine
from tests.commands import command, flags
from tests.launch.stub import FOREIGN

SCRIPT = "/somewhere/launch/train.sh"


@pytest.fixture
def settings(demo, tmp_path) -> dict:
    return {
        "train_data_file": demo.data_file, "model_path": demo.model_path, "output_dir": tmp_path / "out",
        "audio_tokenizer_path": demo.audio_tokenizer_path, "max_restarts": 2,
    }  # fmt: skip


@pytest.fixture
def launch(monkeypatch, capsys):
    """`bash launch/train.sh ARGUMENTS`, in this process and on a machine with four GPUs: exit code, output, errors."""
    for name in os.environ:
        if name.startswith((*FOREIGN, "CUDA_", "DS_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(Machine, "here", lambda env: Machine("node-a", gpus=4, cores=8))

    def launch(*arguments: object, **env: str) -> tuple[int, str, str]:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return main([SCRIPT, *map(str, arguments)]), *capsys.readouterr()

    return launch


def test_it_is_the_config_of_the_run_and_its_plan(launch, settings, tmp_path):
    code, out, _ = launch("--dry_run", *flags(**settings, system_prompt='say "hi"'), LAUNCHER="torchrun")
    assert code == 0 and not (tmp_path / "out").exists()
    (tmp_path / "shown.yaml").write_text(out)
    shown = Settings.from_yaml(tmp_path / "shown.yaml")
    assert set(yaml.safe_load(out)) == set(FIELDS)  # the plan is comments
    assert (shown.micro_batches_per_step, shown.bf16, shown.max_restarts) == (4, True, 2)  # of four processes
    line = next(line for line in out.splitlines() if line.startswith("#   command: "))
    words = shlex.split(line.removeprefix("#   command: "))
    assert words[:5] == [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4"]
    assert words[words.index(SCRIPT) + 1 :] == flags(**settings, system_prompt='say "hi"')  # without --dry_run


def test_the_environment_for_other_machines_is_shown_without_secrets(launch, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.launch.commands._require_ssh", lambda env: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=2\n")
    (tmp_path / ".deepspeed_env").write_text("MY_TOKEN=hush\nMY_PLACE=here\n")
    out = launch(*flags(**settings), "--dry_run", HOSTFILE="hosts", NCCL_DEBUG="INFO", HF_TOKEN="hush")[1]
    assert Settings.from_yaml(_saved(tmp_path, out)).micro_batches_per_step == 3
    assert "hush" not in out
    for line in ("node-b: 2", "  NCCL_DEBUG=INFO", "without HF_TOKEN: looks like a secret", "MY_TOKEN=(not shown)"):
        assert line in out
    assert f"from {tmp_path}/.deepspeed_env:\n#     MY_TOKEN" in out


def _saved(folder, text):
    (folder / "shown.yaml").write_text(text)
    return folder / "shown.yaml"


def test_mistakes_of_settings_and_launch_come_together(launch, settings):
    code, out, errors = launch("--dry_run", *flags(**settings, learning_rate="fast"), NPROC="5", LAUNCHER="x")
    assert (code, out) == (2, "")
    for line in ("LAUNCHER=x", "NPROC=5", "learning_rate: 'fast' is not a number"):
        assert line in errors
    assert launch("--dry-run", *flags(**settings, backend="none"), NPROC="2", LAUNCHER="torchrun")[0] == 2


def test_machines_that_come_and_go_need_resume_auto(launch, settings):
    env = {"LAUNCHER": "torchrun", "NNODES": "1:4", "RDZV_ENDPOINT": "node-a"}
    assert "--resume auto" in launch("--dry_run", *flags(**settings), **env)[2]
    assert launch("--dry_run", *flags(**settings, resume="auto"), **env)[0] == 0


def test_as_a_rank_of_any_launcher(settings, tmp_path):
    said = command("train", "--dry_run", **settings)
    assert said.code == 0 and not (tmp_path / "out").exists()
    assert Settings.from_yaml(_saved(tmp_path, said.out)).micro_batches_per_step == 1
    assert "processes: 1, 1 on this machine" in said.out
    assert dry_run.HELP in command("train", "--help").out


def test_other_commands_have_no_settings_to_show(launch):
    code, out, _ = launch("prepare", "--out", "a b", "--dry_run")
    assert code == 0 and f"--num_gpus 4 {SCRIPT} prepare --out 'a b'" in out
