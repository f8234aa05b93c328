"""launch/slurm.sbatch with stubs of srun and scontrol: what the tasks are given, and when the job is queued again."""

import os
import subprocess

import pytest

from tests.processes import ROOT

STUBS = {
    "srun": 'printf "%s\\n" "$@" >"$SAID/words"; echo "$MASTER_ADDR:$MASTER_PORT" >"$SAID/place"; exit "$CODE"',
    "scontrol": """case "$1 $2" in
        "show hostnames") printf "node-a\\nnode-b\\n" ;;
        "show job") echo "JobId=7 JobState=$STATE Reason=None" ;;
        *) echo "$@" >"$SAID/$1" ;;
    esac""",
}


@pytest.fixture
def job(tmp_path):
    """The batch script with some arguments: its exit code, the words behind srun's options, whether it was requeued."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, code: int = 0, state: str = "RUNNING", **env: str) -> tuple[int, list[str], bool]:
        known = {"SLURM_SUBMIT_DIR": str(tmp_path / "a b"), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]"}
        known |= {"SLURM_CPUS_PER_TASK": "12", "SAID": str(tmp_path), "CODE": str(code), "STATE": state}
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(ROOT / "launch/slurm.sbatch"), *arguments], env={"PATH": path} | known | env, cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        words = (tmp_path / "words").read_text().splitlines()
        return done.returncode, words[words.index("bash") + 1 :], (tmp_path / "requeue").exists()

    return run


def test_tasks_are_given_the_arguments_as_they_are_and_the_first_machine(job, tmp_path):
    train_sh = str(tmp_path / "a b" / "launch/train.sh")
    assert job("--config", "a b.yaml", "it's $HOME") == (0, [train_sh, "--config", "a b.yaml", "it's $HOME"], False)
    assert (tmp_path / "place").read_text() == "node-a:10007\n"
    assert (tmp_path / "a b" / "higgs-7").is_dir()  # one log a task
    assert "--cpus-per-task=12" in (tmp_path / "words").read_text()


@pytest.mark.parametrize("code, state, again", [
    (75, "RUNNING", True), (138, "RUNNING", True), (75, "CANCELLED", False), (1, "RUNNING", False),
    (76, "RUNNING", False),
])  # fmt: skip
def test_a_job_that_was_told_to_leave_is_queued_again(job, code, state, again):
    assert job("--config", "x", code=code, state=state)[::2] == (code, again)


def test_a_later_start_goes_on_from_the_last_checkpoint(job):
    assert job("--config", "x", SLURM_RESTART_COUNT="1")[1][1:] == ["--config", "x", "--resume", "auto"]
    assert job("prepare", "--out", "x", SLURM_RESTART_COUNT="1")[1][1:] == ["prepare", "--out", "x"]
