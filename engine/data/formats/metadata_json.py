"""A folder with `metadata.json`, its samples' recordings and, if they are not in it, their transcripts::

    {"dataset_info": {…},
     "samples": [{"id": "a1", "audio_file": "a1.wav", "transcript_file": "a1.txt", "speaker_id": "ann",
                  "scene": "a quiet room", "ref_audio_file": "a2.wav", "ref_transcript": "What a2 says."}]}

Paths are relative to the folder. The text is `transcript` or `text`, or stands in `transcript_file`. Several
references are a list `ref_speakers` of such `ref_audio_file` and `ref_transcript`; what else its entries have is
kept, in order, in misc.ref_speakers. The speaker is `speaker_id` (or `speaker`), else `speaker_name`; `id` becomes
misc.sample_id. A scene of a few words is put into the original's sentence, "Audio is recorded from …"; a sentence is
kept. A task type that clones a voice needs a reference, and no transcript is made up for one. What else a sample has
goes to misc.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.data.audio import Recording
from engine.data.conversation import Conversation, Row, speech
from engine.data.formats import json_rows
from engine.data.formats.format import Format
from engine.data.formats.json_rows import kind
from engine.data.formats.recording_files import Copies
from engine.data.formats.row_check import RowCheck
from engine.data.formats.spoken import Spoken, lost

FILE = "metadata.json"
TEXT_KEYS = ("transcript", "text", "transcript_file")
SPEAKER_KEYS = ("speaker_id", "speaker")
REFERENCE_KEYS = ("ref_audio_file", "ref_transcript")
KEYS = ("id", "audio_file", *TEXT_KEYS, "duration", *SPEAKER_KEYS, "scene", *REFERENCE_KEYS, "ref_speakers")

Reference = tuple[str | None, Recording | None]


def read(path: Path) -> Iterator[Row]:
    """The samples of a folder, or of the metadata file itself."""
    file = path / FILE if path.is_dir() else path
    for number, row in enumerate(json_rows.read_rows(file)):
        check = _MetadataCheck(file.parent)
        yield check.row(number, check.conversation(row, number))


def write(conversations: Iterable[Conversation], path: Path) -> None:
    """A folder with the recordings copied into `audio/`."""
    path.mkdir()
    copies, count, between = Copies(path), 0, '{"samples": [\n'
    with (path / FILE).open("w", encoding="utf-8") as file:
        for conversation in conversations:
            file.write(between + json.dumps(_row(conversation, copies), ensure_ascii=False))
            count, between = count + 1, ",\n"
        file.write(f'\n],\n"dataset_info": {{"total_samples": {count}}}}}\n')


def lacks(conversation: Conversation) -> str | None:
    reserved = set(KEYS) - {"scene", "ref_speakers"}
    losses = lost(conversation, references=None, speaker=True, fields=None, reserved=reserved)
    if losses:
        return losses
    spoken = Spoken.of(conversation)
    if spoken.has_empty_text:
        return "an empty text"
    if _clones(spoken.misc.get("task_type")) and not spoken.references:
        return "misc.task_type without the reference that it asks for"
    scene = spoken.misc.get("scene")
    if scene is not None and (not isinstance(scene, str) or sentence_of(scene) != scene):
        return "misc.scene, which is no sentence"
    if "ref_speakers" in spoken.misc and not _fits(spoken.misc["ref_speakers"], len(spoken.references)):
        return "misc.ref_speakers, which does not describe each reference"
    return None


def detects(path: Path) -> bool:
    if path.is_dir():
        return (path / FILE).is_file()
    row = json_rows.first_row(path)
    return isinstance(row, dict) and "messages" not in row and "audio_file" in row


FORMAT = Format(
    name="metadata_json",
    summary='folder with metadata.json, {"samples": [{"audio_file", "transcript" or "transcript_file", …}]}',
    detects=detects,
    read=read,
    write=write,
    lacks=lacks,
)


def sentence_of(scene: str) -> str:
    """The scene as a sentence: a few words become that of the original's inference."""
    is_sentence = " " in scene.strip() and scene.rstrip()[-1:] in (".", "!", "?", "。")
    return scene if is_sentence or not scene.strip() else f"Audio is recorded from {scene}."


class _MetadataCheck(RowCheck):
    def conversation(self, row: Any, number: int) -> Conversation | None:
        if not isinstance(row, dict):
            self.problem(f"is {kind(row)} → a sample is an object with audio_file and transcript")
            return None
        duration = self.seconds(row.get("duration"), "duration")
        recording = self.file(row.get("audio_file"), "audio_file", duration=duration)
        if row.get("audio_file") in (None, ""):
            self.problem("no audio_file → name the recording")
        text = self.transcript(row)
        references = self.references(row)
        self.require_reference(row, references)
        speaker = self.speaker(row)
        misc = self.misc(row)
        return None if self.problems else speech(text, recording, references, speaker, misc, number)

    def transcript(self, row: dict) -> str | None:
        key = self.one_of(row, TEXT_KEYS)
        value = row.get(key)
        if value is None or isinstance(value, str) and not value.strip():
            self.problem(f"no {' nor '.join(TEXT_KEYS)} → give the text that the recording speaks")
            return None
        value = self.string(value, key)
        if value is None or key != "transcript_file":
            return value
        return self.text_file(value, f"transcript_file {value}")

    def references(self, row: dict) -> list[Reference]:
        entries = self.typed(row.get("ref_speakers"), (list,), "ref_speakers", "a list")
        if not entries:
            single = self.reference(row, "")
            return [] if single is None else [single]
        found = []
        for number, entry in enumerate(entries):
            where = f"ref_speakers {number}"
            if not isinstance(entry, dict):
                self.problem(f"{where} is {kind(entry)} → must be an object with ref_audio_file")
                continue
            reference = self.reference(entry, f"{where}: ")
            if reference is None and entry.get("ref_audio_file") in (None, ""):
                self.problem(f"{where} has no ref_audio_file → name the reference's recording")
            found.append(reference)
        named = [entry.get("ref_audio_file") for entry in entries if isinstance(entry, dict)]
        if row.get("ref_audio_file") and row["ref_audio_file"] not in named:
            self.problem("ref_audio_file is none of the ref_speakers → give it there, or leave it out")
        return found

    def reference(self, entry: dict, where: str) -> Reference | None:
        recording = self.file(entry.get("ref_audio_file"), f"{where}ref_audio_file")
        transcript = self.string(entry.get("ref_transcript"), f"{where}ref_transcript") or None
        if recording is not None:
            return transcript, recording
        if transcript is not None and entry.get("ref_audio_file") in (None, ""):
            self.problem(f"{where}ref_transcript without ref_audio_file → name the recording, or leave both out")
        return None

    def require_reference(self, row: dict, references: list) -> None:
        task = self.string(row.get("task_type"), "task_type")
        if _clones(task) and not references:
            self.problem(f"task_type {task} without ref_audio_file → name the reference, or give the task that it is")

    def speaker(self, row: dict) -> str | None:
        key = self.one_of(row, SPEAKER_KEYS)
        key = "speaker_name" if row.get(key) is None else key
        speaker = self.typed(row.get(key), (str, int), key, "a string or an integer")
        return None if speaker is None else str(speaker)

    def misc(self, row: dict) -> dict:
        misc = {key: value for key, value in row.items() if key not in KEYS}
        name = row.get(self.one_of(row, ("id", "sample_id")))
        misc |= {} if name is None else {"sample_id": name}
        scene = self.string(row.get("scene"), "scene")
        if scene is not None:
            misc["scene"] = sentence_of(scene)
        entries = row.get("ref_speakers")
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            rest = [{key: entry[key] for key in entry if key not in REFERENCE_KEYS} for entry in entries]
            misc |= {"ref_speakers": rest} if any(rest) else {}
        return misc


def _clones(task_type: str | None) -> bool:
    return "voice_cloning" in (task_type or "")


def _fits(ref_speakers: Any, references: int) -> bool:
    """Whether misc.ref_speakers would be read as it is."""
    return (
        isinstance(ref_speakers, list)
        and len(ref_speakers) == references
        and all(isinstance(entry, dict) and not set(entry) & set(REFERENCE_KEYS) for entry in ref_speakers)
        and any(ref_speakers)
    )


def _row(conversation: Conversation, copies: Copies) -> dict:
    spoken = Spoken.of(conversation)
    misc = dict(spoken.misc)
    row = {"id": misc.pop("sample_id")} if misc.get("sample_id") is not None else {}
    row |= {"audio_file": copies.add(spoken.recording, "audio"), "transcript": spoken.text}
    row |= {} if spoken.recording.duration is None else {"duration": spoken.recording.duration}
    row |= {} if spoken.speaker is None else {"speaker_id": spoken.speaker}
    references = [
        {"ref_audio_file": copies.add(recording, "audio")} | ({} if text is None else {"ref_transcript": text})
        for text, recording in spoken.references
    ]
    described = misc.pop("ref_speakers", None)
    if described is not None or len(references) > 1:
        described = described or [{}] * len(references)
        row["ref_speakers"] = [about | entry for about, entry in zip(described, references, strict=True)]
    elif references:
        row |= references[0]
    return row | misc
