"""A manifest says what it was told, is refused when it is not what was written, and finds what is wrong beside it."""

import dataclasses
import hashlib
import json
import math

import pytest

from engine.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    content_problems,
    describe_files,
    extra_files,
    hash_file,
    load_manifest,
    parse_manifest,
    read_manifest,
    versions,
)
from engine.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    """Two files and their manifest."""
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors" / "a.distcp").write_bytes(b"weights")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    manifest = Manifest(
        step=3, epoch=0, tokens_seen=10, backend="none", world_size=1, use_lora=False, base="ab", plan={"seed": 1},
        settings={"learning_rate": 1e-5, "betas": (0.9, 0.95)}, versions=versions(), eval_loss=1 / 3,
        shapes={"norm.weight": [4]}, files=describe_files(tmp_path, ["tensors/a.distcp", "config.yaml"]),
    )  # fmt: skip
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    return tmp_path


def rewritten(folder, change) -> None:
    """As a hand or a disk would change it: the hash stays that of before."""
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))


def resealed(folder, **changes) -> str:
    """As another program would write it: the hash is right."""
    manifest = load_manifest(folder)
    content = json.loads(manifest.to_json()) | changes
    content.pop("sha256")
    content["sha256"] = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps(content)


def test_it_reads_back_what_it_was_told(folder):
    manifest = read_manifest(folder)
    assert manifest.step == 3 and manifest.eval_loss == 1 / 3 and manifest.shapes == {"norm.weight": [4]}
    assert manifest.settings == {"learning_rate": 1e-5, "betas": [0.9, 0.95]}
    assert parse_manifest(manifest.to_json(), folder / MANIFEST) == manifest


def test_numbers_that_json_has_no_name_for(folder):
    manifest = dataclasses.replace(load_manifest(folder), eval_loss=math.inf)
    assert parse_manifest(manifest.to_json(), folder / MANIFEST).eval_loss == math.inf


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(step=4),
        lambda raw: raw["settings"].update(learning_rate=1e-4),
        lambda raw: raw["files"]["config.yaml"].update(bytes=9),
        lambda raw: raw.pop("sha256"),
        lambda raw: raw.pop("plan"),
    ],
)
def test_it_is_refused_when_it_is_not_what_was_written(folder, change):
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: changed since it was saved.*→"):
        load_manifest(folder)


def test_layout_is_no_content(folder):
    rewritten(folder, lambda raw: None)
    assert "\n" not in (folder / MANIFEST).read_text()
    assert load_manifest(folder).step == 3


def test_other_formats_are_named_before_anything_else(folder):
    rewritten(folder, lambda raw: raw.update(format=3))
    with pytest.raises(CheckpointError, match="format 3, this version reads 2 → update the engine"):
        load_manifest(folder)
    rewritten(folder, lambda raw: raw.update(format=1))
    with pytest.raises(CheckpointError, match="format 1.*→ take a checkpoint of this version"):
        load_manifest(folder)


def test_paths_that_lead_out_of_the_checkpoint_are_refused(folder):
    for name in ("../secret", "/etc/passwd", "tensors/../../secret"):
        text = resealed(folder, files={name: {"bytes": 1, "sha256": ""}})
        with pytest.raises(CheckpointError, match="not a path within its folder"):
            parse_manifest(text, folder / MANIFEST)


def test_entries_that_are_unknown_or_of_the_wrong_kind(folder):
    for changes, problem in (
        ({"mood": "good"}, "mood is unknown"),
        ({"files": ["a"]}, "files: "),
        ({"files": None}, "files: "),
    ):
        with pytest.raises(CheckpointError, match=problem):
            parse_manifest(resealed(folder, **changes), folder / MANIFEST)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "3"])
def test_what_is_no_manifest(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: damaged"):
        load_manifest(folder)


def test_sizes_hashes_and_strangers(folder):
    manifest = load_manifest(folder)
    assert content_problems(folder, manifest) == [] and extra_files(folder, manifest) == []
    (folder / "tensors" / "a.distcp").write_bytes(b"weightz")
    (folder / "tensors" / "b.distcp").touch()
    assert read_manifest(folder), "sizes are those that were saved"
    (problem,) = content_problems(folder, manifest)
    assert problem.startswith("tensors/a.distcp has changed since it was saved")
    assert content_problems(folder, manifest, ["config.yaml"]) == []
    assert extra_files(folder, manifest) == ["tensors/b.distcp"]
    (folder / "tensors" / "a.distcp").write_bytes(b"weig")
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError) as error:
        read_manifest(folder)
    assert error.value.problems == ["config.yaml is missing", "tensors/a.distcp has 4 bytes instead of 7"]


def test_hashes_are_those_of_sha256sum(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * 40_000)  # longer than what is read at once
    seen = []
    assert hash_file(file, seen.append) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sum(seen) == file.stat().st_size and len(seen) > 1
