"""Settings, data, models, stores and checkpoints are data: none runs code, leaves its folder or fills the memory."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import sys

import numpy as np
import pytest
import soundfile
import torch

from engine.backends.tensors import Reader
from engine.checkpoint.manifest import read_manifest
from engine.config import parse
from engine.data.audio import AudioError, Recording, content_key, count_samples, read_mono
from engine.data.codec import Codec
from engine.data.formats import chatml, text_files
from engine.data.formats.registry import read_rows
from engine.data.formats.row_check import MOST_EMBEDDED
from engine.data.store import HEADER, Store
from engine.errors import CheckpointError, ConfigError, DataError, ModelError
from engine.export.foreign import to_model
from engine.export.merged import MergedWeights
from engine.export.universal import to_universal
from engine.model.adapter_files import open_adapter
from engine.model.weights import WeightFiles, load_config, load_tokenizer
from engine.untrusted import name_within, path_within
from tests.checkpoint.small_checkpoints import small_checkpoint, small_model
from tests.data.small_stores import made, write

OUTSIDE = ("../x", "/etc/passwd", "a/../../x", "..", ".", "", "a\0b", 5, None, "x" * 300, "\ud800")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere_are_refused(name):
    for check in (path_within, name_within):
        with pytest.raises(ValueError):
            check(name)


def test_names_within():
    assert path_within("a/b.c") == "a/b.c" and name_within("b.c") == "b.c"
    with pytest.raises(ValueError, match="'a/b' is not the name of something in its folder"):
        name_within("a/b")


@pytest.mark.parametrize("name", ["../model.safetensors", "ABSOLUTE", 5])
def test_shards_of_a_model_lie_in_its_folder(tmp_path, name):
    model = small_model(tmp_path / "model")
    outside = shutil.move(model / "model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": str(outside) if name == "ABSOLUTE" else name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"weight_map names no files here .* → download the model first"):
        WeightFiles(model)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    model = small_model(tmp_path / "model")
    outside = shutil.move(model / "model.safetensors", tmp_path / "blob")
    (model / "one.safetensors").symlink_to(outside)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert "model.norm.weight" in WeightFiles(model).shapes


@pytest.mark.parametrize("name", ["../elsewhere", "ABSOLUTE", "part-00000/../../elsewhere", None])
def test_parts_of_a_store_lie_in_its_folder(tmp_path, name):
    store = tmp_path / "store"
    write(store, [made("tts", 0, [1])])
    outside = shutil.copytree(store / "part-00000", tmp_path / "elsewhere")
    header = json.loads((store / HEADER).read_text())
    header["parts"][0]["folder"] = str(outside) if name == "ABSOLUTE" else name
    (store / HEADER).write_text(json.dumps(header))
    with pytest.raises(DataError, match=r"header.json: damaged \(.* is not .*\) → prepare the store again"):
        Store(store)


@pytest.mark.parametrize("name", ["../secret", "ABSOLUTE"])
def test_tensors_of_a_checkpoint_lie_in_its_folder(tmp_path, name):
    checkpoint = small_checkpoint(tmp_path / "out", small_model(tmp_path / "model"))
    contents = Reader(checkpoint).metadata
    (first, place), *_ = contents.storage_data.items()
    secret = shutil.copyfile(checkpoint / "tensors" / place.relative_path, checkpoint / "secret")
    elsewhere = str(secret) if name == "ABSOLUTE" else name
    contents.storage_data[first] = dataclasses.replace(place, relative_path=elsewhere)
    (checkpoint / "tensors" / ".metadata").write_bytes(pickle.dumps(contents))
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged \(.* is not a path within its folder\)"):
        Reader(checkpoint)


def test_parameters_of_a_universal_checkpoint_lie_in_its_folder(tmp_path):
    weights = {"..": torch.ones(2), "a": torch.ones(2)}
    checkpoint = small_checkpoint(tmp_path / "out", small_model(tmp_path / "model"), weights=weights)
    assert read_manifest(checkpoint).shapes.keys() == weights.keys()
    with pytest.raises(CheckpointError, match="names are no names of folders"):
        to_universal(checkpoint, tmp_path / "universal")
    assert not (tmp_path / "universal").exists()


def test_the_tag_of_a_foreign_checkpoint_is_a_folder_in_it(tmp_path):
    model = small_model(tmp_path / "model")
    (tmp_path / "zero" / "model.norm.weight").mkdir(parents=True)
    torch.save({"param": torch.ones(8)}, tmp_path / "zero" / "model.norm.weight" / "fp32.pt")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "latest").write_text("..")
    with pytest.raises(CheckpointError, match="saved: no DeepSpeed checkpoint of ZeRO there"):
        to_model(tmp_path / "saved", WeightFiles(model), tmp_path / "out")


# ---------------------------------------------------------------- code


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """The source of a module that leaves a file when it is run, and that file; who is asked says yes."""
    sprung = tmp_path / "sprung"
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    source = f"open({str(sprung)!r}, 'w').close()\n\nclass Trap:\n    pass\n"
    return source, sprung


def test_no_code_of_a_model_or_codec_folder_is_run(demo, tmp_path, trap):
    source, sprung = trap
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoFeatureExtractor")
    for name, folder in (("model", demo.model_path), ("codec", demo.audio_tokenizer_path)):
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / "evil.py").write_text(source)
        for file in copy.glob("*config.json"):
            content = json.loads(file.read_text()) | {"auto_map": dict.fromkeys(classes, "evil.Trap")}
            file.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "model") and load_config(tmp_path / "model") and WeightFiles(tmp_path / "model")
    assert Codec.load(tmp_path / "codec").sampling_rate == 24_000
    file = tmp_path / "codec" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"feature_extractor_type": "Trap"}))
    with pytest.raises(ModelError, match="trust_remote_code|custom code|Trap"):
        Codec.load(tmp_path / "codec")
    assert not sprung.exists(), "a folder of a model has run its own code"


def test_no_module_that_an_adapter_names_is_imported(tmp_path, trap, monkeypatch):
    source, sprung = trap
    (tmp_path / "evil_core.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
        "megatron_config": {},
        "megatron_core": "evil_core",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"a": torch.ones(1)}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="import whatever module its megatron_core names"):
        MergedWeights(WeightFiles(small_model(tmp_path / "model")), open_adapter(adapter))
    assert not sprung.exists() and "evil_core" not in sys.modules


class Pickled:
    """What a pickle runs when it is loaded as one."""

    def __init__(self, sprung):
        self.sprung = sprung

    def __reduce__(self):
        return os.mkdir, (str(self.sprung),)


def test_no_pickle_is_run(tmp_path, trap):
    _, sprung = trap
    adapter, model = tmp_path / "adapter", small_model(tmp_path / "model")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    torch.save({"a": Pickled(sprung)}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="adapter_model.bin: not a readable file of tensors"):
        open_adapter(adapter)
    checkpoint = small_checkpoint(tmp_path / "out", model)
    (checkpoint / "tensors" / ".metadata").write_bytes(pickle.dumps(Pickled(sprung)))
    with pytest.raises(CheckpointError, match="has no place in a checkpoint"):
        Reader(checkpoint)
    write(tmp_path / "store", [made("tts", 0, [1])])
    np.save(tmp_path / "store" / "part-00000" / "codes.npy", np.array([Pickled(sprung)], object), allow_pickle=True)
    with pytest.raises(DataError, match="codes.npy: cannot be read"):
        Store(tmp_path / "store")
    (tmp_path / "saved" / "zero" / "a").mkdir(parents=True)
    torch.save({"param": Pickled(sprung)}, tmp_path / "saved" / "zero" / "a" / "fp32.pt")
    with pytest.raises(CheckpointError, match="could run any code"):
        to_model(tmp_path / "saved", WeightFiles(model), tmp_path / "foreign")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "text, told",
    [
        ("seed: !!python/object/apply:os.system [exit]", "could not determine a constructor for the tag"),
        ("seed: !!int ''", "a value is not what its tag says"),
        ("seed: !!bool maybe", "a value is not what its tag says"),
        ("seed: &a [*a]", "a value holds itself by an alias"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("seed: 0x" + "f" * 9000, "seed: a number of thousands of digits is not a whole number"),
        ("seed: " + "z" * 9000, "(9,002 characters) is not a whole number"),
        ("# " + "z" * (1 << 20), "holds more than 1,048,576 bytes"),
        ('model_path: "a\\0b"', r"model_path: 'a\x00b' holds what is no character"),
        ('output_dir: "\\ud800"', r"output_dir: '\ud800' holds what is no character"),
        ("a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
         "stands for more than 1,048,576 characters by its aliases"),
    ],
)  # fmt: skip
def test_settings_that_are_more_than_settings(tmp_path, text, told):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(["--config", str(tmp_path / "my.yaml")])
    assert told in str(error.value) and len(str(error.value)) < 3000


# ---------------------------------------------------------------- sizes


def test_embedded_recordings_are_bounded_before_they_are_decoded(tmp_path):
    raw = "A" * (MOST_EMBEDDED // 3 * 4 + 8)
    item = {"type": "audio", "raw_audio": raw}
    row = chatml.read_row(0, {"messages": [{"role": "assistant", "content": item}]}, tmp_path)
    assert row.problems == (
        "message 0, item 0: raw_audio has 100,663,302 bytes, 100,663,296 are allowed within a row → give the recording "
        "as a file",
    )


def test_rows_and_transcripts_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MOST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n{"messages": ["' + "z" * 1000 + '"]}')
    with pytest.raises(DataError, match=r"a.jsonl: line 2 has more than .* → give long recordings as files"):
        list(read_rows(tmp_path / "a.jsonl", "chatml"))
    (tmp_path / "a.wav").touch()
    (tmp_path / "a.txt").write_text("z" * (1 << 20) + "!")
    (row,) = read_rows(tmp_path, "wav_txt")
    assert row.problems == ("a.txt: larger than 1 MiB, which no transcript is → name the right file.",)


def test_a_key_that_is_twice_in_a_row(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"messages": [{"role": "user", "role": "system", "content": "Hi."}]}]')
    with pytest.raises(DataError, match="line 2, column 1: the key 'role' is there twice"):
        list(read_rows(tmp_path / "a.json", "chatml"))
    (tmp_path / "a.json").write_text('{"messages": [],\n "messages": []}')
    with pytest.raises(DataError, match="line 2, column 13: the key 'messages' is there twice"):
        list(read_rows(tmp_path / "a.json", "chatml"))


def sound(rate: int, format: str, seconds: float = 1.0) -> bytearray:
    stream = io.BytesIO()
    soundfile.write(stream, 0.3 * np.sin(np.arange(round(24_000 * seconds)) / 9), rate, format=format)
    return bytearray(stream.getvalue())


def test_a_header_that_promises_days_of_sound():
    flac = sound(24_000, "FLAC")
    flac[21] |= 0x0F  # the last 36 bits are the number of samples
    flac[22:26] = struct.pack(">I", 2**32 - 1)
    slow = sound(1, "WAV")  # each sample would become 24,000
    for content in (flac, slow):
        for read in (count_samples, read_mono):
            with pytest.raises(AudioError, match="too many to read at once → cut it; 3 hours are the most"):
                read(Recording(data=bytes(content)), 24_000)


def test_a_pipe_is_no_recording(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="a.wav: a pipe or a device, not a file → correct the path"):
        content_key(Recording(path=str(tmp_path / "a.wav")))  # and does not wait for somebody to write into it
