"""What launch/train.sh would start, from the environment alone: pure, on machines that exist only here."""

import sys

import pytest

from engine.errors import ConfigError
from engine.launch import machine as machines
from engine.launch.commands import full_command
from engine.launch.machine import Machine
from engine.launch.plan import environment, make_plan

GPUS = Machine("node-a", gpus=4, cores=32)
CPU = Machine("node-a", gpus=0, cores=6)


def words(plan) -> str:
    return " ".join(plan.command)


@pytest.mark.parametrize(
    "env, command, visible",
    [
        ({}, "--num_gpus 4", None),
        ({"NPROC": "2"}, "--num_gpus 2", None),
        # beside --num_gpus DeepSpeed would take the first GPUs of the machine
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7", "NPROC": "2"}, "--include localhost:4,5", None),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, "torch.distributed.run --nproc_per_node 4", "MIG-a,MIG-b"),
    ],
)
def test_gpus_are_counted_and_masks_kept(env, command, visible):
    plan = make_plan(env, GPUS)
    inside = environment(env, plan)
    assert command in words(plan) and "--no_ssh" not in words(plan)
    assert inside.get("CUDA_VISIBLE_DEVICES") == visible and "DS_ACCELERATOR" not in inside
    assert inside["OMP_NUM_THREADS"] == str(32 // plan.total)


def test_without_gpus_two_processes_share_the_cores():
    plan = make_plan({"MASTER_PORT": "1234"}, CPU)
    assert words(plan).endswith("--master_port 1234 --num_gpus 2") and plan.processes == {"node-a": 2}
    assert plan.changes == {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}
    assert make_plan({}, CPU).port != make_plan({}, CPU).port  # two runs on a machine do not meet


def test_gpus_are_asked_of_torch_where_nvidia_smi_lists_any(tmp_path, monkeypatch):
    """A stub of torch says how many, as it is told by the mask; none is a mistake, not a run on the CPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H200'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "torch.py").write_text(
        "import os\nclass cuda:\n    device_count = lambda: len(os.environ['CUDA_VISIBLE_DEVICES'].split(',')) - 1\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    env = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert machines.count_gpus(env) == 2
    assert machines.count_gpus(env | {"DS_ACCELERATOR": "cpu"}) == 0
    assert machines.count_gpus(env | {"CUDA_VISIBLE_DEVICES": ""}) == 0
    with pytest.raises(ConfigError, match="cannot use → install a build"):
        machines.count_gpus(env | {"CUDA_VISIBLE_DEVICES": "0"})


# ---------------------------------------------------------------- several machines


@pytest.fixture
def hosts(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# two\nnode-a slots=2\n\nnode-b slots=3  # newer\n")
    return str(file)


def test_a_hostfile_starts_the_others_by_ssh_or_is_read_on_each(hosts, monkeypatch):
    monkeypatch.setattr("engine.launch.commands._require_ssh", lambda env: None)
    plan = make_plan({"HOSTFILE": hosts}, CPU)
    assert plan.by_ssh and plan.here is None and plan.total == 5 and not plan.meets_others
    assert words(plan).endswith(f"--master_port 29500 --hostfile {hosts}")
    each = make_plan({"HOSTFILE": hosts, "NODE_RANK": "1", "MASTER_ADDR": "first"}, CPU)
    assert words(each).endswith(f"--hostfile {hosts} --master_addr first --no_ssh --node_rank 1")
    assert not each.by_ssh and each.here == 3 and each.meets_others


def test_a_hostfile_of_one_machine_is_run_there(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.launch.commands._require_ssh", lambda env: None)
    (tmp_path / "one").write_text("node-a slots=2\n")
    here = make_plan({"HOSTFILE": str(tmp_path / "one")}, CPU)
    assert words(here).endswith("--master_addr 127.0.0.1 --no_ssh --node_rank 0") and not here.meets_others
    elsewhere = make_plan({"HOSTFILE": str(tmp_path / "one")}, Machine("login", gpus=0, cores=1))
    assert words(elsewhere).endswith("--force_multi") and elsewhere.by_ssh


def test_torchrun_by_number_or_as_they_come():
    both = {"LAUNCHER": "torchrun", "NNODES": "2", "NPROC": "1"}
    static = make_plan(both | {"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "7"}, CPU)
    assert words(static).endswith("--nnodes 2 --node_rank 1 --master_addr first --master_port 7")
    free = make_plan(both | {"MASTER_ADDR": "first"}, CPU)
    assert "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint first:29500 --rdzv_id higgs-engine" in words(free)
    some = both | {"NNODES": "1:4", "RDZV_ENDPOINT": "[::1]:99", "RDZV_ID": "mine"}
    elastic = make_plan(some, CPU)
    assert "--nnodes 1:4 --rdzv_backend c10d --rdzv_endpoint [::1]:99 --rdzv_id mine" in words(elastic)
    assert (elastic.fewest, elastic.total) == (1, 4) and elastic.meets_others


def test_a_task_of_slurm_and_a_pod_know_their_number(monkeypatch):
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "5"}
    monkeypatch.setattr("engine.launch.plan._first_machine", lambda nodelist: "node-a")
    task = make_plan(step | {"SLURM_STEP_ID": "1"}, GPUS)
    assert words(task).endswith("--nnodes 2 --node_rank 1 --master_addr node-a --master_port 10006")
    pod = {"LAUNCHER": "torchrun", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}
    plan = make_plan(pod, GPUS)
    assert words(plan).endswith("--nnodes 2 --node_rank 1 --master_addr pod-0 --master_port 23456")
    assert not {"RANK", "WORLD_SIZE"} & environment(pod, plan).keys()  # they are not the ranks'


def test_arguments_go_to_local_launchers_as_they_are():
    plan = make_plan({"LAUNCHER": "torchrun"}, CPU)
    assert full_command(plan, "a b.sh", ["$x", "'"]) == [*plan.command, "a b.sh", "$x", "'"]
    assert make_plan({"LAUNCHER": "none"}, CPU).command == (sys.executable, "-u")


@pytest.mark.parametrize(
    "env, lines",
    [
        ({"LAUNCHER": "mpirun", "NPROC": "5"}, ["LAUNCHER=mpirun → one of deepspeed", "NPROC=5, but 4 GPUs"]),
        ({"NNODES": "2"}, ["not from NNODES → give HOSTFILE, or LAUNCHER=torchrun", "where to meet → MASTER_ADDR"]),
        ({"LAUNCHER": "torchrun", "NNODES": "4:1"}, ["NNODES=4:1 is no number of machines → as 2, or 1:4"]),
        (
            {"LAUNCHER": "torchrun", "NNODES": "2", "NODE_RANK": "2", "MASTER_PORT": "high", "MASTER_ADDR": "a"},
            ["NODE_RANK=2 → a whole number, from 0 to 1", "port 'high' → a number from 1 to 65535"],
        ),
        # how many machines there are is not known then, so nothing more is wrong with these
        ({"HOSTFILE": "nowhere", "NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "a"}, ["nowhere does not exist"]),
        ({"NODE_RANK": "1"}, ["NODE_RANK=1 of one machine → NNODES or HOSTFILE has to name the others"]),
        ({"LAUNCHER": "none", "NNODES": "2", "MASTER_ADDR": "a"}, ["LAUNCHER=none is a single process"]),
        ({"RDZV_ENDPOINT": "a:1"}, ["RDZV_ENDPOINT=a:1 is for LAUNCHER=torchrun"]),
    ],
)
def test_mistakes_come_all_at_once_with_their_remedies(env, lines):
    with pytest.raises(ConfigError) as caught:
        make_plan(env, GPUS)
    assert len(caught.value.problems) == len(lines)
    assert all(line in problem for line, problem in zip(lines, caught.value.problems, strict=True)), caught.value


def test_each_bad_line_of_a_hostfile_is_named(tmp_path):
    (tmp_path / "hosts").write_text("node-a slots=2\nnode-b 4\nnode-a slots=1\nnode-c slots=0\n")
    with pytest.raises(ConfigError) as caught:
        make_plan({"HOSTFILE": str(tmp_path / "hosts"), "NODE_RANK": "0", "MASTER_ADDR": "node-a"}, GPUS)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == ["line 2", "line 3", "line 4"]


def test_what_ssh_needs_is_asked_for_before(hosts, tmp_path, monkeypatch):
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path / "a folder")
    with pytest.raises(ConfigError) as caught:
        make_plan({"HOSTFILE": hosts, "PATH": str(tmp_path)}, CPU)
    assert [problem.split(maxsplit=1)[0] for problem in caught.value.problems] == ["pdsh", "ssh", "the"]
    assert "a folder, has characters" in caught.value.problems[2]
