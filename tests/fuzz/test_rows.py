"""Data files of every format: rows, or rows with problems, or a DataError that names the file; never anything else."""

import base64
import json
import shutil

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Settings
from engine.data.conversation import Row
from engine.data.formats import read_rows
from engine.data.validate import Validation
from engine.errors import DataError
from tests.fuzz.hostile import BYTES, as_json, changed, damaged
from tests.fuzz.watched import inputs, little_memory, outcome

CODES = [[1, 2, 3]] * 8
WAVE = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAwF0AAIC7AAACABAAZGF0YQAAAAA="
CHATML = {
    "messages": [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": ["Hi.", {"type": "audio", "audio_url": "a.wav", "offset": 0.1, "duration": 0.2}]},
        {"role": "assistant", "content": [{"type": "audio", "raw_audio": WAVE}, {"type": "text", "text": "Yes."}]},
        {"role": "assistant", "content": {"type": "audio", "audio_codes": CODES}, "recipient": "all"},
        {"role": "assistant", "content": [{"type": "audio", "audio_url": "a.wav"}]},
    ],
    "start_index": 2, "speaker": "ann", "misc": {"scene": "A hall.", "task_type": "voice_cloning"},
}  # fmt: skip
SWIFT = {
    "messages": [{"role": "user", "content": "As: <audio> Hi."}, {"role": "assistant", "content": "<audio>"}],
    "audios": ["a.wav", "a.wav"], "start_index": 0, "speaker": "ann",
}  # fmt: skip
MANIFEST = {
    "target_audio_path": "a.wav", "target_transcript": "Hi.", "speaker": "ann", "ref_audio_path": "a.wav",
    "ref_transcript": "Ho.", "offset": 0.1, "duration": 0.2, "ref_offset": 0, "ref_duration": 0.1, "more": [1],
}  # fmt: skip
METADATA = {
    "dataset_info": {},
    "samples": [
        {"id": "a1", "audio_file": "a.wav", "transcript": "Hi.", "speaker_id": 3, "scene": "a hall", "duration": 1,
         "ref_speakers": [{"ref_audio_file": "a.wav", "ref_transcript": "Ho.", "mood": "low"}]},
        {"audio_file": "a.wav", "transcript_file": "a.txt", "ref_audio_file": "a.wav", "ref_transcript": "Ho."},
    ],
}  # fmt: skip
ROWS = {
    "chatml": [CHATML, CHATML], "ms_swift": [SWIFT, SWIFT], "manifest": [MANIFEST, MANIFEST], "metadata_json": METADATA,
}  # fmt: skip
TABLE = b'target_audio_path,target_transcript,offset,duration\r\na.wav,"Hi, you.",0.1,0.2\r\na.wav,Ho.,,\r\n'
LINES = b"a|Hi, you.|Hi, you there.\nb.wav|Ho.\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one sound recording, and little memory for what is read there."""
    folder = tmp_path_factory.mktemp("rows")
    wave = 0.3 * np.sin(np.arange(12_000) / 20)
    soundfile.write(folder / "a.wav", wave, 24_000)
    (folder / "a.txt").write_text("Hi.")
    with little_memory():
        yield folder


def check(path, format: str) -> None:
    """Reads all rows, twice for files: as the format it is in, and as whatever it seems to be."""
    for name in (format, "auto"):
        found = outcome(lambda name=name: list(read_rows(path, name)))
        if isinstance(found, DataError):
            assert str(path) in str(found) and "\n" not in found.heading
            continue
        for number, row in enumerate(found):
            assert isinstance(row, Row) and row.number == number and (row.conversation is None) == bool(row.problems)


@inputs(500)
@given(st.data(), st.sampled_from(sorted(ROWS)), st.booleans(), st.booleans())
def test_rows_with_odd_values(folder, data, format, by_line, ascii):
    tree = data.draw(changed(ROWS[format]))
    if by_line and isinstance(tree, list):
        path, text = folder / "odd.jsonl", b"\r\n".join(as_json(row, ascii) for row in tree)
    else:
        path, text = folder / ("metadata.json" if format == "metadata_json" else "odd.json"), as_json(tree, ascii)
    path.write_bytes(text)
    check(path, format)


@inputs(500)
@given(st.data(), st.sampled_from(sorted(ROWS)), st.sampled_from(("odd.json", "odd.jsonl")))
def test_damaged_text(folder, data, format, name):
    valid = json.dumps(ROWS[format], indent=1 if name == "odd.json" else None).encode()
    path = folder / name
    path.write_bytes(data.draw(damaged(valid)))
    check(path, format)


@inputs(150)
@given(st.binary(max_size=60) | st.lists(st.sampled_from(BYTES), max_size=6).map(b"".join))
def test_any_bytes(folder, content):
    for name, format in (("odd.json", "chatml"), ("odd.jsonl", "manifest"), ("odd.csv", "manifest")):
        (folder / name).write_bytes(content)
        check(folder / name, format)


@inputs(150)
@given(damaged(TABLE), damaged(LINES))
def test_tables(folder, table, lines):
    (folder / "odd.csv").write_bytes(table)
    check(folder / "odd.csv", "manifest")
    shutil.rmtree(folder / "speech", ignore_errors=True)
    (folder / "speech" / "wavs").mkdir(parents=True)
    (folder / "speech" / "metadata.csv").write_bytes(lines)
    check(folder / "speech", "ljspeech")


@inputs(50)
@given(st.lists(st.binary(min_size=1, max_size=12), max_size=3), damaged(b"Hi.\n"))
def test_folders_with_any_names(tmp_path_factory, names, text):
    folder = tmp_path_factory.mktemp("names")
    for name in (name for name in names if not set(name) & set(b"/\0") and name not in (b".", b"..")):
        for suffix in (b".wav", b".txt"):
            with open(bytes(folder) + b"/" + name + suffix, "wb") as file:
                file.write(text)
    check(folder, "wav_txt")
    shutil.rmtree(folder)


@inputs(40)
@given(st.data())
def test_parquet(folder, data):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    trees = [data.draw(changed(CHATML["messages"])), CHATML["messages"]]
    path = folder / "odd.parquet"
    texts = [as_json(tree).decode() for tree in trees]
    parquet.write_table(pyarrow.table({"messages": texts, "misc": texts[::-1], "speaker": ["a", None]}), path)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    check(path, "chatml_parquet")


@inputs(120)
@given(st.data())
def test_what_validation_says_of_rows_with_odd_values(folder, data):
    rows = data.draw(changed([CHATML]))
    path = folder / "judged.json"
    path.write_bytes(as_json(rows))
    settings = Settings(max_bad_fraction=1.0, prompt_layout=data.draw(st.sampled_from(("auto", "as_written"))))
    found = outcome(lambda: Validation(str(path), settings).report(None))
    if not isinstance(found, DataError):
        assert found.summary()["rows"] >= 1


@inputs(50)
@given(damaged(base64.b64decode(WAVE)), damaged(WAVE.encode()))
def test_embedded_recordings(folder, sound, text):
    rows = [{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": item}]} for item in (
        {"type": "audio", "raw_audio": base64.b64encode(sound).decode()},
        {"type": "audio", "raw_audio": text.decode("latin1")},
    )]  # fmt: skip
    (folder / "judged.json").write_bytes(as_json(rows))
    outcome(lambda: Validation(str(folder / "judged.json"), Settings(max_bad_fraction=1.0)).report(None))
