"""Formats by name: told from the data, streamed, and their problems listed."""

import json
import subprocess
import sys

import pytest

from engine.data.conversation import Audio, Text
from engine.data.formats import FORMAT_NAMES, FORMATS, detect, read_conversations, read_rows
from engine.errors import ConfigError, DataError
from tests.conftest import FIXTURES
from tests.processes import ROOT

DATA = FIXTURES / "formats"
FORMAT_OF = {
    "chatml.json": "chatml", "chatml.jsonl": "chatml", "chatml_wrapped.json": "chatml",
    "chatml.parquet": "chatml_parquet", "ms_swift.jsonl": "ms_swift", "manifest.json": "manifest",
    "manifest.jsonl": "manifest", "manifest.csv": "manifest", "manifest.tsv": "manifest", "seed_list.json": "manifest",
    "metadata_json": "metadata_json", "metadata_json/metadata.json": "metadata_json", "wav_txt": "wav_txt",
    "wav_txt/ann": "wav_txt", "ljspeech": "ljspeech", "ljspeech/metadata.csv": "ljspeech",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMAT_OF)
def test_the_format_is_told_from_the_data(name):
    assert detect(DATA / name) == FORMAT_OF[name]


@pytest.mark.parametrize("name", FORMAT_OF)
def test_every_row_of_the_fixtures_is_read(name):
    rows = list(read_rows(DATA / name))
    assert [row.number for row in rows] == list(range(len(rows))) and len(rows) > 0
    for row in rows:
        assert row.problems == () and row.conversation.row == row.number
        for audio in row.conversation.audios:
            assert audio.recording.path is None or (DATA / audio.recording.path).is_file()
    assert read_conversations(DATA / name, FORMAT_OF[name]) == [row.conversation for row in rows]


def test_one_name_for_each_format():
    assert FORMAT_NAMES == (
        "chatml", "chatml_parquet", "ms_swift", "manifest", "metadata_json", "wav_txt", "ljspeech"
    )  # fmt: skip
    assert all(name == candidate.name and "\n" not in candidate.summary for name, candidate in FORMATS.items())


def test_the_formats_import_neither_torch_nor_pyarrow():
    code = "import sys, engine.data.formats; sys.exit(bool({'torch', 'pyarrow', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("content", [[5], [{}], [{"audio": "a.wav"}], {"a": 1}])
def test_data_of_no_format_names_them_all(content, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        detect(tmp_path / "data.json")
    said = str(caught.value)
    assert "data.json: its format cannot be told" in said and "--format NAME" in said
    assert all(f"  - {name}: {FORMATS[name].summary}" in said for name in FORMAT_NAMES)


def test_other_files_and_empty_folders_are_of_no_format(tmp_path):
    (tmp_path / "notes.txt").write_text("Nothing.")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "notes.txt", tmp_path / "empty"):
        with pytest.raises(DataError, match="format cannot be told"):
            detect(path)


def test_data_of_two_formats_is_asked_about(tmp_path):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "metadata.csv").write_text("a|b")
    (tmp_path / "metadata.json").write_text('{"samples": []}')
    with pytest.raises(DataError, match="may be metadata_json or ljspeech → say which with --format NAME"):
        detect(tmp_path)


@pytest.mark.parametrize("content, message", [
    ("", "not valid JSON at line 1, column 1"),
    ("[]", "the list of samples is empty → nothing to train on"),
    ('{"samples": []}', "the list of samples is empty"),
    ('[\n{"messages" []}]', "not valid JSON at line 2, column 13"),
    ('"text"', "holds one sample (an object) or a list of samples, not a string"),
])  # fmt: skip
def test_a_damaged_beginning_is_told_and_not_guessed_at(content, message, tmp_path):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(DataError) as caught:
        detect(tmp_path / "data.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FORMAT_NAMES if name not in ("wav_txt", "chatml_parquet")])
def test_a_file_without_rows_is_refused(name, tmp_path):
    path = tmp_path / ("metadata.csv" if name == "ljspeech" else "data.json")
    path.write_text("\n" if name == "ljspeech" else "[]")
    with pytest.raises(DataError, match="the list of samples is empty → nothing to train on"):
        list(read_rows(path, name))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_what_is_not_there_is_named_in_every_format(name, tmp_path):
    with pytest.raises(DataError, match="gone: (there is no such data file|is no folder)"):
        list(read_rows(tmp_path / "gone", name))
    with pytest.raises(DataError, match="gone: there is no such data file"):
        list(read_rows(tmp_path / "gone"))


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ConfigError, match="format: 'xml' is none of chatml, chatml_parquet, "):
        list(read_rows(DATA / "chatml.json", "xml"))


def test_the_problems_of_all_rows_come_in_one_message(tmp_path):
    file = tmp_path / "data.jsonl"
    good = {"audio_path": "a.wav", "text": "Good."}
    rows = [good, {"audio_path": "a.wav"}, good, {"text": "Hm.", "speaker": 5, "audio_path": ""}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        read_conversations(file)
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"{file}: 3 mistake(s) in the data:"
    assert [line[:9] for line in lines] == ["  - row 1", "  - row 3", "  - row 3"]


@pytest.mark.parametrize("name", ["chatml.json", "chatml.jsonl", "manifest.jsonl", "manifest.csv", "ms_swift.jsonl"])
def test_rows_come_before_the_end_of_the_file_is_read(name, tmp_path):
    """The end is damaged, and far enough from the first row that it is not in the same read."""
    text = (DATA / name).read_text()
    first, rest = text.split("\n", 1) if name != "chatml.json" else (text.rstrip().rstrip("]"), "")
    damaged = first + (",\n" if name == "chatml.json" else "\n") + rest + "\n" * 200_000
    (tmp_path / name).write_bytes(damaged.encode() + b"\xff\n")
    rows = read_rows(tmp_path / name)
    assert next(rows).problems == ()
    with pytest.raises(DataError, match="not UTF-8"):
        list(rows)


# ---- what the text-to-speech formats are read into


def spoken(name: str) -> list[tuple]:
    """The contents of user and assistant, speaker and misc of each row; a recording as its path from the fixtures."""

    def shown(item: Text | Audio):
        if isinstance(item, Text):
            return item.text
        path = item.recording.path
        return item.recording.code_array.tolist() if path is None else (path.removeprefix(f"{DATA}/"),)

    conversations = read_conversations(DATA / name)
    assert all([m.role for m in c.messages] == ["user", "assistant"] for c in conversations)
    contents = [[[shown(item) for item in m.content] for m in c.messages] for c in conversations]
    return [(*content, c.speaker, c.misc) for content, c in zip(contents, conversations, strict=True)]


def test_manifest():
    codes = [[1, 2, 3], [1023, 0, 5]]
    rest = {"sample_rate": 8000, "source_directory": "wavs"}
    wanted = [
        (["The river bends.", ("wavs/ann_1.wav",), "Open the window."], [("wavs/ann_2.wav",)], "ann",
         {"sample_id": "a2", "task_type": "voice_cloning"} | rest),
        (["Good morning."], [("wavs/bob_1.flac",)], "bob", {"sample_id": "b1", "task_type": "single_speaker"}),
        (["Hm.", [[7], [8]], "Cut, then joined."], [codes], None, {"sample_id": "c1", "task_type": "voice_cloning"}),
    ]  # fmt: skip
    assert spoken("manifest.json") == spoken("manifest.jsonl") == wanted
    segment = read_conversations(DATA / "manifest.json")[1].audios[0].recording
    assert (segment.offset, segment.duration) == (0.05, 0.1)


def test_manifest_tables():
    assert spoken("manifest.csv") == [
        (["The river bends.", ("wavs/ann_1.wav",), "Open the window."], [("wavs/ann_2.wav",)], "ann",
         {"sample_id": "a2", "task_type": "voice_cloning"}),
        (['Good morning, "Bob".'], [("wavs/bob_1.flac",)], "bob", {"sample_id": "b1", "task_type": "single_speaker"}),
    ]  # fmt: skip
    assert read_conversations(DATA / "manifest.csv")[0].audios[1].recording.duration == 0.15
    assert spoken("manifest.tsv")[0][:3] == (["The river bends."], [("wavs/ann_1.wav",)], "ann")


def test_the_own_list_of_the_seed_has_no_reference_and_keeps_its_task_type():
    misc = {"task_type": "zero_shot_voice_cloning"}
    assert spoken("seed_list.json") == [(["The river bends."], [("wavs/ann_1.wav",)], "ann", misc)]


def test_metadata_json():
    one, two, bob = (("metadata_json/" + name,) for name in ("ann_1.wav", "ann_2.wav", "bob_1.wav"))
    both = "[SPEAKER0] Open the window. [SPEAKER1] Good morning."
    assert spoken("metadata_json") == spoken("metadata_json/metadata.json") == [
        (["The river bends.", one, "Open the window."], [two], "ann",
         {"sample_id": "a2", "speaker_name": "Ann", "emotion": "calm", "task_type": "zero_shot_voice_cloning",
          "scene": "Audio is recorded from a quiet room."}),
        (["Good morning."], [bob], "Bob",
         {"sample_id": "b1", "speaker_name": "Bob", "task_type": "single_speaker_smart_voice",
          "scene": "They stand at the sea."}),
        (["The river bends.", one, "Good morning.", bob, both], [bob], "7",
         {"sample_id": "d1", "task_type": "multi_speaker",
          "ref_speakers": [{"speaker_id": "ann"}, {"speaker_id": "bob"}]}),
    ]  # fmt: skip


def test_wav_txt():
    def misc(name):
        return {"sample_id": name, "task_type": "single_speaker"}

    assert spoken("wav_txt") == [
        (["Hello there."], [("wav_txt/hello.wav",)], None, misc("hello")),
        (["The river bends."], [("wav_txt/ann/one.wav",)], "ann", misc("one")),
        (["Open the window."], [("wav_txt/ann/two.flac",)], "ann", misc("two")),
    ]
    assert [row[2] for row in spoken("wav_txt/ann")] == [None, None]


def test_ljspeech():
    said, written = 'It cost five dollars, "she" said.', 'It cost $5, "she" said.'
    assert spoken("ljspeech") == spoken("ljspeech/metadata.csv") == [
        ([said], [("ljspeech/wavs/LJ-1.wav",)], None,
         {"sample_id": "LJ-1", "written_text": written, "task_type": "single_speaker"}),
        (["Open the window."], [("ljspeech/wavs/LJ-2.wav",)], None,
         {"sample_id": "LJ-2", "task_type": "single_speaker"}),
    ]  # fmt: skip


def test_ms_swift():
    first, second = read_conversations(DATA / "ms_swift.jsonl")
    user, assistant = first.messages
    assert [item.text if isinstance(item, Text) else item.recording.path for item in user.content] == [
        str(DATA / "wavs/ann_1.wav"), "Say it in this voice: Open the window.",
    ]  # fmt: skip
    assert [audio.recording.path for audio in assistant.content] == [str(DATA / "wavs/ann_2.wav")]
    assert (first.speaker, first.misc) == ("ann", {}) and second.misc == {"channel": "demo"}
    assert [message.role for message in second.messages] == ["system", "user", "assistant"]
