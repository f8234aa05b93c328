"""A folder as LJSpeech has it: `metadata.csv` beside `wavs/`, a line a recording, without a header::

    LJ001-0001|It cost $5 in 1890.|It cost five dollars in eighteen ninety.

The id names `wavs/LJ001-0001.wav`, with or without its suffix, and is kept as misc.sample_id. The text to speak is
the third column, if it is there and not blank, else the second; with both, misc.written_text keeps the second.
Quotation marks have no meaning, and a text can have no `|`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.data.conversation import Conversation, Row, speech
from engine.data.formats import text_files
from engine.data.formats.format import Format
from engine.data.formats.recording_files import Copies, stem_of, usable
from engine.data.formats.row_check import RowCheck
from engine.data.formats.spoken import Spoken, lost

FILE, FOLDER, SUFFIX = "metadata.csv", "wavs", ".wav"


def read(path: Path) -> Iterator[Row]:
    """The lines of a folder's metadata.csv, or of that file itself; blank ones do not count."""
    file = path / FILE if path.is_dir() else path
    lines = (line.rstrip("\r\n") for line in text_files.lines(file))
    for number, line in enumerate(line for line in lines if line.strip()):
        check = RowCheck(file.parent)
        yield check.row(number, _conversation(check, number, line.split("|")))


def _conversation(check: RowCheck, number: int, columns: list[str]) -> Conversation | None:
    if len(columns) not in (2, 3):
        check.problem(f"has {len(columns)} columns → must be id|text or id|text|normalised text")
        return None
    name, *texts = (column.strip() for column in columns)
    if not name:
        check.problem("has no id → name the recording in wavs")
    text = texts[-1] or texts[0]
    if not text:
        check.problem(f"{name}: no text → give what the recording speaks")
    recording = check.file(f"{FOLDER}/{name}" if name.endswith(SUFFIX) else f"{FOLDER}/{name}{SUFFIX}", "id")
    written = {"written_text": texts[0]} if len(texts) == 2 and all(texts) else {}
    misc = {"sample_id": name.removesuffix(SUFFIX), **written}
    return None if check.problems else speech(text, recording, (), None, misc, number)


def write(conversations: Iterable[Conversation], path: Path) -> None:
    """A folder with the recordings copied into `wavs/`."""
    path.mkdir()
    copies = Copies(path)
    with (path / FILE).open("w", encoding="utf-8", newline="\n") as file:
        for conversation in conversations:
            spoken = Spoken.of(conversation)
            stem = Path(copies.add_as(spoken, FOLDER)).stem
            texts = [spoken.misc["written_text"]] if "written_text" in spoken.misc else []
            # an id that ends like a file name would be taken for one
            name = stem + SUFFIX if stem.endswith(SUFFIX) else stem
            file.write("|".join([name, *texts, spoken.text]) + "\n")


def lacks(conversation: Conversation) -> str | None:
    losses = lost(conversation, references=0, speaker=False, fields=("sample_id", "written_text"))
    if losses:
        return losses
    spoken = Spoken.of(conversation)
    texts = [spoken.text, *([spoken.misc["written_text"]] if "written_text" in spoken.misc else [])]
    if not all(isinstance(text, str) and _fits(text) for text in texts):
        return "a text with | or a line break in it, with blank space around it, or with nothing else"
    stem = stem_of(spoken)
    if not usable(stem) or "|" in stem:
        return "a name (misc.sample_id, or that of the recording) that cannot be an id"
    if Path(spoken.recording.path).suffix != SUFFIX:
        return "a recording that is not .wav"
    return None


def _fits(text: str) -> bool:
    return bool(text) and text == text.strip() and not set(text) & set("|\r\n")


def detects(path: Path) -> bool:
    if path.is_dir():
        return (path / FILE).is_file() and (path / FOLDER).is_dir()
    return path.name == FILE and path.is_file() and (path.parent / FOLDER).is_dir()


FORMAT = Format(
    name="ljspeech",
    summary="folder with metadata.csv, id|text|normalised text a line, and wavs/",
    detects=detects,
    read=read,
    write=write,
    lacks=lacks,
)
