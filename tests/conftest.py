"""Fixtures that many tests share: the golden outputs of the original code, and small models on disk."""

import json
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

import engine  # noqa: F401  (installs the torchaudio hook before anything imports transformers' models)
from engine.runtime import distributed

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = FIXTURES / "golden"

torch.set_num_threads(1)
hypothesis.settings.register_profile("engine", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("engine")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: several run at a time, and the longest must not be the last that is begun."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def leave_the_run():
    """A run that failed in the test's own process must not make workers of what later tests start."""
    yield
    if distributed._placed:
        distributed.shutdown(distributed.World(0, 0, 1, torch.device("cpu")))


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory) -> Path:
    """The tiny model of the golden fixtures in the original format, with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("golden") / "tiny_boson"
    shutil.copytree(GOLDEN / "tiny_boson", folder)
    shutil.copytree(GOLDEN / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def golden_samples():
    """name -> exact sample, for every golden ChatML conversation, in the layout `as_written`."""
    from engine.data.formats import read_conversations
    from engine.data.labels import StreamIds, merge
    from engine.data.prompts import PromptTokenizer
    from engine.model.weights import load_tokenizer

    codes = golden_codes()
    tokenize = PromptTokenizer(load_tokenizer(GOLDEN / "tokenizer"))
    names = [entry["name"] for entry in json.loads((GOLDEN / "samples.json").read_text())]
    samples = {}
    for name, conversation in zip(names, read_conversations(golden_chatml()), strict=True):
        prompt = tokenize(conversation)
        clips = [codes[Path(audio.recording.path).name] for audio in prompt.audios]
        samples[name] = merge(prompt, clips, tokenize.special, StreamIds())
    return samples


def golden_chatml() -> Path:
    """The golden conversations as one ChatML data file."""
    import tempfile

    file = Path(tempfile.mkdtemp()) / "golden.json"
    entries = json.loads((GOLDEN / "samples.json").read_text())
    file.write_text(json.dumps([entry["chatml"] for entry in entries]))
    return file


def golden_codes() -> dict:
    """File name of a clip -> its codes, int16 [8, T]."""
    import numpy as np

    raw = json.loads((GOLDEN / "audio_codes.json").read_text())
    return {Path(url).name: np.array(codes, np.int16) for url, codes in raw.items()}


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's paths (data_file, model_path, audio_tokenizer_path): a small model, its codec, 20 clips."""
    from engine.data.demo import make_demo

    return make_demo(tmp_path_factory.mktemp("demo"))
