"""The demo: a small Higgs, its codec and some speech-like recordings, for every command to run on.

`make_demo` needs no network and takes about ten seconds on two cores. Each part is built under a hidden
temporary name and then renamed, so a part that exists is complete; what exists is kept as it is, whatever
seed it was made with.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from engine.data.demo_speech import SAMPLING_RATE, SENTENCES, VOICES, synthesize
from engine.errors import DataError

SYSTEM_PROMPT = "Generate speech in the provided voice."
REQUEST = "Please generate speech for given text in reference audio's voice: "


@dataclass(frozen=True)
class Demo:
    """What `make_demo` made, as absolute paths: a ChatML file, a native Higgs and its codec."""

    data_file: Path
    model_path: Path
    audio_tokenizer_path: Path


@dataclass(frozen=True)
class _Clip:
    """One recording: `audio` as the data file names it, `seconds` long."""

    speaker: str
    name: str
    audio: str
    text: str
    seconds: float


def make_demo(folder: str | Path, recordings: str | Path | None = None, seed: int = 0) -> Demo:
    """Makes what is not there yet of the demo under `folder`.

    Args:
        recordings: a folder of `name.wav` with `name.txt`, to be used in place of the synthetic voices.
        seed: of the random weights of model and codec. The synthetic voices are the same under every seed.

    Raises:
        DataError: `recordings` cannot be used, see `write_demo_data`.
    """
    folder = Path(folder).resolve()
    data_file = write_demo_data(folder / "data", recordings)
    codec_path, model_path = folder / "audio_tokenizer", folder / "model"
    if not (codec_path.is_dir() and model_path.is_dir()):
        # Here, for it takes seconds: whoever has the demo already need not wait for transformers.
        from engine.data.demo_model import make_codec, make_model, make_tokenizer

        with _published(codec_path) as partial:
            if partial:
                make_codec(partial, seed)
        with _published(model_path) as partial:
            if partial:
                tokenizer = make_tokenizer([*SENTENCES, SYSTEM_PROMPT, REQUEST], partial)
                make_model(partial, tokenizer, codec_path, seed)
    return Demo(data_file, model_path, codec_path)


def write_demo_data(folder: str | Path, recordings: str | Path | None = None, *, clips_per_voice: int = 5) -> Path:
    """Writes voice-cloning samples in ChatML and returns its JSON file: `demo.json` or `recordings.json`.

    Without `recordings`, each of the four synthetic voices speaks `clips_per_voice` sentences of 1 to 3 s
    into `folder/audio`, named in the file by relative paths; a sample's reference is the next clip of the
    same voice.

    With `recordings`, the samples are the recordings of that folder, left where they are and named by
    absolute paths, and the speaker is the file's stem. There is then one recording a speaker and no second of
    the same voice, so each is paired with the next in sorted order as its reference: good for trying the
    engine out, but what it teaches is not the cloning of a voice. `misc.ref_speaker` names the reference's
    speaker in every sample.

    The same arguments give the same bytes.

    Raises:
        DataError: a recording without transcript or the reverse, one that cannot be read, or fewer than two
            recordings.
        ValueError: `clips_per_voice` is less than 2: a reference is never the target itself.
    """
    folder = Path(folder).resolve()
    if recordings is None:
        data_file, voices = folder / "demo.json", _speak(folder, clips_per_voice)
    else:
        data_file, voices = folder / "recordings.json", [_collect(Path(recordings).resolve())]
    samples = []
    for clips in voices:
        references = clips[1:] + clips[:1]
        samples += [_sample(target, reference) for target, reference in zip(clips, references, strict=True)]

    text = json.dumps(samples, ensure_ascii=False, indent=1) + "\n"
    if not data_file.is_file() or data_file.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{data_file.name}.{os.getpid()}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, data_file)
    return data_file


def _speak(folder: Path, clips_per_voice: int) -> list[list[_Clip]]:
    """Synthesizes what is missing of `folder/audio`; the clips of each voice."""
    if clips_per_voice < 2:
        raise ValueError(f"clips_per_voice is {clips_per_voice}; each clip needs another as its reference: 2 or more")
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    voices = []
    for number, voice in enumerate(sorted(VOICES)):
        clips = []
        for index in range(clips_per_voice):
            sentence = SENTENCES[(number * clips_per_voice + index) % len(SENTENCES)]
            name = f"{voice}_{index:02d}"
            path = folder / "audio" / f"{name}.wav"
            if not path.is_file():
                partial = path.with_name(f".{name}.{os.getpid()}.wav")
                soundfile.write(partial, synthesize(voice, sentence), SAMPLING_RATE, subtype="PCM_16")
                os.replace(partial, path)
            seconds = soundfile.info(path).duration
            clips.append(_Clip(voice, name, f"audio/{name}.wav", sentence, seconds))
        voices.append(clips)
    return voices


def _collect(folder: Path) -> list[_Clip]:
    """The recordings of a folder with their transcripts, sorted by name."""
    audio = {path.stem: path for path in folder.glob("*.wav")}
    texts = {path.stem: path for path in folder.glob("*.txt")}
    problems = [f"{stem}.wav has no transcript {stem}.txt" for stem in sorted(audio.keys() - texts.keys())]
    problems += [f"{stem}.txt has no recording {stem}.wav" for stem in sorted(texts.keys() - audio.keys())]
    clips = []
    for stem in sorted(audio.keys() & texts.keys()):
        try:
            text = texts[stem].read_text(encoding="utf-8-sig").strip()
            seconds = soundfile.info(audio[stem]).duration
        except UnicodeDecodeError:
            problems.append(f"{stem}.txt is not UTF-8 text")
        except soundfile.SoundFileError as error:
            problems.append(f"{stem}.wav is not audio, or damaged: {error}")
        else:
            if text:
                clips.append(_Clip(stem, stem, str(audio[stem]), text, seconds))
            else:
                problems.append(f"{stem}.txt is empty")
    if not problems and len(clips) < 2:
        problems.append(f"{len(clips)} found; at least two pairs of name.wav and name.txt are needed")
    if problems:
        raise DataError(f"The recordings in {folder} cannot be used", problems)
    return clips


def _sample(target: _Clip, reference: _Clip) -> dict:
    """One voice-cloning sample: the reference's text and audio, the request, the target's text and audio."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": reference.text},
                    _audio(reference),
                    {"type": "text", "text": REQUEST + target.text},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": target.text}, _audio(target)]},
        ],
        "start_index": 0,
        "speaker": target.speaker,
        "misc": {
            "sample_id": target.name,
            "ref_speaker": reference.speaker,
            "ref_transcript": reference.text,
            "target_transcript": target.text,
            "duration": round(target.seconds, 3),
        },
    }


def _audio(clip: _Clip) -> dict:
    return {"type": "audio", "audio_url": clip.audio, "duration": round(clip.seconds, 3)}


@contextlib.contextmanager
def _published(path: Path) -> Iterator[Path | None]:
    """A temporary directory, renamed to `path` once the block has filled it; None if `path` exists."""
    if path.is_dir():
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        partial = Path(temporary) / path.name
        partial.mkdir()
        yield partial
        try:
            os.replace(partial, path)
        except OSError:
            if not path.is_dir():  # or else another process was quicker, and its work is as good
                raise
