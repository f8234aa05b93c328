"""`prepare` killed in the middle, or on two processes: the store is that of an undisturbed run, byte for byte."""

import json
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import soundfile
from safetensors.numpy import load_file

from engine.data.demo_speech import SAMPLING_RATE, SENTENCES, VOICES, synthesize
from engine.data.store import Store
from tests.data.prepare_worker import CHUNK_ROWS
from tests.processes import run, start

pytestmark = pytest.mark.slow

CLIPS = 10  # of each of the four voices
LENGTHS = (14_400, 19_200)  # two, so that several recordings share a batch of the codec


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A data file of 40 rows, each with the voice's next clip as reference."""
    folder = tmp_path_factory.mktemp("source")
    rows = []
    for voice in sorted(VOICES):
        for number in range(CLIPS):
            wave = synthesize(voice, SENTENCES[number])[: LENGTHS[number % 2]]
            soundfile.write(folder / f"{voice}-{number}.wav", wave, SAMPLING_RATE, subtype="PCM_16")
            other = (number + 1) % CLIPS
            items = [SENTENCES[other], audio(f"{voice}-{other}.wav"), SENTENCES[number]]
            answer = {"role": "assistant", "content": audio(f"{voice}-{number}.wav")}
            rows.append({"messages": [{"role": "user", "content": items}, answer], "speaker": voice})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def audio(name: str) -> dict:
    return {"type": "audio", "audio_url": name}


def command(demo, source: Path, folder: Path, pause: float = 0) -> list[str]:
    settings = dict(
        train_data_file=source, model_path=demo.model_path, audio_tokenizer_path=demo.audio_tokenizer_path,
        codes_cache_dir=folder / "codes", out=folder / "store", codec_batch_seconds=3, store_shard_samples=12,
    )  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["-m", "tests.data.prepare_worker", str(pause), "prepare", *flags]


@pytest.fixture(scope="module")
def undisturbed(demo, source, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(command(demo, source, folder), world_size=1)
    assert len(Store(folder / "store")) == 4 * CLIPS and len(Store(folder / "store").parts) == 4
    assert max(Counter(encoded(folder)).values()) == 1 and len(encoded(folder)) == 4 * CLIPS
    assert 10 < len(shards(folder)) < 4 * CLIPS / 2, "batches have several recordings, and each is a shard"
    return content(folder / "store")


def content(store: Path) -> dict[str, bytes]:
    """Name -> bytes of everything in a store, its report too."""
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def shards(folder: Path) -> list[Path]:
    """Not what is being written, or was when the process was killed: it begins with a dot, and is nobody's."""
    return [file for file in folder.glob("codes/*/*.safetensors") if file.name[0] != "."]


def encoded(folder: Path) -> list[bytes]:
    """The content keys in the cache, one of every time that a recording was encoded."""
    return [key.tobytes() for shard in shards(folder) for key in load_file(shard)["keys"]]


def check_equal(folder: Path, wanted: dict[str, bytes]) -> None:
    found = content(folder / "store")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert sorted(file.name for file in folder.iterdir()) == ["codes", "store"], "nothing half-made is left"


def test_a_killed_prepare_goes_on_and_ends_with_the_same_store(demo, source, undisturbed, tmp_path):
    (process,) = start(command(demo, source, tmp_path, pause=0.3), world_size=1)
    deadline = time.monotonic() + 120
    while len(encoded(tmp_path)) <= CHUNK_ROWS + 1:  # beyond the first chunk: some of its samples are written too
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    done = encoded(tmp_path)
    assert CHUNK_ROWS < len(done) < 4 * CLIPS and not (tmp_path / "store").exists()
    assert (tmp_path / ".store.incomplete" / "part-00000").is_dir()

    run(command(demo, source, tmp_path), world_size=1)
    check_equal(tmp_path, undisturbed)
    assert Counter(encoded(tmp_path)) == dict.fromkeys(encoded(tmp_path), 1), "something was encoded again"
    assert len(encoded(tmp_path)) == 4 * CLIPS and set(done) < set(encoded(tmp_path))


def test_two_processes_make_the_same_store(demo, source, undisturbed, tmp_path):
    run(command(demo, source, tmp_path), world_size=2)
    check_equal(tmp_path, undisturbed)
    assert Counter(encoded(tmp_path)) == dict.fromkeys(encoded(tmp_path), 1), "both encoded one recording"
