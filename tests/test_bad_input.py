"""What a user gets wrong: told by name and with the remedy, exit code 2, before anything is trained.

Through the command line, in this process where one process is enough to see it, as real processes where it is not.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.cli import main
from engine.runtime.distributed import World, shutdown
from tests.model.whisper_tiny import save_whisper
from tests.processes import run

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Attempt:
    """A small run that would train, for a test to break: its folder, flags, rows and, if given, the data as text."""

    folder: Path
    flags: dict[str, object]
    rows: list[dict]
    text: str | None = None

    @property
    def argv(self) -> list[str]:
        """The command line, after writing the data file."""
        (self.folder / "data.json").write_text(json.dumps(self.rows) if self.text is None else self.text)
        return ["train", *(word for name, value in self.flags.items() for word in (f"--{name}", str(value)))]

    def flag(self, **flags) -> None:
        self.flags |= flags

    def target(self, row: int, path: object) -> None:
        self.rows[row]["messages"][-1]["content"][-1]["audio_url"] = str(path)

    def file(self, name: str, text: str = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def store(self) -> Path:
        """Makes a prepared store of the data as they are and trains on that."""
        folder = self.folder / "store"
        assert main(["prepare", "--out", str(folder), *self.argv[1:]]) == 0
        self.flag(train_data_file=folder)
        return folder

    def check_nothing_was_trained(self) -> None:
        assert not list(self.folder.rglob("metrics.jsonl")) and not list(self.folder.rglob("tensors"))


@pytest.fixture(scope="session")
def codes_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("codes")


@pytest.fixture
def attempt(demo, tmp_path, codes_cache) -> Attempt:
    rows = json.loads(demo.data_file.read_text())[:2]
    for row in rows:
        for message in row["messages"][1:]:
            for item in message["content"]:
                if item["type"] == "audio":
                    item["audio_url"] = str(demo.data_file.parent / item["audio_url"])
    flags = dict(
        model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path, backend="none", max_steps=1,
        train_data_file=tmp_path / "data.json", output_dir=tmp_path / "out", codes_cache_dir=codes_cache,
        dataloader_num_workers=0,
    )  # fmt: skip
    return Attempt(tmp_path, flags, rows)


@pytest.fixture
def alone(monkeypatch):
    """No launcher; and what a run that broke off leaves in this process is cleared away."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    yield
    shutdown(World(0, 0, 1, torch.device("cpu")))


CASES: dict[str, tuple[Callable[[Attempt], object], tuple[str, ...]]] = {}


def case(*told: str):
    """Registers a way to break an attempt, with the words that the message must have."""

    def register(break_it: Callable[[Attempt], object]):
        CASES[break_it.__name__] = break_it, told
        return break_it

    return register


@case("train_data_file: ", "gone.json does not exist → give a file or folder of samples, or a prepared store")
def missing_data_file(attempt):
    attempt.flag(train_data_file=attempt.folder / "gone.json")


@case("data.json: not valid JSON at line 2, column 14: Expecting ':' delimiter")
def malformed_json(attempt):
    attempt.text = '[\n {"messages" []}\n]'


@case("data.json: the list of samples is empty → nothing to train on")
def empty_list(attempt):
    attempt.text = "[]"


@case(
    "data.json: 1 of 2 row(s) cannot be used → mend them, or raise max_bad_fraction to go on without them",
    "train-0-report:\n  - row 1: no assistant message has audio → give the target recording",
)
def row_without_assistant_audio(attempt):
    del attempt.rows[1]["messages"][-1]["content"][-1]


@case("row 1: message 2, item 1 has an unknown key 'url' → did you mean 'audio_url'?")
def misspelt_key_of_a_row(attempt):
    item = attempt.rows[1]["messages"][-1]["content"][-1]
    item["url"] = item.pop("audio_url")


@case(
    "data.json: 2 of 2 row(s) cannot be used", "row 0: ", "gone.wav: no such file → correct the path", "row 1: ",
    "text.wav: not audio, or damaged", "→ convert it to wav or flac",
)  # fmt: skip
def missing_recording_and_text_named_wav(attempt):
    attempt.target(0, attempt.folder / "gone.wav")
    attempt.target(1, attempt.file("text.wav", "This is no recording."))


@case("unknown setting 'learning_rat' in ", "my.yaml → did you mean learning_rate?")
def unknown_key_in_yaml(attempt):
    attempt.flag(config=attempt.file("my.yaml", "learning_rat: 1e-4\n"))


@case("2 of 2 samples are longer than max_tokens_per_micro_batch = 20 → raise it to ", "or set drop_long_samples")
def samples_longer_than_the_budget(attempt):
    attempt.flag(max_tokens_per_micro_batch=20)


@case("micro_batches_per_step: 4 is not gradient_accumulation_steps × processes = 2 × 1 → give only one of them")
def batch_settings_that_contradict_each_other(attempt):
    attempt.flag(micro_batches_per_step=4, gradient_accumulation_steps=2)


@case("bf16: backend none computes in fp32 only → set backend to fsdp")
def bf16_without_a_backend(attempt):
    attempt.flag(bf16="true")


@case("model: no model.safetensors and no model.safetensors.index.json → download the model first")
def model_without_weights(attempt):
    copy = shutil.copytree(attempt.flags["model_path"], attempt.folder / "model")
    (copy / "model.safetensors").unlink()
    attempt.flag(model_path=copy)


@case("empty: no config.json there → model_path must be a model folder")
def model_path_of_an_empty_folder(attempt):
    attempt.flag(model_path=attempt.file("empty/x").parent)


@case("codec is not the native release of the audio tokenizer, or not all of it", "there are no weights, *.safetensors")
def codec_without_weights(attempt):
    copy = shutil.copytree(attempt.flags["audio_tokenizer_path"], attempt.folder / "codec")
    (copy / "model.safetensors").unlink()
    attempt.flag(audio_tokenizer_path=copy)


@case("output_dir: ", "taken: File exists → give a writable folder")
def output_folder_that_is_a_file(attempt):
    attempt.flag(output_dir=attempt.file("taken"))


@case("out holds checkpoints of an earlier run → continue it with --resume auto, or give another --output_dir")
def output_folder_of_an_earlier_run(attempt):
    attempt.file("out/checkpoint-5", "")


@case("resume: ", "gone is not a folder → give a checkpoint's folder, auto or none")
def resume_from_nowhere(attempt):
    attempt.flag(resume=attempt.folder / "gone")


@case("empty: no manifest.json there → it is not a complete checkpoint")
def resume_from_a_folder_that_is_no_checkpoint(attempt):
    attempt.flag(resume=attempt.file("empty/x").parent)


@case(
    "store: the store does not fit this run → give the settings it was prepared with, or prepare it again",
    "prompt_layout: the store has 'auto', this run 'reference_in_system'", "scene: the store has", "this run 'A hall.'",
)  # fmt: skip
def store_of_other_settings(attempt):
    attempt.store()
    attempt.flag(prompt_layout="reference_in_system", scene="A hall.")


@case("codes.npy: cannot be read (", "No such file", "→ prepare the store again, or copy all of it")
def store_without_one_of_its_files(attempt):
    (attempt.store() / "part-00000" / "codes.npy").unlink()


@case("text_ids.npy: cannot be read (", "→ prepare the store again, or copy all of it")
def store_with_half_of_a_file(attempt):
    file = attempt.store() / "part-00000" / "text_ids.npy"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@case("store: the store has format version 99, this engine reads 1 → prepare it again from the data file")
def store_of_another_version(attempt):
    header = attempt.store() / "header.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format_version": 99}))


@case("store: not a prepared store (", "→ `higgs-engine prepare` makes one")
def store_with_a_damaged_header(attempt):
    (attempt.store() / "header.json").write_text('{"format_version": 1,')


@case("data.json: its format cannot be told → bring it into one of these", "  - chatml: ")
def data_of_no_format(attempt):
    attempt.text = '[{"question": "Hi?"}]'


@case("whisper_conditioning: ", "empty is not a folder → off, auto, or the folder of a Whisper model")
def whisper_that_is_no_folder(attempt):
    attempt.flag(whisper_conditioning=attempt.file("empty"))


@case(
    "whisper_conditioning: no sample has audio in a user or system message, so Whisper hears nothing → set "
    "prompt_layout: reference_in_system, or whisper_conditioning: off"
)
def whisper_that_hears_nothing(attempt):
    attempt.flag(whisper_conditioning=save_whisper(attempt.folder / "whisper"), prompt_layout="voice_cloning")


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_and_nothing_is_trained(name, attempt, alone, capsys):
    break_it, told = CASES[name]
    break_it(attempt)
    assert main(attempt.argv) == 2
    said = capsys.readouterr().err
    assert said.count("higgs-engine train: ") == 1 and "Traceback" not in said
    for words in told:
        assert words in said
    attempt.check_nothing_was_trained()


def test_without_a_mistake_the_same_command_trains(attempt, alone, capsys):
    assert main(attempt.argv) == 0, capsys.readouterr().err
    assert (attempt.folder / "out" / "metrics.jsonl").read_text() and (attempt.folder / "out/checkpoint-1").is_dir()


def test_the_mistakes_of_settings_come_together(attempt, alone, capsys):
    attempt.flag(resume="gone", learning_rate=-1, lora_rnak=8, eval_data_file="gone.json")
    assert main(attempt.argv) == 2
    said = capsys.readouterr().err
    assert all(f"  - {name}" in said for name in ("resume: ", "learning_rate: ", "unknown setting", "eval_data_file: "))


def test_the_real_exit_code(attempt):
    malformed_json(attempt)
    codes, (said,) = run(["-m", "engine", *attempt.argv], world_size=1, check=False)
    assert codes == [2] and "line 2, column 14" in said and "Traceback" not in said


def too_few_micro_batches(attempt):
    attempt.flag(micro_batches_per_step=1)


@pytest.mark.parametrize("break_it, told", [
    (too_few_micro_batches, ["micro_batches_per_step: 1 leaves some of 2 processes idle → set at least 2, or"]),
    (output_folder_that_is_a_file, ["taken: File exists → give a writable folder"]),  # only rank 0 looks
    (missing_recording_and_text_named_wav, ["gone.wav: no such file", "text.wav: not audio"]),  # a rank finds one each
])  # fmt: skip
def test_all_processes_stop_and_one_speaks(break_it, told, attempt):
    attempt.flag(backend="fsdp")
    break_it(attempt)
    codes, outputs = run(["-m", "engine", *attempt.argv], world_size=2, timeout=120, check=False)
    assert codes == [2, 2], "\n".join(outputs)
    (said,) = [output for output in outputs if "higgs-engine train: " in output]
    assert all(words in said for words in told) and "Traceback" not in "".join(outputs)
    attempt.check_nothing_was_trained()
