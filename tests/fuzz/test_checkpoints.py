"""Checkpoints: read, or a CheckpointError that says what is wrong; their table of contents, a pickle, runs nothing."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.inspection import inspect
from engine.checkpoint.manifest import MANIFEST, SEAL, Manifest, load_manifest, parse_manifest, read_manifest
from engine.checkpoint.stored import StoredWeights
from engine.checkpoint.verification import verify
from engine.errors import CheckpointError
from tests.checkpoint.small_checkpoints import small_checkpoint, small_model
from tests.fuzz.hostile import as_json, changed, damaged
from tests.fuzz.watched import inputs, little_memory, outcome


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint = small_checkpoint(folder / "out", small_model(folder / "model"))
    with little_memory():
        check(checkpoint, MANIFEST, (checkpoint / MANIFEST).read_bytes(), sound=True)
        yield checkpoint


def sealed(raw) -> bytes:
    """A manifest as another program would write it: its hash of itself is right."""
    if isinstance(raw, dict):
        raw.pop(SEAL, None)
        text = json.dumps(json.loads(json.dumps(raw)), indent=1)
        raw = raw | {SEAL: hashlib.sha256(text.encode()).hexdigest()}
    return as_json(raw)


def use(folder: Path) -> None:
    """What commands do with a checkpoint that they trust no further than its hashes."""
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest)
    weights = StoredWeights(folder, manifest)
    for name in sorted(weights.shapes)[:3]:
        weights.read(name)


def check(checkpoint: Path, name: str, content: bytes, sound: bool = False) -> None:
    file = checkpoint / name
    before = file.read_bytes()
    try:
        file.write_bytes(content)
        for read in (
            lambda: use(checkpoint),
            lambda: verify(checkpoint, say=lambda line: None),
            lambda: list(inspect(checkpoint)) and None,
        ):
            found = outcome(read)
            assert found is None or not sound and isinstance(found, CheckpointError), found
    finally:
        file.write_bytes(before)


@inputs(400)
@given(st.data(), st.booleans())
def test_manifests_with_odd_values(checkpoint, data, is_sealed):
    raw = json.loads((checkpoint / MANIFEST).read_text())
    raw["files"] = dict(list(raw["files"].items())[:4])
    raw["shapes"] = dict(list(raw["shapes"].items())[:3])
    tree = data.draw(changed(raw))
    content = sealed(tree) if is_sealed else as_json(tree)
    found = outcome(lambda: parse_manifest(content.decode(), checkpoint / MANIFEST))
    assert isinstance(found, Manifest | CheckpointError)


@inputs(60)
@given(st.data())
def test_checkpoints_whose_manifest_is_odd(checkpoint, data):
    raw = json.loads((checkpoint / MANIFEST).read_text())
    check(checkpoint, MANIFEST, sealed(data.draw(changed(raw))))


@inputs(100)
@given(st.data())
def test_damaged_manifests(checkpoint, data):
    content = data.draw(damaged((checkpoint / MANIFEST).read_bytes()))
    before = (checkpoint / MANIFEST).read_bytes()
    (checkpoint / MANIFEST).write_bytes(content)
    found = outcome(lambda: load_manifest(checkpoint))
    (checkpoint / MANIFEST).write_bytes(before)
    assert isinstance(found, Manifest | CheckpointError)


@inputs(60)
@given(st.data())
def test_damaged_tensors(checkpoint, data):
    """The table of contents, and the files that it leads to; the manifest says that they are as they should be."""
    files = sorted(path for path in (checkpoint / "tensors").iterdir())
    file = data.draw(st.sampled_from((files[0], *files)))
    content = data.draw(damaged(file.read_bytes()))
    raw = json.loads((checkpoint / MANIFEST).read_text())
    raw["files"][f"tensors/{file.name}"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    before = (checkpoint / MANIFEST).read_bytes()
    try:
        (checkpoint / MANIFEST).write_bytes(sealed(raw))
        check(checkpoint, f"tensors/{file.name}", content)
    finally:
        (checkpoint / MANIFEST).write_bytes(before)
