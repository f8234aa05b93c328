"""Checkpoints are complete or absent, and the right ones are found, kept and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.checkpoint import lifecycle
from engine.checkpoint.lifecycle import Manifest, checkpoints, find, read_manifest, require_same_run, save
from engine.errors import CheckpointError
from engine.runtime.distributed import World

WORLD = World(0, 0, 1, torch.device("cpu"))


def manifest(step: int, **changes) -> Manifest:
    return Manifest(
        **{"step": step, "backend": "none", "world_size": 1, "use_lora": False, "plan": {"seed": 1}} | changes
    )


def write(folder: Path, step: int, keep: int | None = None, shards: bytes = b"weights") -> Path:
    return save(
        folder, manifest(step), WORLD, keep=keep,
        write_shards=lambda draft: (draft / "shard.bin").write_bytes(shards),
        write_once=lambda draft: (draft / "config.yaml").write_text("seed: 1\n"),
    )  # fmt: skip


def silent(_line: str) -> None:
    pass


def test_a_saved_checkpoint_is_complete_and_pointed_at(tmp_path):
    folder = write(tmp_path, 7)
    assert folder == tmp_path / "checkpoint-7"
    assert read_manifest(folder).step == 7
    assert sorted(read_manifest(folder).files) == ["config.yaml", "rng/rank-0.pt", "shard.bin"]
    assert (tmp_path / "latest").read_text() == "checkpoint-7"
    assert not list(tmp_path.glob(".*")), "nothing hidden is left"


def test_a_failed_save_leaves_nothing_under_a_final_name_and_the_last_one_alone(tmp_path):
    write(tmp_path, 1)

    def full_disk(_draft):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left.*last checkpoint is untouched"):
        save(tmp_path, manifest(2), WORLD, keep=1, write_shards=full_disk, write_once=lambda draft: None)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    assert find("auto", tmp_path, silent) == tmp_path / "checkpoint-1"
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".*")), "the next save clears what a failed one left"


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_auto_passes_over_damaged_ones_and_says_so(tmp_path, damage):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    if damage == "truncate":
        (newest / "shard.bin").write_bytes(b"wei")
    elif damage == "remove":
        (newest / "shard.bin").unlink()
    else:
        (newest / "manifest.json").unlink()
    said = []
    assert find("auto", tmp_path, said.append) == tmp_path / "checkpoint-1"
    assert "checkpoint-2" in said[0]
    with pytest.raises(CheckpointError, match=r"checkpoint-2"):
        find(str(newest), tmp_path, silent)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2, shards=b"old") / "shard.bin").write_bytes(b"")
    assert find("auto", tmp_path, silent) == tmp_path / "checkpoint-1"
    again = write(tmp_path, 2, keep=1, shards=b"new weights")
    assert (again / "shard.bin").read_bytes() == b"new weights"
    assert checkpoints(tmp_path) == [again] and read_manifest(again).step == 2


def test_the_one_just_written_is_never_pruned(tmp_path):
    write(tmp_path, 100)
    damaged = write(tmp_path, 200)
    (damaged / "shard.bin").unlink()
    written = write(tmp_path, 110, keep=1)
    assert written.exists() and find("auto", tmp_path, silent) == written


def test_branching_off_needs_another_folder(tmp_path):
    early = write(tmp_path, 5)
    write(tmp_path, 9)
    with pytest.raises(CheckpointError, match=r"checkpoints after checkpoint-5 \(checkpoint-9\).*--output_dir"):
        find(str(early), tmp_path, silent)
    assert find(str(early), tmp_path / "elsewhere", silent) == early


def test_auto_without_checkpoints_starts_afresh(tmp_path):
    assert find("auto", tmp_path / "absent", silent) is None
    assert find("none", tmp_path, silent) is None


def test_a_resume_that_would_not_go_on_exactly_is_refused(tmp_path):
    now = manifest(0, world_size=2, plan={"seed": 2})
    with pytest.raises(CheckpointError) as error:
        require_same_run(manifest(5), now, tmp_path)
    assert "processes: was 1, is 2" in str(error.value) and "seed: was 1, is 2" in str(error.value)
    require_same_run(manifest(5), manifest(0), tmp_path)


def test_a_newer_format_is_named(tmp_path):
    folder = write(tmp_path, 1)
    raw = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="format 99"):
        read_manifest(folder)


def test_pruning_never_leaves_half_a_checkpoint_under_a_final_name(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        lifecycle._remove(tmp_path / "checkpoint-1")
    assert checkpoints(tmp_path) == []
