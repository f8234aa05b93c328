"""Data files: what the format allows is read, and every mistake is told with its row, all of them at once."""

import base64
import json

import pytest

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Message, Text
from engine.data.formats import read_conversations
from engine.errors import DataError

ANSWER = {"role": "assistant", "content": {"type": "audio", "audio_url": "a.wav"}}


@pytest.fixture
def read(tmp_path):
    def write_and_read(data) -> list[Conversation]:
        file = tmp_path / "data.json"
        file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        return read_conversations(file, "chatml")

    return write_and_read


def told(read, data) -> str:
    with pytest.raises(DataError) as caught:
        read(data)
    return str(caught.value)


def row(*items, role="user", **keys) -> dict:
    return {"messages": [{"role": role, "content": list(items)}, ANSWER], **keys}


# ---- what is read


def test_one_object_is_a_list_of_one(read):
    assert read(row("hi")) == read([row("hi")])
    assert [sample.row for sample in read([row("a"), row("b"), row("c")])] == [0, 1, 2]


def test_a_row_is_read_in_full(read, tmp_path):
    (sample,) = read(row("a", {"type": "text", "text": "b"}, start_index=1, speaker="anna", misc={"x": 1}, other=2))
    assert sample == Conversation(
        messages=(
            Message("user", (Text("a"), Text("b"))),
            Message("assistant", (Audio(Recording(str(tmp_path / "a.wav"))),)),
        ),
        start_index=1, speaker="anna", misc={"x": 1},
    )  # fmt: skip
    (bare,) = read({"messages": [ANSWER], "start_index": None, "speaker": None, "misc": None})
    assert (bare.start_index, bare.speaker, bare.misc) == (None, None, {})


def test_content_is_text_an_item_or_a_list(read):
    contents = ["hi", {"type": "text", "text": "hi"}, {"text": "hi"}, ["hi"]]
    samples = read([{"messages": [{"role": "user", "content": content}]} for content in contents])
    assert {sample.messages for sample in samples} == {(Message("user", (Text("hi"),)),)}


def test_text_is_kept_to_the_letter(read):
    (sample,) = read(row(" \n你好: 10:30 "))
    assert sample.messages[0].texts == [" \n你好: 10:30 "]


def test_a_recipient_is_kept(read):
    (sample,) = read({"messages": [ANSWER | {"recipient": "tool"}]})
    assert sample.messages[0].recipient == "tool"


def test_relative_recordings_belong_to_the_folder_of_the_data_file(read, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (sample,) = read(row({"audio_url": "deep/b.wav"}, {"audio_url": "/far/c.wav"}))
    paths = [audio.recording.path for audio in sample.audios]
    assert paths == [str(tmp_path / "deep/b.wav"), "/far/c.wav", str(tmp_path / "a.wav")]


def test_a_recording_may_be_embedded_and_have_a_segment(read):
    raw = base64.b64encode(b"RIFF").decode()
    (sample,) = read(row(
        {"type": "audio", "raw_audio": raw, "audio_url": ""},
        {"type": "audio", "audio_url": "/b.wav", "raw_audio": None, "offset": 1, "duration": 2.5, "row_id": 3},
    ))  # fmt: skip
    assert [audio.recording for audio in sample.audios[:2]] == [
        Recording(data=b"RIFF"), Recording("/b.wav", offset=1, duration=2.5),
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["audio_tokens", "audio_codes"])
def test_codes_may_stand_in_place_of_a_recording(read, key):
    (sample,) = read(row({key: [[1, 2, 3], [1023, 0, 5]], "duration": 0.1}))
    recording = sample.audios[0].recording
    assert recording.code_array.tolist() == [[1, 2, 3], [1023, 0, 5]] and recording.duration == 0.1


# ---- what is refused


@pytest.mark.parametrize("data, message", [
    (b"", "not valid JSON at line 1, column 1"),
    (b'[\n {"messages": []},\n {"messages" []}\n]', "not valid JSON at line 3, column 14: Expecting ':' delimiter"),
    (b'[{"messages": "\xe9"}]', "not UTF-8 text (byte 15) → save the file as UTF-8"),
    ("text", "holds one sample (an object) or a list of samples, not a string"),
    (5, "not a number"),
    (None, "not null"),
    ([], "the list of samples is empty → nothing to train on"),
])  # fmt: skip
def test_a_file_that_holds_no_samples_is_refused(data, message, read, tmp_path):
    said = told(read, data)
    assert str(tmp_path / "data.json") in said and message in said


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="gone.json: there is no such data file"):
        read_conversations(tmp_path / "gone.json", "chatml")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_conversations(tmp_path, "chatml")


def audio(**keys) -> dict:
    return {"type": "audio"} | keys


@pytest.mark.parametrize("wrong, message", [
    ("text", "no list of messages → a sample is an object with a non-empty list 'messages'"),
    ({}, "no list of messages"),
    ({"messages": {}}, "no list of messages"),
    ({"messages": []}, "no list of messages"),
    ({"messages": ["hi"]}, "message 0 is a string → must be an object with role and content"),
    ({"messages": [{"content": "hi"}]}, "message 0: role None → must be system, user or assistant"),
    (row("hi", role="Assistant"), "message 0: role 'Assistant' → must be"),
    (row("hi", role=["user"]), "message 0: role ['user'] → must be"),
    ({"messages": [{"role": "user"}]}, "message 0, item 0: content is null → must be text, an item, or a list"),
    (row(5), "message 0, item 0: content is a number"),
    (row("hi", ["nested"]), "message 0, item 1: content is a list"),
    (row({"type": "video", "url": "x"}), "message 0, item 0: type 'video' → must be text or audio"),
    (row({"type": "text"}), "message 0, item 0: a text item needs a string 'text'"),
    (row({"type": "text", "text": 5}), "a text item needs a string 'text'"),
    (row({"type": "text", "text": "a", "lang": "ar"}), "has an unknown key 'lang' → "),
    (row(audio(url="b.wav")), "has an unknown key 'url' → did you mean 'audio_url'?"),
    (row(audio(audio_url="b.wav", q=1)), "unknown key 'q' → allowed are type, audio_url, raw_audio"),
    ({"messages": [ANSWER | {"rol": "x"}]}, "message 0 has an unknown key 'rol' → did you mean 'role'?"),
    (row(audio()), "neither audio_url nor raw_audio → name the recording"),
    (row(audio(audio_url="")), "neither audio_url nor raw_audio"),
    (row(audio(audio_url=["b.wav"])), "audio_url is a list → must be a path or null"),
    (row(audio(raw_audio="no base64!")), "raw_audio is not base64"),
    (row(audio(audio_url="b.wav", offset="1")), "offset is a string → must be a number of seconds or null"),
    (row(audio(audio_url="b.wav", duration=True)), "duration is a boolean → must be a number"),
    (row("hi", start_index=1.0), "start_index is a number → must be an integer or null"),
    (row("hi", start_index=True), "start_index is a boolean → must be an integer or null"),
    (row("hi", speaker=5), "speaker is a number → must be a string or null"),
    (row("hi", misc=[]), "misc is a list → must be an object or null"),
    ({"messages": [{"role": "user", "content": "hi", "recipient": "x"}]}, "only an assistant message can have a"),
    ({"messages": [ANSWER | {"recipient": 5}]}, "message 0: recipient is a number → must be a string"),
    (row(audio(audio_url="http://x/b.wav")), "audio_url is http://x/b.wav, not a file → download it and give its path"),
    (row(audio(audio_url="b.wav", offset=float("nan"))), "offset is nan → must be a number of seconds or null"),
    (row(audio(audio_url="b.wav", duration=10**400)), "→ must be a number of seconds or null"),
    (row(audio(raw_audio="é")), "raw_audio is not base64"),
    (row("hi", audios=["b.wav"]), "has 'audios' beside its messages, as ms-swift's data has → read it with --format"),
    (row(audio(audio_tokens=5)), "audio_tokens is no list of codebooks → give [codebooks][frames]"),
    (row(audio(audio_tokens=[])), "audio_tokens is no list of codebooks"),
    (row(audio(audio_tokens=[1, 2])), "audio_tokens is no list of codebooks"),
    (row(audio(audio_tokens=[[1, 2.0]])), "audio_tokens holds something other than integers"),
    (row(audio(audio_tokens=[[1, True]])), "audio_tokens holds something other than integers"),
    (row(audio(audio_tokens=[[1, 2], [1]])), "codebook 1 has 1 codes, codebook 0 has 2 → give one code a frame"),
    (row(audio(audio_tokens=[[], []])), "audio_tokens has no frames"),
    (row(audio(audio_tokens=[[1024, 1], [1024, 2]])), "holds 1024 → give the codec's own codes, 0 to 1023, with"),
    (row(audio(audio_codes=[[3, -1]])), "audio_codes holds -1 → give the codec's own codes"),
    (row(audio(audio_tokens=[[1]], audio_url="b.wav")), "gives audio_tokens beside audio_url or raw_audio → keep one"),
    (row(audio(audio_tokens=[[1]], audio_codes=[[1]])), "gives both audio_tokens and audio_codes → keep one"),
    (row(audio(audio_tokens=[[1]], offset=1)), "gives an offset into audio_tokens → give the codes of the segment"),
])  # fmt: skip
def test_a_mistake_is_told_with_its_row(wrong, message, read):
    said = told(read, [row("fine"), wrong])
    assert "row 1: " in said and message in said and "row 0" not in said


def test_all_mistakes_of_all_rows_come_together(read, tmp_path):
    said = told(read, [row(5, role="robot"), row("fine"), {}, row("hi", speaker=1, misc=2)])
    heading, *lines = said.splitlines()
    assert heading == f"{tmp_path / 'data.json'}: 5 mistake(s) in the data:"
    assert [line.split(":")[0].removeprefix("  - row ") for line in lines] == ["0", "0", "2", "3", "3"]


def test_a_long_list_of_mistakes_is_counted(read):
    lines = told(read, [{}] * 30).splitlines()
    assert "30 mistake(s)" in lines[0] and len(lines) == 27 and lines[-1] == "  … and 5 more"
