"""validate, prepare, convert and training from what they made, as users meet them on the command line."""

import json
import shutil
from pathlib import Path

import pytest

from engine.cli import COMMANDS
from engine.data.formats import read_conversations
from engine.data.store import Store
from engine.model.weights import load_tokenizer
from tests.commands import command, done
from tests.conftest import FIXTURES

SPLIT = 12  # rows of the first of two data files


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("codes")


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory) -> list[Path]:
    """The demo's rows as two data files, with their recordings beside them."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(demo.data_file.parent / "audio", folder / "audio")
    rows = json.loads(demo.data_file.read_text())
    files = [folder / "one.json", folder / "two.json"]
    for file, part in zip(files, (rows[:SPLIT], rows[SPLIT:]), strict=True):
        file.write_text(json.dumps(part))
    return files


@pytest.fixture(scope="module")
def making(demo, codes) -> dict:
    """What turns recordings into samples."""
    return dict(model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path, codes_cache_dir=codes)


@pytest.fixture(scope="module")
def stores(data, making, tmp_path_factory) -> list[Path]:
    out = tmp_path_factory.mktemp("prepared") / "stores"
    said = done("prepare", out=out, train_data_file=data, **making)
    assert "next: train with --train_data_file STORE" in said
    made = [out / "one", out / "two"]
    assert all(f"store: {store}\n" in said for store in made)
    assert [len(Store(store)) for store in made] == [SPLIT, 20 - SPLIT]
    return made


@pytest.fixture
def run(demo, tmp_path) -> dict:
    """A run of two steps, to be given its data."""
    return dict(
        model_path=demo.model_path, backend="none", output_dir=tmp_path / "out", max_steps=2, eval_steps=1,
        per_device_train_batch_size=1, dataloader_num_workers=0, logging_steps=1,
    )  # fmt: skip


def metrics(run: dict) -> list[dict]:
    return [json.loads(line) for line in (run["output_dir"] / "metrics.jsonl").read_text().splitlines()]


def losses(run: dict) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


# ---------------------------------------------------------------- training from stores


def test_a_store_is_trained_without_the_codec_as_its_data_file_is(data, stores, making, run, tmp_path):
    said = done("train", **run, train_data_file=stores[0])
    assert f"train: {SPLIT} samples" in said and len(losses(run)) == 2
    assert not (run["output_dir"] / "data").exists(), "what is prepared is prepared again"
    from_file = run | making | {"output_dir": tmp_path / "from_file"}
    assert f"train: {SPLIT} samples" in done("train", **from_file, train_data_file=data[0])
    assert losses(from_file) == losses(run)


def test_stores_are_mixed_by_their_weights(stores, run):
    said = done("train", **run, train_data_file=stores, data_weights=[0.5, 2], max_tokens_per_micro_batch=4000)
    assert "train: 20 samples" in said
    assert f"plan: 2 steps ({SPLIT // 2 + 2 * (20 - SPLIT)} an epoch)" in said
    assert "data_weights:\n- 0.5\n- 2.0\n" in (run["output_dir"] / "config.yaml").read_text()


def test_a_validation_split_is_written_down_and_evaluated(stores, run):
    said = done("train", **run, train_data_file=stores, validation_split=0.25)
    parts = json.loads((run["output_dir"] / "validation_split.json").read_text())
    assert (parts["by"], parts["train"], parts["evaluation"]) == ("speaker", 15, 5)
    rows = {name: len(numbers) for name, numbers in parts["evaluation_rows"].items()}
    assert rows.keys() == set(map(str, stores)) and sum(rows.values()) == 5
    assert "validation_split: by speaker, 5 of 20 samples aside" in said and "eval: 5 samples" in said
    assert [line["step"] for line in metrics(run) if "eval_loss" in line] == [1, 2]


def test_data_to_evaluate_on_win_over_a_split(stores, run):
    said = done("train", **run, train_data_file=stores[0], eval_data_file=stores[1], validation_split=0.25)
    assert f"train: {SPLIT} samples" in said and f"eval: {20 - SPLIT} samples" in said
    assert not (run["output_dir"] / "validation_split.json").exists()
    assert [line["step"] for line in metrics(run) if "eval_loss" in line] == [1, 2]


def test_a_folder_of_recordings_and_texts_is_trained_directly(demo, making, run, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for row in json.loads(demo.data_file.read_text())[:3]:
        source = demo.data_file.parent / row["messages"][-1]["content"][-1]["audio_url"]
        shutil.copy(source, folder)
        (folder / source.with_suffix(".txt").name).write_text(row["misc"]["target_transcript"])
    assert "train: 3 samples" in done("train", **run | making, train_data_file=folder)
    (part,) = Store(run["output_dir"] / "data" / "train-0").parts
    tokens = part.text_ids[: part.samples["text_end"][0]]
    text = load_tokenizer(demo.model_path).decode(tokens)
    spoken = sorted(folder.glob("*.txt"))[0].read_text()
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGenerate audio following instruction.\n\n"
        "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|><|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{spoken}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    )


def test_a_second_start_takes_what_the_first_has_prepared(data, making, run, tmp_path):
    shutil.copytree(data[0].parent, tmp_path / "data")
    file, cache = tmp_path / "data" / "one.json", tmp_path / "codes"
    settings = run | making | {"codes_cache_dir": cache, "train_data_file": file}
    done("train", **settings | {"max_steps": 1})
    store = run["output_dir"] / "data" / "train-0"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    shutil.move(tmp_path / "data" / "audio", tmp_path / "audio")
    shutil.rmtree(cache)

    said = done("train", **settings, resume="auto")
    assert "resumed checkpoint-1: step 1 of 2" in said and len(losses(run)) == 2
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before and not cache.exists()

    shutil.move(tmp_path / "audio", tmp_path / "data" / "audio")
    file.write_text(json.dumps(json.loads(file.read_text())[1:]))
    code, _, errors = command("train", **settings | {"max_steps": 3}, resume="auto")
    assert code == 2 and "checkpoint-2 cannot be resumed by this run" in errors
    assert "  - data: was " in errors and errors.count("→ resume with the same") == 1
    assert not (run["output_dir"] / "checkpoint-3").exists()


# ---------------------------------------------------------------- prepare, validate


def test_prepare_says_what_stands_in_its_way(data, stores, making, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    code, _, errors = command("prepare", out=tmp_path / "taken", train_data_file=data[0], **making)
    assert code == 2 and "taken exists and is not a store → give another folder, or remove it." in errors
    code, _, errors = command("prepare", out=tmp_path / "again", train_data_file=stores[0], **making)
    assert code == 2 and "one is a store already → leave it out" in errors
    code, _, errors = command("prepare", train_data_file=data[0], **making)
    assert code == 2 and "--out" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_prepare_replaces_a_store_and_names_apart_what_has_one_name(data, making, tmp_path):
    shutil.copytree(data[0].parent, tmp_path / "other")
    files, out = [data[0], tmp_path / "other" / "one.json"], tmp_path / "stores"
    done("prepare", out=out, train_data_file=files[0], eval_data_file=files[1], **making)
    assert sorted(path.name for path in out.iterdir()) == ["one-0", "one-1"]
    done("prepare", out=out / "one-0", train_data_file=data[1], whisper_conditioning="off", **making)
    assert len(Store(out / "one-0")) == 20 - SPLIT


def test_validate_needs_no_model_and_tells_by_its_exit_code(data, tmp_path):
    code, said, _ = command("validate", report=tmp_path / "report", train_data_file=data)
    assert code == 0 and said.count("rows accepted") == 2
    assert [json.loads((tmp_path / f"report/{i}/report.json").read_text())["rows"] for i in (0, 1)] == [SPLIT, 8]
    rows = json.loads(data[0].read_text())
    del rows[3]["messages"][-1]
    bad = data[0].with_name("bad.json")
    bad.write_text(json.dumps(rows))
    code, said, _ = command("validate", report=tmp_path / "both", train_data_file=[bad, data[1]])
    assert code == 2 and f"1 of {SPLIT} rows rejected" in said and "all 8 rows accepted" in said
    code, said, _ = command("validate", report=tmp_path / "bad", train_data_file=bad, max_bad_fraction=0.1)
    assert code == 0 and "within max_bad_fraction = 0.1: they are left out" in said
    assert "row 3: no assistant message, so there is nothing to train" in said


def test_validate_shows_a_row(data, stores, making, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = done("validate", show=5, train_data_file=data[0], **making)
    row = json.loads(data[0].read_text())[5]
    sections = ["TURNS as written", "TURNS as trained", "TOKENS", "DELAY GRIDS", "TOTALS"]
    places = [said.index(section) for section in sections]
    assert said.startswith("Row 5, speaker baritone") and places == sorted(places)
    for turn in (row["misc"]["ref_transcript"], row["misc"]["target_transcript"]):
        assert f'user      context  "{turn}"' in said[places[1] :]
    assert 'trained  "<|audio_out_bos|>"' in said and "codebook 57 57 57 57 57 57 57 57" in said
    for words, settings in [
        (f"{data[0]}: there is no row {SPLIT} → rows count from 0", dict(show=SPLIT, train_data_file=data[0])),
        ("--show takes one data file", dict(show=0, train_data_file=data)),
        ("validate reads data, not stores", dict(show=0, train_data_file=stores[0])),
    ]:
        code, _, errors = command("validate", **settings, **making)
        assert code == 2 and words in errors
    code, _, errors = command("validate", show=0, train_data_file=data[0])
    assert code == 2 and "model_path: missing" in errors
    assert not list(tmp_path.iterdir()), "only a report is written"


# ---------------------------------------------------------------- convert, help


def test_conversion_through_other_formats_gives_the_same_rows(tmp_path):
    shutil.copytree(FIXTURES / "formats", tmp_path / "formats")
    steps = ["chatml.json", "out.jsonl", "out.parquet", "out.json"]
    for source, target in zip(steps, steps[1:], strict=False):
        to = "chatml_parquet" if target.endswith("parquet") else "chatml"
        said = done("convert", tmp_path / "formats" / source, tmp_path / "formats" / target, to=to)
        assert "rows written to" in said
    first, last = (read_conversations(tmp_path / "formats" / name) for name in (steps[0], steps[-1]))
    assert last == first and len(first) > 1


def test_conversion_refuses_what_it_would_lose(tmp_path):
    source = FIXTURES / "formats" / "chatml.json"
    code, _, errors = command("convert", source, tmp_path / "out.jsonl", to="manifest")
    assert code == 2 and "nothing is written:" in errors and "→ chatml and chatml_parquet hold everything" in errors
    code, _, errors = command("convert", source, tmp_path / "out.json", to="mp3")
    assert code == 2 and "invalid choice: 'mp3'" in errors and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    code, said, _ = command(name, "--help")
    assert code == 0 and f"higgs-engine {name}" in said
    settings = {"train", "prepare", "evaluate", "validate", "plan", "doctor"}
    assert ("--data_weights" in said) == (name in settings)
    own = {"prepare": "--out", "validate": "--show ROW", "convert": "ljspeech", "demo": "--recordings"}
    assert own.get(name, "--") in said
