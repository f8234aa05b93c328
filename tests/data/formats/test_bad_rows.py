"""What is wrong with a row of each format, in the words that its user reads. ChatML's own are in test_chatml.py."""

import json
from pathlib import Path

import pytest

from engine.data.formats import read_rows
from engine.errors import DataError


def problems(path: Path, format: str) -> dict[int, tuple[str, ...]]:
    """Number -> problems, of the rows that have any; those have no conversation, the others have one."""
    rows = list(read_rows(path, format))
    assert all((row.conversation is None) == bool(row.problems) for row in rows)
    return {row.number: row.problems for row in rows if row.problems}


def told(found: tuple[str, ...], *messages: str) -> bool:
    return len(found) == len(messages) and all(any(message in line for line in found) for message in messages)


def swift(*contents, audios=(), **keys) -> dict:
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": messages, "audios": list(audios), **keys}


def message(**keys) -> dict:
    return {"messages": [{"role": "user", "content": "hi"} | keys]}


SWIFT = {
    "one path too few": (swift("<audio>a", "<audio>", audios=["a.wav"]),
                         "2 <audio> in the messages, 1 audios → give one path for each"),
    "one path too many": (swift("a", "<audio>", audios=["a.wav", "b.wav"]), "1 <audio> in the messages, 2 audios"),
    "no audios": ({"messages": [{"role": "assistant", "content": "<audio>"}]}, "1 <audio> in the messages, 0 audios"),
    "audios no list": (swift("a") | {"audios": "a.wav"}, "audios is a string → must be a list of paths"),
    "no path": (swift("<audio>", audios=[None]), "audio 0 is null without a path → name the recording"),
    "path no text": (swift("<audio>", audios=[5]), "audio 0 is a number → must be a path or null"),
    "web address": (swift("<audio>", audios=["https://x/a.wav"]), "audio 0 is https://x/a.wav, not a file → download"),
    "no messages": ({"audios": []}, "no list of messages → a row is an object with a non-empty list 'messages'"),
    "no object": ("text", "no list of messages"),
    "message no object": ({"messages": ["hi"]}, "message 0 is a string → must be an object with role and content"),
    "role": (message(role="tool_call"), "message 0: role 'tool_call' → must be system, user or assistant"),
    "content a list": (message(content=["a"]), "content is a list → must be text, with <audio> for each recording"),
    "key that changes training": (message(loss=False), "message 0 has an unknown key 'loss' → "),
    "start_index": (swift("a", start_index="1"), "start_index is a string → must be an integer or null"),
    "speaker": (swift("a", speaker=1), "speaker is a number → must be a string or null"),
}  # fmt: skip


def target(**keys) -> dict:
    return {"target_audio_path": "a.wav", "target_transcript": "What to say."} | keys


MANIFEST = {
    "no object": (5, "is a number → a row is an object with target_audio_path and target_transcript"),
    "no recording": ({"text": "a"}, "no target_audio_path (nor audio_path nor target_audio_tokens) → name the rec"),
    "no text": ({"audio_path": "a.wav"}, "no target_transcript → give the text that the recording speaks"),
    "blank text": (target(target_transcript=" "), "no target_transcript → give the text"),
    "text no text": (target(target_transcript=["a"]), "target_transcript is a list → must be a string or null"),
    "two recordings": (target(audio_path="b.wav"), "gives both target_audio_path and audio_path → keep one"),
    "recording and codes": (target(target_audio_tokens=[[1]]), "gives both target_audio_path and target_audio_tokens"),
    "two texts": (target(text="b"), "gives both target_transcript and text → keep one"),
    "transcript of nothing": (target(ref_transcript="a"), "ref_transcript without ref_audio_path → name the ref"),
    "two references": (target(ref_audio_path="b.wav", ref_audio_tokens=[[1]]), "gives both ref_audio_path and ref_"),
    "reference no path": (target(ref_audio_path=5), "ref_audio_path is a number → must be a path or null"),
    "duration": (target(duration="1.5"), "duration is a string → must be a number of seconds or null"),
    "reference's offset": (target(ref_audio_path="b.wav", ref_offset=True), "ref_offset is a boolean → must be a num"),
    "ragged codes": (target(ref_audio_tokens=[[1, 2], [3]]), "ref_audio_tokens: codebook 1 has 1 codes, codebook 0"),
    "stream's BOS": ({"text": "a", "target_audio_tokens": [[1024, 7]]}, "target_audio_tokens holds 1024 → give the co"),
    "offset into codes": ({"text": "a", "target_audio_tokens": [[7]], "offset": 1}, "gives offset into target_audio_t"),
    "speaker": (target(speaker=5), "speaker is a number → must be a string or null"),
    "task_type": (target(task_type=["a"]), "task_type is a list → must be a string or null"),
    "web address": (target(ref_audio_path="s3://x/a.wav"), "ref_audio_path is s3://x/a.wav, not a file → download"),
}  # fmt: skip


def sample(**keys) -> dict:
    return {"audio_file": "a.wav", "transcript": "What to say."} | keys


METADATA = {
    "no object": ([], "is a list → a sample is an object with audio_file and transcript"),
    "no recording": (sample(audio_file=None), "no audio_file → name the recording"),
    "recording no path": (sample(audio_file={"path": "a"}), "audio_file is an object → must be a path or null"),
    "no text": ({"audio_file": "a.wav"}, "no transcript nor text nor transcript_file → give the text"),
    "blank text": (sample(transcript="\n"), "no transcript nor text nor transcript_file → give the text"),
    "text no text": (sample(transcript=5), "transcript is a number → must be a string or null"),
    "two texts": (sample(text="b"), "gives both transcript and text → keep one"),
    "text file gone": ({"audio_file": "a.wav", "transcript_file": "no.txt"}, "transcript_file no.txt: no such file → "),
    "text file empty": ({"audio_file": "a.wav", "transcript_file": "empty.txt"}, "transcript_file empty.txt: empty →"),
    "text file no text": ({"audio_file": "a.wav", "transcript_file": "latin.txt"}, "latin.txt: not UTF-8 text (byte"),
    "cloning without reference": (sample(task_type="zero_shot_voice_cloning"),
                                  "task_type zero_shot_voice_cloning without ref_audio_file → name the reference"),
    "several voices without": (sample(task_type="multi_speaker_voice_cloning", ref_speakers=[]),
                               "task_type multi_speaker_voice_cloning without ref_audio_file"),
    "transcript of nothing": (sample(ref_transcript="a"), "ref_transcript without ref_audio_file → name the recording"),
    "references no list": (sample(ref_speakers={"a": 1}), "ref_speakers is an object → must be a list or null"),
    "reference no object": (sample(ref_speakers=["a.wav"]), "ref_speakers 0 is a string → must be an object with ref_"),
    "reference without recording": (sample(ref_speakers=[{"speaker_id": "a"}]), "ref_speakers 0 has no ref_audio_file"),
    "another reference": (sample(ref_audio_file="c.wav", ref_speakers=[{"ref_audio_file": "b.wav"}]),
                          "ref_audio_file is none of the ref_speakers → give it there, or leave it out"),
    "duration": (sample(duration="long"), "duration is a string → must be a number of seconds or null"),
    "speaker": (sample(speaker_id=1.5), "speaker_id is a number → must be a string or an integer or null"),
    "two speakers": (sample(speaker_id="a", speaker="b"), "gives both speaker_id and speaker → keep one"),
    "two ids": (sample(id="a", sample_id="b"), "gives both id and sample_id → keep one"),
    "scene": (sample(scene=["a"]), "scene is a list → must be a string or null"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SWIFT)
def test_ms_swift(kind, tmp_path):
    row, message = SWIFT[kind]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [swift("fine"), row])))
    found = problems(tmp_path / "data.jsonl", "ms_swift")
    assert list(found) == [1] and told(found[1], message), found


@pytest.mark.parametrize("kind", MANIFEST)
def test_manifest(kind, tmp_path):
    row, message = MANIFEST[kind]
    (tmp_path / "data.json").write_text(json.dumps([target(), row]))
    found = problems(tmp_path / "data.json", "manifest")
    assert list(found) == [1] and told(found[1], message), found


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_json(kind, tmp_path):
    row, message = METADATA[kind]
    (tmp_path / "metadata.json").write_text(json.dumps({"samples": [sample(), row]}))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"t\xe9")
    found = problems(tmp_path, "metadata_json")
    assert list(found) == [1] and told(found[1], message), found


def test_a_reference_named_twice_is_one(tmp_path):
    row = sample(ref_audio_file="b.wav", ref_speakers=[{"ref_audio_file": "b.wav", "ref_transcript": "b"}])
    (tmp_path / "metadata.json").write_text(json.dumps([row]))
    (read,) = read_rows(tmp_path, "metadata_json")
    assert len(read.conversation.audios) == 2 and read.conversation.misc == {"task_type": "voice_cloning"}


def test_rows_of_tables(tmp_path):
    (tmp_path / "data.csv").write_text("audio_path,text,duration\na.wav,Fine.,1\nb.wav,Well, no,1\nc.wav,,long\n")
    found = problems(tmp_path / "data.csv", "manifest")
    assert found[1] == ("has 4 cells, line 1 has 3 → quote a cell with a delimiter in it",)
    assert told(found[2], "no target_transcript → give the text", "duration is a string → must be a number of seconds")
    assert list(found) == [1, 2]


@pytest.mark.parametrize("text, message", [
    ("a.wav,Fine.\n", "line 1 has the names ['a.wav', 'Fine.'] → it must name each column, once"),
    ("audio_path,text,text\n", "line 1 has the names"),
    ("", "line 1 has the names []"),
    ('audio_path,text\na.wav,"Fine."?\n', "line 2: "),
])  # fmt: skip
def test_a_damaged_table_is_named(text, message, tmp_path):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "data.csv", "manifest"))
    assert "data.csv: " in str(caught.value) and message in str(caught.value)


def test_files_of_wav_txt(tmp_path):
    files = {
        "a.wav": "", "a.txt": "Fine.", "b.wav": "", "c.txt": "c", "d.wav": "", "d.mp3": "", "d.txt": "d", "e.WAV": "",
        "e.txt": " ", ".hidden.wav": "", "notes.pdf": "", "ann/f.wav": "", "ann/deep/g.wav": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert problems(tmp_path, "wav_txt") == {
        1: ("b.wav has no transcript b.txt → write it, or move the recording away",),
        2: ("c.txt has no recording c.wav → add it (or .mp3, .flac, .ogg)",),
        3: ("d.mp3 and d.wav have one name → keep one of them",),
        4: ("e.txt: empty → write down what the recording speaks",),
        5: ("ann/deep is a folder within a speaker's → move its files up",),
        6: ("ann/f.wav has no transcript ann/f.txt → write it, or move the recording away",),
    }


def test_lines_of_ljspeech(tmp_path):
    lines = ["a|Fine.", "b", "c|one|two|three", "|no id", "e| ", "f|http|", "g|g| "]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n\n")
    assert problems(tmp_path, "ljspeech") == {
        1: ("has 1 columns → must be id|text or id|text|normalised text",),
        2: ("has 4 columns → must be id|text or id|text|normalised text",),
        3: ("has no id → name the recording in wavs",),
        4: ("e: no text → give what the recording speaks",),
    }


@pytest.mark.parametrize("rows, message", [
    ({"messages": ["[{]"]}, "messages is not valid JSON: "),
    ({"messages": ['[{"role": "robot", "content": "hi"}]']}, "message 0: role 'robot' → must be system"),
    ({"messages": [None]}, "no list of messages → a sample is an object with a non-empty list 'messages'"),
    ({"messages": [[{"role": "user", "content": [{"typ": "text", "text": "hi"}]}]]}, "unknown key 'typ' → did you"),
    ({"messages": [[{"role": "user", "content": "hi"}]], "misc": ["[]"]}, "misc is a list → must be an object or null"),
    ({"messages": [[{"role": "user", "content": "hi"}]], "misc": [{"a": b"\x00"}]}, "misc holds what JSON cannot"),
    ({"messages": [[{"role": "user", "content": "hi"}]], "misc": ['{"a": "\\ud800"}']}, "misc is not valid JSON: half"),
    ({"messages": [[{"role": "user", "content": "hi"}]], "start_index": [0.5]}, "start_index is a number → must be an"),
])  # fmt: skip
def test_rows_of_parquet(rows, message, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(rows), tmp_path / "data.parquet")
    found = problems(tmp_path / "data.parquet", "chatml_parquet")
    assert list(found) == [0] and told(found[0], message), found
