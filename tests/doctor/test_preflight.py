"""The checks before training, by two processes that play two machines: what is wrong with one is told to both."""

import json
import time
from pathlib import Path

import pytest
import torch

from engine.config import Settings
from engine.doctor.preflight import preflight, require
from engine.errors import ConfigError
from engine.runtime.distributed import World
from tests.commands import flags
from tests.processes import run

WORKER = Path(__file__).parent / "worker.py"
TOLD = {
    "nullcontext": [],
    "other_version": ["versions: transformers is ", "but 9.9.9 on rank 1 (node-1) → install"],
    "other_code": ["code: the engine is ", "but another on rank 1 (node-1) → install"],
    "other_data": ["train_data_file: ", "is other content (another) on rank 1 (node-1) → copy"],
    "other_clock": ["clock: that of node-1 (rank 1) is 100.0 s ahead of that of node-0 (rank 0) → set"],
    "few_files": ["limits: nofile is 64 for rank 1 (node-1), 68 are needed → raise"],
    "not_shared": ["is not shared: what rank 0 (node-0) wrote is not seen by rank 1 (node-1) → put output_dir on"],
    "not_writable": ["rank 1 (node-1) cannot write there: Read-only file system → give a folder"],
    "fails_to_take_part": ["2 processes are expected; rank 1 did not come in 2 s. Here: node-0 (rank 0) → were"],
}  # fmt: skip


@pytest.fixture(scope="module")
def preflights(demo, tmp_path_factory) -> tuple[list[dict], Path]:
    """name of a trouble -> what each of two ranks was told, and seconds; and the output folder."""
    out = tmp_path_factory.mktemp("run")
    data = demo.data_file.parent
    settings = flags(model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path, train_data_file=data)
    _, outputs = run([str(WORKER), "preflight", str(out), *settings], world_size=2)
    lines = [[json.loads(line) for line in output.splitlines() if line.startswith('["')] for output in outputs]
    return [{name: (told, seconds) for name, told, seconds in of_rank} for of_rank in lines], out


@pytest.mark.parametrize("trouble", TOLD)
def test_the_machine_that_differs_is_named_on_all_ranks(preflights, trouble):
    (told, _), (other, _) = (rank[trouble] for rank in preflights[0])
    assert [len(told), other] == [bool(TOLD[trouble]), [] if trouble == "fails_to_take_part" else told]
    assert all(words in told[0] for words in TOLD[trouble]), told


def test_it_is_quick_and_leaves_nothing_behind(preflights):
    ranks, out = preflights
    assert max(rank["other_clock"][1] for rank in ranks) < 2, "a tenth of a second on a machine that is not busy"
    assert [path.name for path in out.rglob("*") if path.is_file()] == []


def test_alone_it_needs_no_store(tmp_path):
    world = World(0, 0, 1, torch.device("cpu"))
    began = time.monotonic()
    findings = preflight(Settings(output_dir=str(tmp_path / "new" / "run")), world)
    assert time.monotonic() - began < 2
    assert [str(finding) for finding in findings if finding.section == "files" and finding.level != "ok"] == []
    assert list(tmp_path.iterdir()) == []
    require(findings)


def test_where_nobody_can_write_the_run_does_not_start():
    findings = preflight(Settings(output_dir="/proc/run"), World(0, 0, 1, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"cannot run(?s:.*)/proc/run \(not there yet.*rank 0 \(.*cannot write there"):
        require(findings)
