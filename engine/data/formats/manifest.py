"""Manifests: a row names the recording, what it says and, for cloning, a reference, in JSON, JSONL, CSV or TSV::

    {"target_audio_path": "target.wav", "target_transcript": "What to say.", "speaker": "ann",
     "ref_audio_path": "reference.wav", "ref_transcript": "What the reference says.", "duration": 1.2}

Shorter names of the first two are `audio_path` and `text`. `offset` with `duration`, and `ref_offset` with
`ref_duration`, cut a segment out. In place of paths, `target_audio_tokens` and `ref_audio_tokens` give the codec's
codes, [codebooks][frames]. A row without reference is one to train without; what else it has goes to misc. In CSV and
TSV the first line has the names, an empty cell is a field left out, and fields that go to misc stay text.
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.data.audio import Recording
from engine.data.conversation import Conversation, Row, speech
from engine.data.formats import json_rows, text_files
from engine.data.formats.format import Format
from engine.data.formats.json_rows import kind
from engine.data.formats.recording_files import path_from
from engine.data.formats.row_check import RowCheck
from engine.data.formats.spoken import Spoken, lost
from engine.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
AUDIO_KEYS = ("target_audio_path", "audio_path", "target_audio_tokens")
TEXT_KEYS = ("target_transcript", "text")
REFERENCE_KEYS = ("ref_audio_path", "ref_audio_tokens")
SEGMENT_KEYS = ("offset", "duration", "ref_offset", "ref_duration")
KEYS = (*AUDIO_KEYS, *TEXT_KEYS, *REFERENCE_KEYS, "ref_transcript", *SEGMENT_KEYS, "speaker")


def read(path: Path) -> Iterator[Row]:
    if path.suffix.lower() in DELIMITERS:
        yield from _read_table(path)
        return
    for number, row in enumerate(json_rows.read_rows(path)):
        check = _ManifestCheck(path.parent)
        yield check.row(number, check.conversation(row, number))


def _read_table(path: Path) -> Iterator[Row]:
    table = csv.reader(text_files.lines(path), delimiter=DELIMITERS[path.suffix.lower()], strict=True)
    try:
        names = next(table, [])
        if not set(names) & set(AUDIO_KEYS) or len(set(names)) < len(names):
            raise DataError(
                f"{path}: line 1 has the names {names} → it must name each column, once, and one of them "
                f"{' or '.join(AUDIO_KEYS[:2])}."
            )
        for number, cells in enumerate(filter(None, table)):
            check = _ManifestCheck(path.parent)
            if len(cells) != len(names):
                check.problem(f"has {len(cells)} cells, line 1 has {len(names)} → quote a cell with a delimiter in it")
                yield check.row(number, None)
                continue
            row = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
            for key in SEGMENT_KEYS:
                if key in row:
                    row[key] = _number(row[key])
            yield check.row(number, check.conversation(row, number))
    except csv.Error as error:
        raise DataError(f"{path}: line {table.line_num}: {error} → quote cells as CSV does.") from None


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def write(conversations: Iterable[Conversation], path: Path) -> None:
    json_rows.write_rows((_row(conversation, path.parent) for conversation in conversations), path)


def lacks(conversation: Conversation) -> str | None:
    losses = lost(conversation, references=1, speaker=True, fields=None, reserved=KEYS, segments=True, codes=True)
    return losses or ("an empty text" if Spoken.of(conversation).has_empty_text else None)


def detects(path: Path) -> bool:
    if path.suffix.lower() in DELIMITERS and path.is_file():
        names = next(text_files.lines(path), "").strip().split(DELIMITERS[path.suffix.lower()])
        return any(name.strip('"') in AUDIO_KEYS for name in names)
    row = json_rows.first_row(path)
    return isinstance(row, dict) and "messages" not in row and any(key in row for key in AUDIO_KEYS)


FORMAT = Format(
    name="manifest",
    summary='JSON, JSONL, CSV or TSV of {"target_audio_path" or "audio_path", "target_transcript" or "text", '
    '"ref_audio_path", "ref_transcript", "speaker", …}',
    detects=detects,
    read=read,
    write=write,
    lacks=lacks,
    suffixes=(".json", ".jsonl"),
)


class _ManifestCheck(RowCheck):
    def conversation(self, row: Any, number: int) -> Conversation | None:
        if not isinstance(row, dict):
            self.problem(f"is {kind(row)} → a row is an object with {AUDIO_KEYS[0]} and {TEXT_KEYS[0]}")
            return None
        recording = self.recording(row, AUDIO_KEYS, "")
        if recording is None and not self.problems:
            self.problem(f"no {AUDIO_KEYS[0]} (nor {' nor '.join(AUDIO_KEYS[1:])}) → name the recording")
        text = self.text(row, self.one_of(row, TEXT_KEYS))
        reference = self.recording(row, REFERENCE_KEYS, "ref_")
        transcript = self.text(row, "ref_transcript", needed=False)
        if transcript is not None and all(row.get(key) in (None, "") for key in REFERENCE_KEYS):
            self.problem("ref_transcript without ref_audio_path → name the reference's recording, or leave both out")
        speaker = self.string(row.get("speaker"), "speaker")
        misc = {key: value for key, value in row.items() if key not in KEYS}
        self.string(misc.get("task_type"), "task_type")
        if self.problems:
            return None
        references = [] if reference is None else [(transcript, reference)]
        return speech(text, recording, references, speaker, misc, number)

    def recording(self, row: dict, keys: tuple[str, ...], prefix: str) -> Recording | None:
        """The recording that one of `keys` gives, None if none does or it is a problem."""
        key = self.one_of(row, keys)
        offset, duration = (self.seconds(row.get(prefix + name), prefix + name) for name in ("offset", "duration"))
        if not key.endswith("_tokens"):
            return self.file(row.get(key), key, offset=offset, duration=duration)
        if offset is not None:
            self.problem(f"gives {prefix}offset into {key} → give the codes of the segment alone")
        return self.codes(row[key], key, duration)

    def text(self, row: dict, key: str, needed: bool = True) -> str | None:
        text = self.string(row.get(key), key)
        if text and text.strip():
            return text
        if needed and isinstance(row.get(key), str | None):
            self.problem(f"no {key} → give the text that the recording speaks")
        return None


def _row(conversation: Conversation, folder: Path) -> dict:
    spoken = Spoken.of(conversation)
    row = _recording(spoken.recording, "target_", "", folder) | {"target_transcript": spoken.text}
    for transcript, reference in spoken.references:
        row |= _recording(reference, "ref_", "ref_", folder)
        row |= {} if transcript is None else {"ref_transcript": transcript}
    row |= {} if spoken.speaker is None else {"speaker": spoken.speaker}
    return row | spoken.misc


def _recording(recording: Recording, name: str, prefix: str, folder: Path) -> dict:
    if recording.path is not None:
        fields = {f"{name}audio_path": path_from(folder, recording)}
    else:
        fields = {f"{name}audio_tokens": recording.code_array.tolist()}
    segment = {prefix + key: getattr(recording, key) for key in ("offset", "duration")}
    return fields | {key: value for key, value in segment.items() if value is not None}
