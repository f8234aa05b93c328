"""A folder that leaves is whole, verified and survives a kill; a wrong one never gets its name."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.export import model_folder, reopened, shards
from engine.export.model_folder import copy_side_files, drafted, publish, write_model_folder
from engine.export.shards import parse_size, plan_shards
from engine.model.safetensors_writer import Spec
from engine.model.weights import WeightFiles


@pytest.fixture(scope="module")
def source(golden_model, tmp_path_factory):
    """Weights of the golden model, and a folder with its side files."""
    files, side = WeightFiles(golden_model), tmp_path_factory.mktemp("side")
    copy_side_files(files, side)
    return files, side


def write(source, out, read=None, **more) -> list[str]:
    files, side = source
    said: list[str] = []
    write_model_folder(out, side, files.shapes, read or files.read, torch.bfloat16, say=said.append, **more)
    return said


def test_it_says_what_was_verified(source, tmp_path):
    said = write(source, tmp_path / "out")
    assert said == [
        f"writing 33 tensors, 0.00 GB, to {tmp_path / 'out'}",
        "verified: 33 tensors, logits of 25 text and 21 audio positions equal",
    ]
    assert write(source, tmp_path / "bits", logits=False)[-1] == "verified: 33 tensors"


def damaged(change):
    """The writer of shards, and then something happens to its file."""

    def write_shards(folder, *arguments):
        checksums = shards.write_shards(folder, *arguments)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return checksums

    return write_shards


NORM, HEAD = "model.layers.1.input_layernorm.weight", "audio_lm_head.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), f"{NORM} is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is not part of the model"),
        (lambda t: t.update({HEAD: t[HEAD].half()}), f"{HEAD} has .*float16.* in place of .*bfloat16"),
        (lambda t: t.update({NORM: t[NORM][:-1].clone()}), f"{NORM} has shape"),
        (lambda t: t[HEAD][8207].neg_(), f"{HEAD} has other values than were written"),
        (lambda t: t[NORM].add_(1), f"{NORM} has other values than were written"),
    ],
)
def test_files_that_are_not_what_was_written_are_no_folder(change, message, source, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "write_shards", damaged(change))
    with pytest.raises(CheckpointError, match=f"(?s)out.*{message}"):
        write(source, tmp_path / "out")
    assert not list(tmp_path.iterdir()), "neither the folder nor its draft"


def test_a_source_that_is_read_otherwise_the_second_time_is_named(source, tmp_path):
    asked = []

    def read(name):
        asked.append(name)
        return source[0].read(name) * (2 if asked.count(HEAD) > 1 and name == HEAD else 1)

    with pytest.raises(CheckpointError, match=f"logits differ from those of the source; {HEAD} is not what"):
        write(source, tmp_path / "out", read)
    assert not list(tmp_path.iterdir())


def test_weights_under_each_others_names_differ_in_their_logits(source, monkeypatch):
    """Bits are as they were, only the names are wrong: what the comparison of logits is there for."""
    files = source[0]
    one, other = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    specs = {name: Spec(shape, torch.float32) for name, shape in files.shapes.items()}
    swapped = {one: other, other: one}
    with pytest.raises(CheckpointError, match=f"logits differ.*{one}"):
        reopened._verify_logits(files, specs, lambda name: files.read(swapped.get(name, name)))


def test_a_diverged_model_is_written_all_the_same(source, tmp_path):
    """Not a number is not equal to itself; its bits are."""
    write(source, tmp_path / "out", lambda name: source[0].read(name) * float("nan"))
    assert load_file(tmp_path / "out" / "model.safetensors")[HEAD].isnan().all()


def test_what_stood_there_goes_only_when_the_new_one_is_in_place(source, tmp_path):
    write(source, tmp_path / "out")
    (tmp_path / "out" / "mine").write_text("")

    def read(name):
        assert (tmp_path / "out" / "mine").exists()
        return source[0].read(name)

    write(source, tmp_path / "out", read)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize("there", [False, True])
def test_leftovers_of_killed_attempts_are_cleared(there, tmp_path):
    """Killed before the renames, between them (then the only whole folder is the replaced one), or after them."""
    out = tmp_path / "out"
    for left in (".out.incomplete", ".out.replaced", *(["out"] if there else [])):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("old")
    with drafted(out) as draft:
        assert not list(draft.iterdir())
        (draft / "file").write_text("new")
        assert (tmp_path / ".out.replaced").is_dir(), "perhaps the only whole one"
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "file").read_text() == "new"


def test_an_error_leaves_what_stood_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with pytest.raises(CheckpointError, match="out failed: .*No space left.* → make room"), drafted(out) as draft:
        (draft / "file").write_text("new")
        raise OSError(28, os.strerror(28))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "file").read_text() == "old"


def killed_at_rename(out: Path, number: int) -> None:
    """Publishes a folder, and dies when it would rename for that time."""
    renames, rename = [], os.rename

    def counted(old, new):
        renames.append(new)
        if len(renames) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)

    os.rename = counted
    with drafted(out) as draft:
        (draft / "file").write_text("new")


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path):
    """At each rename; the next attempt succeeds and clears."""
    for number in (1, 2):
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        (out / "file").write_text("old")
        process = multiprocessing.get_context("fork").Process(target=killed_at_rename, args=(out, number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        whole = [p for p in out.parent.iterdir() if p.name in ("out", ".out.replaced")]
        assert len(whole) == 1 and (whole[0] / "file").read_text() == "old"
        with drafted(out) as draft:
            (draft / "file").write_text("newer")
        assert [p.name for p in out.parent.iterdir()] == ["out"] and (out / "file").read_text() == "newer"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(model_folder, "sync", lambda path: done.append(path.name))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"rename {Path(new).name}"), rename(old, new)))
    draft = tmp_path / "draft"
    (draft / "inner").mkdir(parents=True)
    (draft / "inner" / "file").write_text("")
    publish(draft, tmp_path / "out")
    assert sorted(done[:3]) == ["draft", "file", "inner"] and done[3:] == ["rename out", tmp_path.name]


def test_no_room_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(CheckpointError, match="0.0 GB are needed, 0.0 GB are free → make room"):
        write(source, tmp_path / "out", read=lambda name: pytest.fail("reads already"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2GiB", 2 * 2**30), ("10 KB", 10**4)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "-1GB", "5Gb", "5 GB or so", ""])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="max_shard_size: .* is no size → write it as 5GB"):
        parse_size(text)


def test_shards_are_filled_in_order_and_a_large_tensor_has_one_of_its_own():
    specs = {name: Spec((size,), torch.int8) for name, size in dict(a=4, b=6, c=1, d=30, e=5, f=5).items()}
    assert plan_shards(specs, 10) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert plan_shards(specs, 1000) == [list("abcdef")]


def test_the_index_names_every_tensor_and_the_size(source, tmp_path):
    write(source, tmp_path / "out", max_shard_bytes=500_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {file: set(load_file(tmp_path / "out" / file)) for file in set(index["weight_map"].values())}
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert sum(map(len, files.values())) == len(index["weight_map"]) == 33
    assert index["metadata"]["total_size"] == 2 * sum(torch.Size(s).numel() for s in source[0].shapes.values())
