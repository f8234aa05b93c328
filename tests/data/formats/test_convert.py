"""Conversion: all rows in full or nothing, with recordings still found, and every obstacle named."""

import json
import os
import shutil
from pathlib import Path

import pytest

from engine.data.conversation import Audio
from engine.data.formats import FORMATS, convert, detect, read_conversations
from engine.errors import ConfigError, DataError
from tests.conftest import FIXTURES


@pytest.fixture
def data(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "formats", tmp_path / "formats"))


def seen(path: Path) -> list:
    """Everything of the conversations but where the files of recordings are: in place of names, contents."""

    def shown(item):
        if not isinstance(item, Audio):
            return item.text
        recording = item.recording
        content = recording.codes if recording.codes is not None else recording.open().read()
        return content, recording.offset, recording.duration

    conversations = read_conversations(path)
    turns = [[(m.role, m.recipient, list(map(shown, m.content))) for m in c.messages] for c in conversations]
    return [(c.row, c.start_index, c.speaker, c.misc, t) for c, t in zip(conversations, turns, strict=True)]


@pytest.mark.parametrize("target", ["out.json", "out.jsonl", "out.parquet"])
@pytest.mark.parametrize("source", [
    "chatml.json", "chatml.parquet", "ms_swift.jsonl", "manifest.json", "manifest.csv", "seed_list.json",
    "metadata_json", "wav_txt", "ljspeech",
])  # fmt: skip
def test_everything_becomes_chatml(source, target, data):
    to = "chatml_parquet" if target == "out.parquet" else "chatml"
    assert convert(data / source, data / target, to, progress=False) == len(read_conversations(data / source))
    assert detect(data / target) == to and seen(data / target) == seen(data / source)


@pytest.mark.parametrize("source, target, to", [
    ("metadata_json", "moved", "metadata_json"), ("wav_txt", "moved", "metadata_json"),
    ("manifest.csv", "moved", "metadata_json"), ("ljspeech", "moved", "wav_txt"), ("manifest.tsv", "moved", "wav_txt"),
    ("wav_txt", "m.json", "manifest"), ("manifest.csv", "m.jsonl", "manifest"),
    ("ms_swift.jsonl", "s.jsonl", "ms_swift"),
])  # fmt: skip
def test_formats_become_each_other(source, target, to, data):
    if to == "wav_txt" and source == "ljspeech":  # which has two texts for one of its rows
        (data / "ljspeech/metadata.csv").write_text("LJ-1|It cost five dollars.\nLJ-2|Open the window.\n")
    convert(data / source, data / target, to, progress=False)
    before, after = seen(data / source), seen(data / target)
    assert [row[1:3] + row[4:] for row in after] == [row[1:3] + row[4:] for row in before]
    assert [row[3] | after[i][3] for i, row in enumerate(before)] == [row[3] for row in after]


def test_paths_are_relative_below_the_target_and_else_absolute(data, tmp_path):
    convert(data / "manifest.tsv", data / "out.json", "chatml", progress=False)
    convert(data / "manifest.tsv", data / "deep/out.json", "chatml", progress=False)

    def url(path):
        return json.loads(path.read_text())[0]["messages"][-1]["content"][0]["audio_url"]

    assert url(data / "out.json") == "wavs/ann_1.wav"
    assert url(data / "deep/out.json") == str(data / "wavs/ann_1.wav")


def test_relative_names_on_the_command_line(data, monkeypatch):
    monkeypatch.chdir(data)
    convert("manifest.tsv", "out.jsonl", "chatml", progress=False)
    assert seen(Path("out.jsonl")) == seen(data / "manifest.tsv")


@pytest.mark.parametrize("source, to, rows", [
    ("chatml.json", "manifest", {0: "a system message"}),
    ("chatml.json", "wav_txt", {0: "a system message", 1: "a segment of a recording", 2: "codes in place of audio"}),
    ("chatml.json", "ms_swift", {1: "a segment of a recording", 2: "embedded audio, or codes in place of audio"}),
    ("manifest.json", "wav_txt", {0: "a reference, misc.sample_rate, misc.source_directory",
                                  1: "a segment of a recording", 2: "a reference, codes in place of audio"}),
    ("manifest.json", "metadata_json", {1: "a segment of a recording", 2: "codes in place of audio"}),
    ("metadata_json", "manifest", {2: "2 references"}),
    ("seed_list.json", "metadata_json", {0: "misc.task_type without the reference that it asks for"}),
    ("wav_txt", "ljspeech", {1: "the speaker", 2: "the speaker"}),
    ("ms_swift.jsonl", "manifest", {1: "a system message"}),
])  # fmt: skip
def test_rows_that_would_lose_something_are_all_named_and_nothing_is_written(source, to, rows, data):
    target = data / ("out" + (FORMATS[to].suffixes or [""])[0])
    names = sorted(os.listdir(data))
    with pytest.raises(DataError) as caught:
        convert(data / source, target, to, progress=False)
    assert [line.split(":")[0] for line in caught.value.problems] == [f"row {number}" for number in rows]
    for line, what in zip(caught.value.problems, rows.values(), strict=True):
        assert f"{to} cannot hold {what}" in line and line.endswith("→ chatml and chatml_parquet hold everything")
    assert sorted(os.listdir(data)) == names


def test_rows_with_problems_are_named(data):
    rows = [{"audio_path": "a.wav"}, {"audio_path": "a.wav", "text": "a"}, {"text": "b"}]
    (data / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        convert(data / "bad.json", data / "out.json", "chatml", format="manifest", progress=False)
    assert [line.split(" → ")[0] for line in caught.value.problems] == [
        "row 0: no target_transcript",
        "row 2: no target_audio_path (nor audio_path nor target_audio_tokens)",
    ]
    assert not (data / "out.json").exists()


def test_recordings_that_are_not_there_are_named_before_any_is_copied(data):
    (data / "wavs/ann_2.wav").unlink()
    (data / "manifest.csv").write_text("audio_path,text\nwavs/ann_1.wav,a\nwavs/ann_2.wav,b\ngone.wav,c\n")
    with pytest.raises(DataError) as caught:
        convert(data / "manifest.csv", data / "out", "wav_txt", progress=False)
    assert [line.split(" → ")[0] for line in caught.value.problems] == [
        f"row 1: {data}/wavs/ann_2.wav: no such file, so it cannot be copied",
        f"row 2: {data}/gone.wav: no such file, so it cannot be copied",
    ]
    convert(data / "manifest.csv", data / "out.json", "chatml", progress=False)  # which copies nothing


def test_a_target_is_never_replaced(data):
    before = (data / "chatml.json").read_bytes()
    for target in ("chatml.json", "wav_txt"):
        with pytest.raises(DataError, match=f"{target}: exists already → give another name"):
            convert(data / "manifest.json", data / target, "chatml", progress=False)
    assert (data / "chatml.json").read_bytes() == before


def test_a_target_has_the_suffix_of_its_format(data):
    with pytest.raises(DataError, match="out.csv: manifest is a file .json or .jsonl → name it so"):
        convert(data / "manifest.json", data / "out.csv", "manifest", progress=False)
    with pytest.raises(ConfigError, match="format: 'kaldi' is none of "):
        convert(data / "manifest.json", data / "out", "kaldi", progress=False)


def test_an_error_on_the_way_leaves_nothing(data, monkeypatch):
    names = sorted(os.listdir(data))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="cannot be copied: No space left on device"):
        convert(data / "wav_txt", data / "out", "metadata_json", progress=False)
    assert sorted(os.listdir(data)) == names


def test_one_name_for_two_recordings(data):
    (data / "two").mkdir()
    shutil.copy(data / "wavs/ann_2.wav", data / "two/ann_1.wav")
    rows = [{"audio_path": path, "text": path} for path in ("wavs/ann_1.wav", "two/ann_1.wav", "wavs/ann_1.wav")]
    (data / "m.json").write_text(json.dumps(rows))
    convert(data / "m.json", data / "out", "wav_txt", progress=False)
    assert sorted(os.listdir(data / "out")) == [f"ann_1{n}.{s}" for n in ("", "_2", "_3") for s in ("txt", "wav")]
    convert(data / "m.json", data / "meta", "metadata_json", progress=False)
    assert sorted(os.listdir(data / "meta/audio")) == ["ann_1.wav", "ann_1_2.wav"]
    assert [row[4] for row in seen(data / "meta")] == [row[4] for row in seen(data / "m.json")]


def test_one_sample_id_for_two_rows_would_be_changed_and_is_refused(data):
    (data / "m.json").write_text(json.dumps([{"audio_path": "wavs/ann_1.wav", "text": "a", "sample_id": "x"}] * 2))
    with pytest.raises(DataError, match="misc.sample_id 'x' .* is that of two rows"):
        convert(data / "m.json", data / "out", "wav_txt", progress=False)
    assert not (data / "out").exists()
