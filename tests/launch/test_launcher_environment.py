"""Variables and arguments on their way to other machines, through DeepSpeed's own code and a real shell."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from engine.errors import ConfigError
from engine.launch import environment as forwarding
from engine.launch.commands import through_ssh

AWKWARD = [
    "plain", "", "two words", " spaces around ", "it's", 'say "hi"', "$HOME", "`id`", "back\\slash", '\\"', "100%",
    "%n %h", "a;b|c&d", "*", "(x)", "ümläut", "~", "#", "!", "{a,b}", "x=1 y=$2", "tab\there",
]  # fmt: skip


def test_the_list_takes_what_all_machines_need_and_nothing_else():
    goes = {
        "NCCL_DEBUG": "INFO",
        "PYTORCH_ALLOC_CONF": "x",
        "HF_HOME": "/hf",
        "OMP_NUM_THREADS": "4",
        "FI_PROVIDER": "efa",
    }
    goes |= {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu", "HIGGS_ENGINE_RESTART": "1"}
    stays = {"HOME": "/home/me", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "HIGGS_ENGINE_PYTHON": "p", "NCCL": "x"}
    held = {"HF_TOKEN": "hf_abc", "TORCH_NOTE": "two\nlines", "DS_API_KEY": "k"}
    assert forwarding.forwarded(goes | stays | held) == dict(sorted(goes.items()))
    assert list(forwarding.held_back(goes | stays | held)) == ["DS_API_KEY", "HF_TOKEN", "TORCH_NOTE"]


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "MY_CREDENTIALS_FILE", "APIKEY"])
def test_values_of_secrets_are_never_shown(name):
    assert forwarding.shown(name, "hush") == f"{name}=(not shown)"
    assert forwarding.shown("TOKENIZERS_PARALLELISM", "true") == "TOKENIZERS_PARALLELISM=true"


def test_values_and_arguments_survive_deepspeed_and_a_shell(tmp_path, monkeypatch):
    """runner.main reads the file and puts the values into commands; pdsh replaces % and hands them to a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    variables = {f"NCCL_{number}": value for number, value in enumerate(AWKWARD) if value.isprintable()}
    file = tmp_path / "environment"
    forwarding.write_file(file, variables, {})
    assert file.stat().st_mode & 0o777 == 0o600
    args = Namespace(
        user_script="s", user_args=[through_ssh(word) for word in AWKWARD], launcher_args="", ssh_port=None
    )
    args.__dict__ |= dict.fromkeys(("venv_script", "no_python", "module", "no_local_rank", "save_pid"))
    args.__dict__ |= {"master_addr": "a", "master_port": 1, "enable_each_rank_log": "None"}
    runner = PDSHRunner(args, "world")
    for line in file.read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    command = runner.get_cmd({}, {"node-a": [0]})[0]
    exports = command[command.index("node-a") + 1]
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    remote = f"{exports} '{sys.executable}' -c '{show}' {' '.join(command[command.index('s') + 1 :])}"
    assert "%" not in remote  # nothing for pdsh to replace
    arguments, env = json.loads(subprocess.check_output(["sh", "-c", remote]))
    assert arguments == AWKWARD
    assert {name: env[name] for name in variables} == variables


def test_the_user_s_own_file_comes_last_and_as_it_stands(tmp_path, monkeypatch):
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir(), cwd.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=WARN\nHERE=$HOME/x y\n")
    own = forwarding.own_lines({}, cwd)
    forwarding.write_file(tmp_path / "file", {"NCCL_DEBUG": "INFO"}, own)
    assert (tmp_path / "file").read_text() == "NCCL_DEBUG=INFO\nNCCL_DEBUG=WARN\nHERE=$HOME/x y\n"
    (cwd / ".deepspeed_env").write_text("export A=1\nB\n")
    with pytest.raises(ConfigError) as caught:
        forwarding.own_lines({}, cwd)
    assert ["line 1 is not NAME=value → " in caught.value.problems[0], len(caught.value.problems)] == [True, 2]
