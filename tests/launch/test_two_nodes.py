"""launch/two_nodes_test.sh: two machines made of namespaces; it compares, it cleans up, it says why it cannot."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPT = str(ROOT / "launch" / "two_nodes_test.sh")
ENVIRONMENT = os.environ | {"HIGGS_ENGINE_PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"}


def run(demo, *options: str) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, "--demo", str(demo.data_file.parent.parent), *options]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    if result.returncode == 77:
        pytest.skip(result.stderr)
    return result


@pytest.mark.slow
def test_two_machines_train_as_one_does(demo):
    result = run(demo)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["fsdp", "zero3"]
    assert all("equal in every digit" in " ".join(row) for row in rows)


@pytest.mark.slow
def test_both_machines_end_when_the_wire_between_them_is_cut(demo):
    result = run(demo, "--cut")
    assert result.returncode == 0, result.stdout + result.stderr
    ended = re.findall(r"node-(.) ended (\d+) s after the wire was cut, with exit code (\d+)", result.stdout)
    assert [(node, code) for node, _, code in ended] == [("a", "4"), ("b", "4")], result.stdout
    assert result.stdout.count("the run hangs") == 2


def test_killed_halfway_it_leaves_no_process_behind(demo, tmp_path):
    out = str(tmp_path / "out of two")
    command = ["bash", SCRIPT, "--demo", str(demo.data_file.parent.parent), "--out", out, "--cut"]
    script = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not {"--nnodes", f"{out}/cut"} <= words_of_processes(f"{out}/cut"):
        if script.poll() == 77:
            pytest.skip(script.stdout.read())
        assert script.poll() is None and time.monotonic() < deadline, script.stdout.read()
        time.sleep(0.1)
    script.kill()
    script.wait()
    deadline = time.monotonic() + 10
    while words_of_processes(f"{out}/cut"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def words_of_processes(word: str) -> set[str]:
    """All words of the command lines, of any process of this machine, that have `word` among them."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # just ended
            continue
        found |= set(words) if word in words else set()
    return found


@pytest.mark.parametrize(
    "unshare, reason",
    [
        (None, "unshare is not installed"),
        ("echo unshare: unshare failed: Operation not permitted >&2; exit 1", "not allowed here: unshare: unshare fa"),
    ],
)
def test_where_namespaces_are_not_allowed_it_says_why(tmp_path, unshare, reason):
    for tool in ("uname", "dirname", "nsenter", "setpriv"):
        (tmp_path / tool).write_text('#!/bin/sh\nPATH=/usr/bin:/bin\nexec "$(basename "$0")" "$@"\n')
    (tmp_path / "ip").write_text("#!/bin/sh\n")
    if unshare:
        (tmp_path / "unshare").write_text(f"#!/bin/sh\n{unshare}\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    result = subprocess.run(
        ["/bin/bash", SCRIPT], env=ENVIRONMENT | {"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (77, "")
    assert reason in result.stderr


def test_it_says_what_it_does_and_what_it_does_not_know(tmp_path):
    told = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--all" in told.stdout
    (tmp_path / "mine").touch()
    for option in (["--al"], ["--out", str(tmp_path)], ["--demo"]):
        refused = subprocess.run(["bash", SCRIPT, *option], env=ENVIRONMENT, capture_output=True, text=True)
        assert refused.returncode == 1 and refused.stderr.startswith("error: "), option
