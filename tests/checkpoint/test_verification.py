"""`higgs-engine verify` finds every damage, names it, and finds none where there is none."""

import shutil
from pathlib import Path

import pytest
import torch

from engine.backends.tensors import Fragment, write_tensors
from engine.checkpoint.manifest import MANIFEST, describe_files, load_manifest
from tests.checkpoint.small_checkpoints import small_checkpoint, small_model
from tests.commands import command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder and an output folder with two checkpoints of it; tests damage copies."""
    folder = tmp_path_factory.mktemp("verify")
    model = small_model(folder / "model")
    for step in (5, 9):
        small_checkpoint(folder / "out", model, step)
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def complaints(path: Path, *words: object) -> str:
    said = command("verify", path, *words)
    assert said.code == 2, f"found good:\n{said.out}"
    return said.errors


def sealed(folder: Path, **changes) -> None:
    """Writes another manifest, one that is not damaged itself."""
    manifest = load_manifest(folder)
    (folder / MANIFEST).write_text(type(manifest)(**{**vars(manifest), **changes}).to_json())


def test_good_ones_are_said_in_a_line_each(out):
    said = command("verify", out)
    assert said.code == 0 and said.errors == ""
    assert [line.split(":")[0] for line in said.out.splitlines()] == ["checkpoint-5", "checkpoint-9"]
    assert "checkpoint-5: complete, 1.2 MiB, 6 files" in said.out
    assert command("verify", out / "checkpoint-9").out == said.out.splitlines()[1] + "\n"


def test_a_flipped_byte_is_found_in_every_file(out):
    folder = out / "checkpoint-5"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(files) == 6
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4  # no bracket, quote or space becomes another of them
        whole, _ = file.read_bytes(), file.write_bytes(content)
        name = str(file.relative_to(folder))
        errors = complaints(out)
        assert f"checkpoint-5: {name}" in errors and "checkpoint-9" not in errors, name
        file.write_bytes(whole)
    assert command("verify", out).code == 0


def test_a_number_that_was_changed_in_the_manifest_is_found(out):
    file = out / "checkpoint-5" / MANIFEST
    file.write_text(file.read_text().replace('"tokens_seen": 1234', '"tokens_seen": 1235'))
    assert f"checkpoint-5: {MANIFEST}: changed since it was saved" in complaints(out)


def test_all_damage_of_all_checkpoints_in_one_go(out):
    shard = out / "checkpoint-5" / "tensors" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    (out / "checkpoint-5" / "config.yaml").write_text("seed: 1\n")
    (out / "checkpoint-9" / "tensors" / "__0_0.distcp").unlink()
    (out / "checkpoint-9" / "notes.txt").write_text("mine")
    errors = complaints(out)
    size = shard.stat().st_size
    assert f"checkpoint-5: tensors/__0_0.distcp has {size:,} bytes instead of {size + 1:,}" in errors
    assert "checkpoint-5: config.yaml has 8 bytes instead of" in errors
    assert "checkpoint-9: tensors/__0_0.distcp is missing" in errors
    assert "checkpoint-9: notes.txt is not of this checkpoint, the manifest does not know it" in errors
    assert "2 of 2 checkpoint(s)" in errors


def test_more_problems_than_other_errors_show_are_all_told(out):
    for number in range(40):
        (out / "checkpoint-5" / f"{number}.txt").touch()
    assert complaints(out).count("the manifest does not know it") == 40


@pytest.mark.parametrize("number, remedy", [(99, "update the engine"), (1, "take a checkpoint of this version")])
def test_another_format_is_named(out, number, remedy):
    sealed(out / "checkpoint-5", format=number)
    errors = complaints(out)
    assert f"checkpoint-5: checkpoint format {number}, this version reads 2 → {remedy}" in errors


def test_a_renamed_folder_is_found(out):
    (out / "checkpoint-5").rename(out / "checkpoint-6")
    assert "checkpoint-6: manifest.json says step 5" in complaints(out)


def test_tensors_that_were_never_written_in_full(made, out):
    """Hashes are right here: what was written lacks elements, tensors, or has some too many."""
    folder = out / "checkpoint-5"
    shutil.rmtree(folder / "tensors")
    shape = load_manifest(folder).shapes["model.norm.weight"]
    (numel,) = shape
    state = {
        "model.model.norm.weight": Fragment(torch.zeros(numel - 3), 3, numel),
        "exp_avg.model.norm.weight": Fragment(torch.zeros(numel), 0, numel),
        "model.text_lm_head.weight": Fragment.whole(torch.zeros(7)),
        "model.invented": Fragment.whole(torch.zeros(1)),
    }
    write_tensors(state, folder)
    files = {str(p.relative_to(folder)): None for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}
    sealed(folder, files=describe_files(folder, files))
    errors = complaints(folder)
    assert "model.model.norm.weight: elements 0 to 3 are stored nowhere" in errors
    assert "exp_avg.model.norm.weight has no counterpart" in errors
    assert "model.text_lm_head.weight has 7 elements instead of 5,760" in errors
    assert "model.invented is in tensors/, the manifest does not know it" in errors
    assert "model.audio_lm_head.weight is not in tensors/" in errors
    assert "step, the optimizer's counter, is not in tensors/" in errors


def test_a_table_of_contents_that_points_beyond_its_files(made, out):
    folder = out / "checkpoint-5"
    shard = folder / "tensors" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-4096])
    files = {str(p.relative_to(folder)): None for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}
    sealed(folder, files=describe_files(folder, files))
    assert "no file holds all of its part that begins at element 0" in complaints(folder)


def test_the_base_of_adapters_is_known_by_its_weights(made, out):
    other = small_model(out.parent / "other", seed=1)
    weights = {"base_model.model.audio_lm_head.lora_A.default.weight": torch.ones(4, 48)}
    small_checkpoint(out, made / "model", 12, weights, use_lora=True)
    assert command("verify", out / "checkpoint-12", "--base_model_path", made / "model").code == 0
    errors = complaints(out / "checkpoint-12", "--base_model_path", other)
    assert f"checkpoint-12: its adapters were trained on other weights than those of {other}" in errors


def test_the_base_of_a_full_run_is_known_by_its_shapes(made, out):
    assert command("verify", out, "--base_model_path", made / "model").code == 0
    weights = {"model.norm.weight": torch.ones(7), "invented.weight": torch.ones(2, 3)}
    small_checkpoint(out, made / "model", 12, weights)
    errors = complaints(out, "--base_model_path", made / "model")
    assert "checkpoint-12: model.norm.weight has shape (7,), (48,) in" in errors
    assert f"checkpoint-12: invented.weight is not in {made / 'model'}" in errors
    assert f"checkpoint-12: text_lm_head.weight of {made / 'model'} is not in it" in errors
    assert "checkpoint-9" not in errors


def test_ruins_and_dead_pointers_are_said_and_no_error(out):
    (out / "best").write_text("checkpoint-7")
    (out / ".checkpoint-11.incomplete").mkdir()
    said = command("verify", out.parent)
    assert said.code == 0
    assert "out/checkpoint-5: complete" in said.out, "those further down have their path as name"
    assert f"note: {out / 'best'} names checkpoint-7, which is not there" in said.out
    assert f"note: {out / '.checkpoint-11.incomplete'} was left by a save" in said.out


def test_where_there_is_nothing_it_says_so(tmp_path):
    assert "no checkpoint there or below" in complaints(tmp_path)
    assert "checkpoint-3: no manifest.json there" in complaints(tmp_path / "checkpoint-3")
