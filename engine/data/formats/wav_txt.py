"""A folder of recordings, each beside the text that it speaks: `name.wav` and `name.txt`::

    hello.wav  hello.txt            speaker not known
    ann/morning.mp3  ann/morning.txt        the folder's name is the speaker's

Speakers' folders are one level deep. Rows come in the order of names, those without speaker first, and misc.sample_id
is the name. A recording without text, or text without recording, is a row with that problem. Hidden files, and files
that are neither, are no part of the data; nor is the blank space around a text.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.data.audio import Recording
from engine.data.conversation import Conversation, Row, speech
from engine.data.formats.format import Format
from engine.data.formats.recording_files import Copies, stem_of, usable
from engine.data.formats.row_check import RowCheck
from engine.data.formats.spoken import Spoken, lost
from engine.errors import DataError

AUDIO_SUFFIXES = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")
INDEX_FILES = ("metadata.json", "metadata.csv")
"""A folder with one of them is of another format, whose texts may lie beside the recordings too."""


def read(path: Path) -> Iterator[Row]:
    """The pairs of a folder and its speakers' folders.

    Raises:
        DataError: there is no such folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: is no folder → give the folder that holds the recordings and their texts.")
    number = 0
    folders, files = _entries(path)
    for folder, speaker in [(path, None), *((path / name, name) for name in folders)]:
        if speaker is not None:
            deeper, files = _entries(folder)
            for name in deeper:
                yield Row(number, None, (f"{speaker}/{name} is a folder within a speaker's → move its files up",))
                number += 1
        for stem, suffixes in sorted(_by_stem(files).items()):
            yield _pair(number, folder, stem, suffixes, speaker)
            number += 1


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in it, sorted."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def _by_stem(files: list[str]) -> dict[str, list[str]]:
    """Stem -> its suffixes, of recordings and texts."""
    suffixes = defaultdict(list)
    for name in files:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (".txt", *AUDIO_SUFFIXES):
            suffixes[stem].append(suffix)
    return suffixes


def _pair(number: int, folder: Path, stem: str, suffixes: list[str], speaker: str | None) -> Row:
    check = RowCheck(folder)
    shown = stem if speaker is None else f"{speaker}/{stem}"
    texts = [suffix for suffix in suffixes if suffix.lower() == ".txt"]
    audios = [suffix for suffix in suffixes if suffix.lower() != ".txt"]
    if not texts:
        check.problem(f"{shown}{audios[0]} has no transcript {shown}.txt → write it, or move the recording away")
    if not audios:
        check.problem(f"{shown}{texts[0]} has no recording {shown}.wav → add it (or {', '.join(AUDIO_SUFFIXES[1:4])})")
    for several in (texts, audios):
        if len(several) > 1:
            check.problem(f"{' and '.join(shown + suffix for suffix in several)} have one name → keep one of them")
    if check.problems:
        return check.row(number, None)
    text = check.text_file(stem + texts[0], shown + texts[0])
    recording = Recording(path=str(folder / (stem + audios[0])))
    misc = {"sample_id": stem}
    return check.row(number, None if text is None else speech(text, recording, (), speaker, misc, number))


def write(conversations: Iterable[Conversation], path: Path) -> None:
    """A folder with the recordings copied and the texts beside them."""
    path.mkdir()
    copies = Copies(path)
    for conversation in conversations:
        spoken = Spoken.of(conversation)
        name = copies.add_as(spoken, spoken.speaker or "")
        (path / name).with_suffix(".txt").write_bytes(f"{spoken.text}\n".encode())


def lacks(conversation: Conversation) -> str | None:
    losses = lost(conversation, references=0, speaker=True, fields=("sample_id",))
    if losses:
        return losses
    spoken = Spoken.of(conversation)
    if not spoken.text.strip() or spoken.text != spoken.text.strip():
        return "blank space around the text, or nothing but that"
    if not usable(stem_of(spoken)) or not (spoken.speaker is None or usable(spoken.speaker)):
        return "a speaker or name (misc.sample_id, or that of the recording) that cannot be the name of a file"
    if Path(spoken.recording.path).suffix.lower() not in AUDIO_SUFFIXES:
        return f"a recording that is not {', '.join(AUDIO_SUFFIXES)}"
    return None


def detects(path: Path) -> bool:
    if not path.is_dir() or any((path / name).is_file() for name in INDEX_FILES):
        return False
    folders, files = _entries(path)
    return bool(_by_stem(files)) or any(_by_stem(_entries(path / name)[1]) for name in folders)


FORMAT = Format(
    name="wav_txt",
    summary="folder of name.wav (.mp3, .flac, .ogg, …) with name.txt beside it, or of one such folder a speaker",
    detects=detects,
    read=read,
    write=write,
    lacks=lacks,
)
