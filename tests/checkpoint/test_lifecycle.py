"""Checkpoints are complete or absent; the right ones are found, pointed at, kept and refused."""

import dataclasses
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata

from engine.backends.tensors import Fragment, Reader, _TableOfContents
from engine.checkpoint import lifecycle
from engine.checkpoint.lifecycle import checkpoints, find, pointer, require_same_run
from engine.checkpoint.manifest import MANIFEST, SEAL, Manifest, _seal, _text, load_manifest, read_manifest
from engine.checkpoint.saver import Saver
from engine.errors import CheckpointError
from engine.runtime.distributed import World
from tests.processes import run

WORLD = World(0, 0, 1, torch.device("cpu"))


def manifest(step: int, **changes) -> Manifest:
    fields = {
        "step": step, "epoch": 0, "tokens_seen": 0, "backend": "none", "world_size": 1, "use_lora": False, "base": "b",
        "plan": {"seed": 1}, "settings": {}, "versions": {}, "shapes": {"w": [100]},
    }  # fmt: skip
    return Manifest(**fields | changes)


def state(value: float = 1.0) -> dict[str, Fragment]:
    return {"model.w": Fragment.whole(torch.full((100,), value)), "step": Fragment.whole(torch.tensor(value))}


def write_once(draft: Path, _manifest) -> None:
    (draft / "config.yaml").write_text("seed: 1\n")


def saver(folder: Path, keep: int | None = None, keep_every: int | None = None) -> Saver:
    folder.mkdir(exist_ok=True)
    return Saver(folder, WORLD, limit=keep, keep_every=keep_every, background=False, say=silent)


def write(folder: Path, step: int, keep: int | None = None, keep_every: int | None = None, **changes) -> Path:
    saver(folder, keep, keep_every).save(manifest(step, **changes), state(step), write_once)
    return folder / f"checkpoint-{step}"


def silent(_line: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return [p.name for p in checkpoints(folder)]


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("tensors/*.distcp"))


def test_a_saved_checkpoint_is_complete_and_pointed_at(tmp_path):
    folder = write(tmp_path, 7)
    assert read_manifest(folder).step == 7
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == sorted([*read_manifest(folder).files, "manifest.json"])
    assert {"config.yaml", "rng/rank-0.pt", "tensors/.metadata", "tensors/__0_0.distcp"} < set(files)
    assert pointer(tmp_path, "latest") == "checkpoint-7" and pointer(tmp_path, "best") is None
    assert not list(tmp_path.glob(".*")), "nothing hidden is left"


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".checkpoint-1.incomplete" / "tensors").mkdir(parents=True)
    (tmp_path / ".checkpoint-2.removed").mkdir()
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".*")) and names(tmp_path) == ["checkpoint-3"]


# ---------------------------------------------------------------- pruning


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 9, 10):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10"]


def test_the_best_one_and_every_so_many_are_kept_beside_the_newest(tmp_path):
    for step, loss in ((3, 2.0), (5, None), (6, 1.0), (7, 3.0), (8, None), (10, 4.0)):
        write(tmp_path, step, keep=1, keep_every=5, eval_loss=loss)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6", "checkpoint-10"]
    assert pointer(tmp_path, "best") == "checkpoint-6" and pointer(tmp_path, "latest") == "checkpoint-10"


def test_a_better_one_frees_the_old_best(tmp_path):
    write(tmp_path, 1, keep=1, eval_loss=2.0)
    write(tmp_path, 2, keep=1, eval_loss=1.0)
    assert names(tmp_path) == ["checkpoint-2"] and pointer(tmp_path, "best") == "checkpoint-2"


def test_the_one_just_written_is_never_pruned(tmp_path):
    write(tmp_path, 100)
    shard(write(tmp_path, 200)).unlink()
    written = write(tmp_path, 110, keep=1)
    assert written.exists() and find("auto", tmp_path, WORLD, silent) == written


def test_pruning_never_leaves_half_a_checkpoint_under_a_final_name(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def killed(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        lifecycle.remove(tmp_path / "checkpoint-1")
    assert checkpoints(tmp_path) == []


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "manifest"])
def test_auto_passes_over_damaged_ones_and_says_so(tmp_path, damage):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    file = newest / "manifest.json" if damage == "manifest" else shard(newest)
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    said = []
    assert find("auto", tmp_path, WORLD, said.append) == tmp_path / "checkpoint-1"
    assert "checkpoint-2" in said[0] and file.name in said[0]
    with pytest.raises(CheckpointError, match=r"checkpoint-2"):
        find(str(newest), tmp_path, WORLD, silent)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    write(tmp_path, 1)
    shard(write(tmp_path, 2)).write_bytes(b"")
    assert find("auto", tmp_path, WORLD, silent) == tmp_path / "checkpoint-1"
    again = write(tmp_path, 2, keep=1)
    assert checkpoints(tmp_path) == [again] and read_manifest(again).step == 2


def test_if_all_are_damaged_training_does_not_start_afresh(tmp_path):
    for step in (1, 2):
        shard(write(tmp_path, step)).unlink()
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoint\(s\) is complete"):
        find("auto", tmp_path, WORLD, silent)


def test_branching_off_needs_another_folder(tmp_path):
    early = write(tmp_path, 5)
    write(tmp_path, 9)
    with pytest.raises(CheckpointError, match=r"checkpoints after checkpoint-5 \(checkpoint-9\).*--output_dir"):
        find(str(early), tmp_path, WORLD, silent)
    assert find(str(early), tmp_path / "elsewhere", WORLD, silent) == early


def test_auto_without_checkpoints_starts_afresh(tmp_path):
    assert find("auto", tmp_path / "absent", WORLD, silent) is None
    assert find("none", tmp_path, WORLD, silent) is None


# ---------------------------------------------------------------- refusing


IN_ONE_OF_TWO = """
import sys
from pathlib import Path
from engine.checkpoint.lifecycle import find
from engine.runtime.distributed import init_process_group, shutdown
world = init_process_group()
print(find("none", Path(sys.argv[1]), world, print, again=world.rank == 1).name, flush=True)
shutdown(world)
"""


def test_a_run_that_is_started_again_goes_on_wherever_its_launcher_says_so(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    assert find("none", tmp_path, WORLD, silent) is None
    assert find("none", tmp_path, WORLD, silent, again=True) == tmp_path / "checkpoint-2"
    assert find("none", tmp_path / "absent", WORLD, silent, again=True) is None
    _, outputs = run(["-c", IN_ONE_OF_TWO, str(tmp_path)], world_size=2, timeout=60)
    assert [output.split()[-1] for output in outputs] == ["checkpoint-2"] * 2


def test_a_resume_that_would_take_other_steps_is_refused(tmp_path):
    now = manifest(0, world_size=2, backend="fsdp", plan={"seed": 2})
    with pytest.raises(CheckpointError) as error:
        require_same_run(manifest(5), now, tmp_path)
    assert error.value.problems == ["seed: was 1, is 2 → resume with the same"]
    require_same_run(manifest(5), dataclasses.replace(now, plan={"seed": 1}), tmp_path)


def test_what_is_trained_must_stay_and_how_may_change(tmp_path):
    was = {"lora_alpha": 32.0, "lora_dropout": 0.1, "learning_rate": 1e-4, "max_steps": 10}
    now = {"lora_alpha": 16.0, "lora_dropout": 0.0, "learning_rate": 1e-5, "max_steps": 20}
    found, present = manifest(5, settings=was), manifest(0, settings=now)
    with pytest.raises(CheckpointError) as error:
        require_same_run(found, present, tmp_path)
    assert error.value.problems == ["lora_alpha: was 32.0, is 16.0 → resume with the same"]
    changed = dict(lifecycle.changes(found, present, "Optimisation"))
    assert changed == {"learning_rate": (1e-4, 1e-5), "max_steps": (10, 20)}


def test_another_base_matters_to_adapters_only(tmp_path):
    require_same_run(manifest(5), manifest(0, base="other"), tmp_path)
    with pytest.raises(CheckpointError, match="model_path: holds other weights"):
        require_same_run(manifest(5, use_lora=True), manifest(0, use_lora=True, base="other"), tmp_path)


def rewrite(folder: Path, **changes) -> None:
    """Changes a manifest as its writer would have written it, seal and all."""
    content = json.loads((folder / MANIFEST).read_text()) | changes
    content.pop(SEAL)
    (folder / MANIFEST).write_text(_text(content | {SEAL: _seal(content)}))


@pytest.mark.parametrize("found, remedy", [(99, "update the engine"), (1, "the version that wrote it")])
def test_another_format_is_named(tmp_path, found, remedy):
    folder = write(tmp_path, 1)
    rewrite(folder, format=found)
    with pytest.raises(CheckpointError, match=f"format {found}.*{remedy}"):
        load_manifest(folder)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_a_checkpoint_that_reaches_outside_itself_is_refused(tmp_path, name):
    folder = write(tmp_path, 1)
    rewrite(folder, files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(CheckpointError, match="not a path within its folder"):
        load_manifest(folder)


class Pickled:
    """Something whose pickle is that call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("way", ["call", "attribute"])
def test_the_table_of_contents_is_data_and_never_code(tmp_path, way):
    """DCP's is a pickle: one that asks for anything but DCP's own records is refused before it can do harm."""
    folder = write(tmp_path, 1)
    call = Path.touch if way == "call" else Pickled(getattr, (Path, "touch"))
    harm = Pickled(call, (tmp_path / "harm",)) if way == "call" else call
    (folder / "tensors" / ".metadata").write_bytes(pickle.dumps(harm))
    with pytest.raises(CheckpointError, match="has no place in a checkpoint"):
        Reader(folder)
    assert not (tmp_path / "harm").exists()


def test_a_table_of_contents_of_any_python_is_read(tmp_path):
    """Early releases of Python 3.11 pickle DCP's enumeration by the name of its member."""
    member = metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    content = pickle.dumps(Pickled(getattr, (metadata._MEM_FORMAT_ENCODING, member.name)))
    assert _TableOfContents(io.BytesIO(content)).load() is member
