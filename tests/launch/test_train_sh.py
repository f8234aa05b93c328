"""launch/train.sh under every launcher: a stub in the engine's place tells what reached it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest

from tests.launch.stub import free_port, run, start, told
from tests.processes import ROOT

LAUNCH = ROOT / "launch"
AWKWARD = ["--config", "a b.yaml", "it's", 'say "hi"', "$HOME", "*", "", "back\\slash", "ümläut", "--x=1 2"]
MODULE = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}


def test_both_languages_can_read_it():
    for script in [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *LAUNCH.parent.glob("tests/*.sh")]:
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), script
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an escape that Python does not know, in the bash half
        compile((LAUNCH / "train.sh").read_text(), "train.sh", "exec")


@pytest.mark.parametrize(
    "launcher",
    ["bash", "bash LAUNCHER=torchrun", "bash LAUNCHER=none", "deepspeed", "torchrun"],
)
def test_arguments_and_ranks_survive(tree, tmp_path, launcher):
    script, env = tree / "launch" / "train.sh", {}
    if launcher in MODULE:
        size = "--num_gpus" if launcher == "deepspeed" else "--nproc_per_node"
        command = [sys.executable, "-m", MODULE[launcher], size, "2", "--master_port", free_port(), script]
    else:
        command, env = ["bash", script], dict(word.split("=") for word in launcher.split()[1:])
    result = run([*command, *AWKWARD], tmp_path, **env, NPROC="2")
    assert result.returncode == 0, result.stderr
    ranks = told(result.stdout)
    assert [rank["RANK"] for rank in ranks] == ([None] if "none" in launcher else ["0", "1"])
    for rank in ranks:
        assert rank["arguments"] == ["train", *AWKWARD]
        assert (rank["cwd"], rank["path"]) == (str(tmp_path), str(tree))
        assert rank["WORLD_SIZE"] == (None if "none" in launcher else "2")
        assert rank["OMP_NUM_THREADS"]


@pytest.mark.parametrize(
    "command, launcher, ranks",
    [("prepare", "none", [None]), ("evaluate", "none", [None]), ("doctor", "torchrun", ["0", "1"])],
)
def test_other_commands_as_the_first_word_run_on_all_ranks(tree, tmp_path, command, launcher, ranks):
    """Their arguments are no settings of a run, and are not read as such."""
    words = [command, "--wrong", *AWKWARD]
    result = run(["bash", tree / "launch/train.sh", *words], tmp_path, LAUNCHER=launcher, NPROC="2")
    found = [(rank["RANK"], rank["arguments"]) for rank in told(result.stdout)]
    assert found == [(rank, words) for rank in ranks], result.stderr


@pytest.mark.parametrize(
    "rank_of",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LAUNCHER": "deepspeed"},
        {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    ],
)
def test_bash_started_per_rank_is_a_worker(tree, tmp_path, rank_of):
    """One process each, which torch.distributed is told of by engine.runtime.distributed."""
    result = run(["bash", tree / "launch/train.sh", "--local_rank=1", *AWKWARD], tmp_path, **rank_of)
    (worker,) = told(result.stdout)
    assert worker["arguments"] == ["train", *AWKWARD] and worker["RANK"] == rank_of.get("RANK")


def test_one_task_per_node_starts_torchrun_there(tree, tmp_path):
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}
    step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NPROC": "1"}
    nodes = [start(tree, "--config", "x", cwd=tmp_path, **step, SLURM_PROCID=node, SLURM_NODEID=node) for node in "01"]
    workers = told("".join(node.communicate(timeout=90)[0] for node in nodes))
    assert [(worker["RANK"], worker["LOCAL_RANK"], worker["WORLD_SIZE"]) for worker in workers] == [
        ("0", "0", "2"),
        ("1", "0", "2"),
    ]


def test_two_machines_of_a_hostfile_without_ssh(tree, tmp_path):
    (tmp_path / "hosts").write_text("# two\nnode-a slots=1\nnode-b slots=1\n")
    both = {"HOSTFILE": "hosts", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    machines = [start(tree, "--config", "a b", cwd=tmp_path, **both, NODE_RANK=node) for node in "01"]
    workers = told("".join(machine.communicate(timeout=90)[0] for machine in machines))
    assert [(worker["RANK"], worker["WORLD_SIZE"]) for worker in workers] == [("0", "2"), ("1", "2")]
    assert workers[0]["arguments"] == ["train", "--config", "a b"]


def test_two_agents_that_number_themselves(tree, tmp_path):
    """The c10d rendezvous of torchrun: the same command on both, which only know where to meet."""
    both = {"LAUNCHER": "torchrun", "NNODES": "2", "RDZV_ENDPOINT": f"localhost:{free_port()}", "NPROC": "1"}
    machines = [start(tree, "--config", "a b", cwd=tmp_path, **both) for _ in range(2)]
    outs = [told(machine.communicate(timeout=90)[0]) for machine in machines]
    assert sorted((worker["RANK"], worker["WORLD_SIZE"]) for (worker,) in outs) == [("0", "2"), ("1", "2")]
    assert [machine.returncode for machine in machines] == [0, 0]


def test_demo_and_help_need_no_launcher(tree, tmp_path):
    script = tree / "launch/train.sh"
    commands = [([], ["demo"]), (["demo", "a b"], ["demo", "a b"]), (["--config", "x", "--help"], ["train", "--help"])]
    helped = [([name, "-h"], [name, "--help"]) for name in ("prepare", "demo")]
    for arguments, command in [*commands, *helped, (["-h"], ["train", "--help"])]:
        result = run(["bash", script, *arguments], tmp_path)
        assert told(result.stdout)[0]["arguments"] == command
    assert "NPROC" in result.stdout


def test_another_engine_in_the_working_directory_is_not_taken(tree, tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/__init__.py").write_text("raise SystemExit('the wrong engine')")
    result = run(["bash", tree / "launch/train.sh", "--config", "x"], tmp_path, LAUNCHER="none")
    assert told(result.stdout)[0]["path"] == str(tree), result.stderr


def test_a_failing_rank_ends_the_run_with_its_code(tree, tmp_path):
    """Which torchrun alone would make a 1; the other rank is ended, and a mistake is not tried again."""
    started = time.monotonic()
    command = ["bash", tree / "launch/train.sh", "--fail", "2", "--max_restarts", "3"]
    result = run(command, tmp_path, LAUNCHER="torchrun", NPROC="2")
    assert result.returncode == 2 and "restart" not in result.stderr
    rows = [line.split() for line in result.stderr.splitlines() if re.match(r"  [01]  ", line)]
    assert [(row[2], row[3], " ".join(row[4:7])) for row in rows] == [
        ("12", "backward", "ended from outside,"),
        ("12", "backward", "exit code 2,"),
    ], result.stderr
    assert time.monotonic() - started < 25


def test_a_killed_rank_is_named_and_the_run_restarted(tree, tmp_path):
    bash = start(tree, "--wait", "0", "--max_restarts", "1", cwd=tmp_path, LAUNCHER="torchrun", NPROC="2")
    ranks = told("".join(bash.stdout.readline() for _ in range(4)))
    victim = next(rank["pid"] for rank in ranks if rank["RANK"] == "1" and "pid" in rank)
    os.kill(victim, signal.SIGKILL)
    again = told("".join(bash.stdout.readline() for _ in range(4)))
    assert {rank["HIGGS_ENGINE_RESTART"] for rank in again if "pid" in rank} == {"1"}
    bash.send_signal(signal.SIGTERM)
    errors = bash.communicate(timeout=60)[1]
    assert bash.returncode == 0
    assert re.search(rf"killed from outside: rank 1 \(\S+, pid {victim}\): step 12, backward, for", errors), errors


@pytest.mark.parametrize("launcher, code", [("deepspeed", 75), ("torchrun", 75), ("none", 5)])
def test_sigterm_reaches_the_ranks_once_and_waits_for_them(tree, tmp_path, launcher, code):
    size = 1 if launcher == "none" else 2
    restarts = ("--max_restarts", "1") if size > 1 else ()  # not after a signal to the launch
    bash = start(tree, "--wait", str(code), *restarts, cwd=tmp_path, LAUNCHER=launcher, NPROC=str(size))
    for _ in range(2 * size):
        line = bash.stdout.readline()
    assert line
    bash.send_signal(signal.SIGTERM)
    out = bash.communicate(timeout=60)[0]
    assert [rank["heard"] for rank in told(out)] == [[signal.SIGTERM]] * size
    assert bash.returncode == code


def test_restarts_need_somebody_who_watches(tree, tmp_path):
    result = run(["bash", tree / "launch/train.sh", "--max_restarts", "1"], tmp_path, LAUNCHER="none")
    assert result.returncode == 2 and not result.stdout
    assert "max_restarts: with LAUNCHER=none nobody watches the process" in result.stderr


@pytest.mark.parametrize(
    "env, words",
    [
        ({"LAUNCHER": "mpirun", "NPROC": "two"}, ["deepspeed, torchrun, none", "NPROC=two", "wrong: is wrong"]),
        ({"HIGGS_ENGINE_PYTHON": "/no/python"}, ["/no/python is no program"]),
    ],
)
def test_mistakes_are_named_before_anything_starts(tree, tmp_path, env, words):
    result = run(["bash", tree / "launch/train.sh", "--wrong"], tmp_path, **env)
    assert result.returncode == 2 and not result.stdout
    assert all(word in result.stderr for word in words), result.stderr


def test_python_half_names_what_is_missing(tree, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tree, other)
    (other / "engine/cli.py").write_text("import a_package_that_is_missing")
    result = run([sys.executable, other / "launch/train.sh"], tmp_path)
    assert result.returncode == 2 and "a_package_that_is_missing is not installed for" in result.stderr
