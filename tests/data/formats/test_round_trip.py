"""What a format writes it reads back: any conversation in ChatML, in the others any that they say they can hold."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.audio import Recording
from engine.data.conversation import Audio, Conversation, Message, Text, speech
from engine.data.formats import FORMATS, read_conversations
from engine.data.formats.spoken import Spoken, plain
from tests.conftest import FIXTURES

DATA = FIXTURES / "formats"
CLIP = Audio(Recording(path="a.wav"))
TEXTS = st.sampled_from(["", " ", "a <audio> b", "a|b", "你好。", "😀", "He said \"no\",\nthen\t'yes'."]) | st.text(
    st.characters(codec="utf-8"), max_size=6
)
SECONDS = st.none() | st.floats(0, 1e4) | st.integers(0, 100)
NAMES = st.sampled_from(["a.wav", "sub/b.flac", "ü ö.wav", "../c.wav", "/far/d.wav"])
CODES = st.builds(
    lambda books, frames, seed: np.random.default_rng(seed).integers(0, 1024, (books, frames), np.int16),
    st.integers(1, 8), st.integers(1, 5), st.integers(0, 99),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats().filter(math.isfinite) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)
KEYS = TEXTS | st.sampled_from(["sample_id", "text", "messages", "speaker", "task_type", "scene", "id", "ref_speakers"])
MISC = st.dictionaries(KEYS, JSON, max_size=3)


@st.composite
def recordings(draw) -> Recording:
    segment = {"offset": draw(SECONDS), "duration": draw(SECONDS)}
    match draw(st.sampled_from(["path", "path", "data", "codes"])):
        case "path":
            return Recording(path=draw(NAMES), **segment)
        case "data":
            return Recording(data=draw(st.binary(min_size=1, max_size=9)), **segment)
    return replace(Recording.of_codes(draw(CODES)), duration=segment["duration"])


CONTENT = st.lists(TEXTS.map(Text) | recordings().map(Audio), max_size=4).map(tuple)
MESSAGES = st.builds(Message, st.sampled_from(["system", "user"]), CONTENT) | st.builds(
    Message, st.just("assistant"), CONTENT, st.none() | TEXTS
)
CONVERSATIONS = st.builds(
    Conversation, st.lists(MESSAGES, min_size=1, max_size=3).map(tuple), st.none() | st.integers(-(2**31), 2**31),
    st.none() | TEXTS, MISC,
)  # fmt: skip
SPEECH = st.builds(
    speech, TEXTS, recordings(), st.lists(st.tuples(st.none() | TEXTS, recordings()), max_size=2),
    st.none() | TEXTS, MISC,
)  # fmt: skip


def below(folder: Path, conversation: Conversation, row: int) -> Conversation:
    """The conversation as that row of a data file in `folder`, to which its relative paths then belong."""

    def placed(item):
        if isinstance(item, Text) or item.recording.path is None:
            return item
        path = (folder / item.recording.path).resolve()
        return Audio(replace(item.recording, path=str(path)))

    messages = tuple(replace(m, content=tuple(map(placed, m.content))) for m in conversation.messages)
    return replace(conversation, messages=messages, row=row)


def written_and_read(name: str, suffix: str, conversations: list[Conversation], folder: Path) -> list[Conversation]:
    path = folder / f"data{suffix}"
    FORMATS[name].write(conversations, path)
    return read_conversations(path, name)


@pytest.mark.parametrize("name, suffix", [("chatml", ".json"), ("chatml", ".jsonl"), ("chatml_parquet", ".parquet")])
@settings(max_examples=60, deadline=None)
@given(conversations=st.lists(CONVERSATIONS, min_size=1, max_size=4))
def test_chatml_holds_every_conversation(name, suffix, conversations):
    with tempfile.TemporaryDirectory() as folder:
        wanted = [below(Path(folder).resolve(), c, row) for row, c in enumerate(conversations)]
        assert all(FORMATS[name].lacks(conversation) is None for conversation in wanted)
        assert written_and_read(name, suffix, wanted, Path(folder).resolve()) == wanted


def with_defaults(conversation: Conversation) -> Conversation:
    """As it is read from a format without turns: with a task type, and without a start_index that says nothing."""
    spoken = Spoken.of(conversation)
    return conversation if spoken is None else spoken.conversation(conversation.row)


def without_lengths(conversation: Conversation) -> Conversation:
    def plainly(item):
        return item if isinstance(item, Text) else Audio(plain(item.recording))

    messages = tuple(replace(m, content=tuple(map(plainly, m.content))) for m in conversation.messages)
    return replace(conversation, messages=messages)


@pytest.mark.parametrize("name, suffix", [("ms_swift", ".jsonl"), ("manifest", ".json"), ("manifest", ".jsonl")])
@settings(max_examples=150, deadline=None)
@given(conversation=SPEECH | CONVERSATIONS)
def test_others_hold_what_they_say_they_hold(name, suffix, conversation):
    with tempfile.TemporaryDirectory() as folder:
        wanted = below(Path(folder).resolve(), conversation, 0)
        if FORMATS[name].lacks(wanted) is None:
            (read,) = written_and_read(name, suffix, [wanted], Path(folder).resolve())
            wanted = wanted if name == "ms_swift" else with_defaults(wanted)
            assert without_lengths(read) == without_lengths(wanted)
            assert name == "ms_swift" or read == wanted


@pytest.mark.parametrize("name", ["metadata_json", "wav_txt", "ljspeech"])
@settings(max_examples=150, deadline=None)
@given(conversation=SPEECH, source=st.sampled_from(["a.wav", "a.b.wav", "b.wav.wav", "ü.flac", "|.wav", " c.wav", "d"]))
def test_folders_hold_what_they_say_they_hold(name, conversation, source):
    """Recordings have other paths then, and the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / source).write_bytes(source.encode())

        def sourced(item):
            recording = getattr(item, "recording", None)
            return Audio(replace(recording, path=str(Path(folder) / source))) if recording and recording.path else item

        messages = tuple(replace(m, content=tuple(map(sourced, m.content))) for m in conversation.messages)
        wanted = replace(conversation, messages=messages)
        if FORMATS[name].lacks(wanted) is None:
            (read,) = written_and_read(name, "", [wanted], Path(folder))
            assert all(Path(audio.recording.path).is_relative_to(Path(folder) / "data") for audio in read.audios)
            assert all(audio.recording.open().read() == source.encode() for audio in read.audios)
            assert read.misc == {"sample_id": read.misc.get("sample_id")} | wanted.misc or read.misc == wanted.misc
            assert read.speaker == wanted.speaker
            assert [m.texts for m in read.messages] == [m.texts for m in wanted.messages]
            assert [len(m.audios) for m in read.messages] == [len(m.audios) for m in wanted.messages]


@given(SPEECH)
def test_the_parts_of_speech_are_found_again(conversation):
    assert Spoken.of(conversation).conversation() == conversation


@pytest.mark.parametrize("name", ["metadata_json", "wav_txt", "ljspeech"])
def test_the_fixtures_of_folders_are_written_as_they_are_read(name, tmp_path):
    source = read_conversations(DATA / name)
    FORMATS[name].write(source, tmp_path / "copy")
    copy = read_conversations(tmp_path / "copy")

    def shown(conversation):
        contents = [audio.recording.open().read() for audio in conversation.audios]
        return [m.texts for m in conversation.messages], contents, conversation.speaker, conversation.misc

    assert list(map(shown, copy)) == list(map(shown, source))


@pytest.mark.parametrize("user, assistant, recipient", [
    ((Text("a"), Text("b")), (CLIP,), None),
    ((Text("a"), Text("b"), CLIP, Text("c")), (CLIP,), None),
    ((Text("a"),), (Text("a"), CLIP), None),
    ((Text("a"),), (CLIP, CLIP), None),
    ((Text("a"),), (CLIP,), "tool"),
])  # fmt: skip
def test_what_speech_cannot_have_made_has_no_parts_and_is_not_cut_down(user, assistant, recipient):
    conversation = Conversation((Message("user", user), Message("assistant", assistant, recipient)))
    assert Spoken.of(conversation) is None
    assert all(FORMATS[name].lacks(conversation) for name in ("manifest", "metadata_json", "wav_txt", "ljspeech"))


def test_an_id_of_ljspeech_that_looks_like_a_file_name(tmp_path):
    (tmp_path / "b.wav.wav").write_bytes(b"b")
    wanted = speech("a", Recording(path=str(tmp_path / "b.wav.wav")))
    FORMATS["ljspeech"].write([wanted], tmp_path / "data")
    (read,) = read_conversations(tmp_path / "data")
    assert read.audios[0].recording.open().read() == b"b" and read.misc["sample_id"] == "b.wav"
