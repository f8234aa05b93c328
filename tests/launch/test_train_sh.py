"""launch/train.sh under every launcher: a stub in the engine's place tells what reached it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FOREIGN = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CROSS_", "GROUP_", "SLURM_", "OMPI_", "TORCHELASTIC_"),
    *("NPROC", "NNODES", "NODE_RANK", "LAUNCHER", "HOSTFILE", "OMP_NUM_THREADS", "PYTHONPATH"),
)

# One write to stdout per process: lines of two ranks do not mix.
STUB = """
import json, os, signal, sys, time

def main(arguments):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    told = {name: os.environ.get(name) for name in names}
    told |= {"arguments": arguments, "cwd": os.getcwd(), "path": sys.path[0]}
    os.write(1, (json.dumps(told) + chr(10)).encode())
    if "--fail" in arguments:
        return 3 if told["RANK"] == "1" else time.sleep(30)
    if "--wait" in arguments:
        def save_and_leave(number, frame):
            time.sleep(1)
            os.write(1, (json.dumps({"signal": number, "RANK": told["RANK"]}) + chr(10)).encode())
            sys.exit(int(arguments[2]))
        signal.signal(signal.SIGTERM, save_and_leave)
        os.write(1, b'{"ready": 1}' + b"\\n")
        time.sleep(30)
        return 9
    return 0
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A repository with the real launch/ and a stub engine, at a path with a space."""
    top = tmp_path_factory.mktemp("tree") / "my repository"
    shutil.copytree(LAUNCH, top / "launch")
    (top / "engine").mkdir()
    (top / "engine" / "__init__.py").touch()
    (top / "engine" / "cli.py").write_text(STUB)
    (top / "engine" / "__main__.py").write_text("import sys, engine.cli\nengine.cli.main(sys.argv[1:])")
    return top


def environment(**more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return env | {"DS_ACCELERATOR": "cpu", "HIGGS_ENGINE_PYTHON": sys.executable} | more


def run(command: list, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=90)


def start(tree: Path, *arguments: str, cwd: Path, **env: str) -> subprocess.Popen:
    command = ["bash", str(tree / "launch/train.sh"), *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment(**env), stdout=subprocess.PIPE, text=True)


def told(stdout: str) -> list[dict]:
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: int(line["RANK"] or 0))


AWKWARD = ["--config", "a b.yaml", "it's", 'say "hi"', "$HOME", "*", "", "back\\slash", "ümläut", "--x=1 2"]
MODULE = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


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


@pytest.mark.parametrize("launcher, ranks", [("none", [None]), ("torchrun", ["0", "1"])])
def test_prepare_as_the_first_word_prepares_on_all_ranks(tree, tmp_path, launcher, ranks):
    result = run(
        ["bash", tree / "launch/train.sh", "prepare", "--out", *AWKWARD], tmp_path, LAUNCHER=launcher, NPROC="2"
    )
    found = [(rank["RANK"], rank["arguments"]) for rank in told(result.stdout)]
    assert found == [(rank, ["prepare", "--out", *AWKWARD]) for rank in ranks], result.stderr


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


def test_demo_and_help_need_no_launcher(tree, tmp_path):
    script = tree / "launch/train.sh"
    commands = [([], ["demo"]), (["demo", "a b"], ["demo", "a b"]), (["--help"], ["train", "--help"])]
    for arguments, command in commands:
        result = run(["bash", script, *arguments], tmp_path)
        assert told(result.stdout)[0]["arguments"] == command
    assert "NPROC" in result.stdout


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_failing_rank_ends_the_run(tree, tmp_path, launcher):
    started = time.monotonic()
    result = run(["bash", tree / "launch/train.sh", "--fail"], tmp_path, LAUNCHER=launcher, NPROC="2")
    assert result.returncode == (3 if launcher == "deepspeed" else 1)  # torchrun has one code for all
    assert time.monotonic() - started < 25


@pytest.mark.parametrize("launcher, code", [("deepspeed", 0), ("deepspeed", 5), ("torchrun", 0), ("none", 5)])
def test_sigterm_reaches_the_ranks_and_waits_for_them(tree, tmp_path, launcher, code):
    size = 1 if launcher == "none" else 2
    bash = start(tree, "--wait", str(code), cwd=tmp_path, LAUNCHER=launcher, NPROC=str(size))
    for _ in range(2 * size):
        line = bash.stdout.readline()
    assert line
    bash.send_signal(signal.SIGTERM)
    heard = told(bash.communicate(timeout=60)[0])
    assert [rank["signal"] for rank in heard] == [signal.SIGTERM] * size
    assert bash.returncode == code


@pytest.mark.parametrize(
    "env, words",
    [
        ({"LAUNCHER": "mpirun"}, "one of deepspeed, torchrun, none"),
        ({"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere does not exist"),
        ({"NNODES": "2"}, "HOSTFILE, not from NNODES"),
        ({"HIGGS_ENGINE_PYTHON": "/no/python"}, "/no/python is no program"),
    ],
)
def test_mistakes_are_named(tree, tmp_path, env, words):
    result = run(["bash", tree / "launch/train.sh", "--config", "x"], tmp_path, **env)
    assert result.returncode == 1 and words in result.stderr


def test_python_half_names_what_is_missing(tree, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tree, other)
    (other / "engine/cli.py").write_text("import a_package_that_is_missing")
    result = run([sys.executable, other / "launch/train.sh"], tmp_path)
    assert result.returncode == 1 and "a_package_that_is_missing is not installed for" in result.stderr


PYTHON_OF_FOUR_GPUS = """#!/bin/bash
case "$*" in
    *device_count*) echo 4 ;;
    *socket*) echo 5555 ;;
    "- "*) ;;
    *) echo "mask=${CUDA_VISIBLE_DEVICES-none} accelerator=${DS_ACCELERATOR-none} $*" ;;
esac
"""


@pytest.mark.parametrize(
    "env, words",
    [
        ({}, ["mask=none accelerator=none", "--num_gpus 4", "--master_port 5555"]),
        ({"NPROC": "2"}, ["--num_gpus 2"]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7", "NPROC": "2"}, ["mask=none", "--include localhost:4,5"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, ["mask=MIG-a,MIG-b", "torch.distributed.run"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["mask= accelerator=cpu", "--num_gpus 2"]),
        ({"DS_ACCELERATOR": "cpu"}, ["mask= accelerator=cpu", "--num_gpus 2"]),
        ({"NPROC": "5"}, ["NPROC=5, but 4 GPUs are visible"]),
    ],
)
def test_gpus_are_counted_and_masks_kept(tree, tmp_path, env, words):
    """On a machine that pretends: its nvidia-smi lists a GPU, its python tells how it was called."""
    for name, text in [("nvidia-smi", "#!/bin/bash\necho 'GPU 0: H200'\n"), ("python", PYTHON_OF_FOUR_GPUS)]:
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    fake = environment(HIGGS_ENGINE_PYTHON=str(tmp_path / "python"))
    del fake["DS_ACCELERATOR"]
    fake.pop("CUDA_VISIBLE_DEVICES", None)
    command = ["bash", str(tree / "launch/train.sh"), "--config", "x"]
    result = subprocess.run(command, env=fake | env, capture_output=True, text=True, timeout=30)
    assert all(word in result.stdout + result.stderr for word in words), result
