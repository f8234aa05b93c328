"""`higgs-engine generate`: a text to a wav, or the rows of a data file to a folder of them, with their scores."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_log

from engine.data.audio import AudioError
from engine.data.codec import Codec
from engine.data.layouts import Layout, LayoutError
from engine.data.prompts import PromptTokenizer
from engine.errors import ConfigError, DataError, EngineError
from engine.evaluate.generate import generation_config
from engine.evaluate.model_files import ModelFiles, find
from engine.evaluate.prompt_sources import Coder, of_files, of_text
from engine.evaluate.prompts import SpeechPrompt, of_row, stream_of
from engine.evaluate.samples import FILE, Heard, Studio, in_short, write_heard
from engine.evaluate.scores import Scorer
from engine.export.model_folder import require_free
from engine.model.weights import load_config, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of the command (engine/cli.py), by their names; None: not given."""

    model_path: Path
    lora_adapter_path: Path | None
    audio_tokenizer_path: Path | None
    text: str | None
    reference: Path | None
    reference_text: str | None
    input: Path | None
    format: str
    out: Path
    prompt_layout: str | None
    scene: str | None
    temperature: float | None
    max_seconds: float
    seed: int
    device: str | None
    asr_model_path: Path | None
    speaker_model_path: Path | None

    def problems(self) -> Iterator[str]:
        """What is missing, or does not go together."""
        for name in ("model_path", "lora_adapter_path", "audio_tokenizer_path"):
            if (folder := getattr(self, name)) is not None and not folder.is_dir():
                yield f"{name}: {folder} is not a folder → give one that is on this machine; nothing is downloaded"
        if (self.text is None) == (self.input is None):
            yield "text, input: exactly one of them says what to speak → give --text TEXT or --input FILE"
        if self.text is not None and not self.text.strip():
            yield "text: there is nothing to say → give some words"
        if self.text is not None and self.out.suffix.lower() != ".wav":
            yield f"out: {self.out} → the name of a .wav file; a folder goes with --input"
        if self.input is not None and (self.reference or self.reference_text):
            yield "reference: the rows of --input have references of their own → leave it out, or give --text"
        if self.reference_text is not None and self.reference is None:
            yield "reference_text: belongs to a recording → give --reference WAV too"
        if not 0 < self.max_seconds < math.inf:
            yield f"max_seconds: {self.max_seconds:g} is no length above 0 → e.g. 30"
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            yield f"temperature: {self.temperature:g} is not 0 or above → 0 takes the most likely code, 1 is usual"
        if self.device is not None and not _is_there(self.device):
            yield f"device: there is no {self.device} on this machine → cpu, cuda, cuda:1, ...; or leave it out"

    def layout(self, found: ModelFiles) -> Layout:
        """The turns of the run that made the model, if it is known; what is given counts before it."""
        layout = Layout() if found.settings is None else Layout.of(found.settings)
        given = {"name": self.prompt_layout, "scene": self.scene}
        return replace(layout, **{name: value for name, value in given.items() if value is not None})


def _is_there(device: str) -> bool:
    try:
        return torch.zeros(1, device=device).item() == 0
    except (RuntimeError, AssertionError, NotImplementedError):  # no such name, no driver, no such number, ...
        return False


def generate(request: Request) -> bool:
    """Speaks, writes, and prints what came of it; whether everything was spoken.

    Raises:
        ConfigError, DataError, ModelError: options, rows, model or codec cannot be used.
    """
    found = find(request.model_path, request.lora_adapter_path)
    problems = list(request.problems())
    codec_path = request.audio_tokenizer_path or (found.settings and found.settings.audio_tokenizer_path)
    if codec_path is None:
        problems.append("audio_tokenizer_path: missing → give the folder of the model's codec")
    if problems:
        raise ConfigError("nothing can be generated", problems)
    if request.input is not None:
        require_free(request.out)
    root = request.out.parent if request.input is None else request.out
    root.mkdir(parents=True, exist_ok=True)  # fails now, not once everything is loaded
    device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    transformers_log.disable_progress_bar()
    codec = Codec.load(codec_path, device)
    prompts = _prompts(request, found, codec)
    scorer = Scorer(request.asr_model_path, request.speaker_model_path, device)
    model = found.load(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    how = generation_config(found.side_files, model.config, request.temperature)
    studio = Studio(model, how, codec, scorer, root, request.max_seconds, request.seed)
    with torch.no_grad():
        return _one(request, studio, prompts[0]) if request.input is None else _all(request, studio, prompts)


def _prompts(request: Request, found: ModelFiles, codec: Codec) -> list[SpeechPrompt]:
    tokenize, stream = PromptTokenizer(load_tokenizer(found.side_files)), stream_of(load_config(found.side_files))
    codes = Coder(cache(lambda: codec), found.settings and found.settings.loudness)
    layout = request.layout(found)
    if request.input is not None:
        return of_files([request.input], request.format, layout, tokenize, stream, codes)
    references = [(request.reference_text, request.reference)] if request.reference else []
    try:
        return [of_row(of_text(request.text, references), "the text", layout, tokenize, stream, codes)]
    except (LayoutError, AudioError) as error:
        raise DataError("the text cannot be spoken", [str(error)]) from None


def _one(request: Request, studio: Studio, prompt: SpeechPrompt) -> bool:
    heard = Heard(reference=str(request.reference.absolute()) if request.reference else None)
    line = studio.record(0, 0, prompt, heard, request.out.name)
    if line["file"] is None:
        raise EngineError(f"{request.text!r} was not spoken: {line['error']}")
    if not line["stopped"]:
        print(f"note: cut after {request.max_seconds:g} s (--max_seconds), it did not stop by itself")
    if line["error"]:
        print(f"note: {line['error']}")
    if line["scores"].get("transcript"):
        print(f"heard: {line['scores']['transcript']}")
    print(f"{request.out}: {in_short([line])}")
    return True


def _all(request: Request, studio: Studio, prompts: list[SpeechPrompt]) -> bool:
    root, lines = request.out, []
    with (root / FILE).open("w", encoding="utf-8") as stream:
        for i, prompt in enumerate(tqdm(prompts, desc="speak", unit="row", disable=not sys.stderr.isatty())):
            lines.append(studio.record(0, i, prompt, _heard(i, prompt, studio), f"{i:02d}.wav"))
            stream.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
            stream.flush()
    print("\n".join(table(lines)))
    print(f"{root}: {in_short(lines)}; every number in {FILE}")
    return all(line["file"] for line in lines)


def _heard(number: int, prompt: SpeechPrompt, studio: Studio) -> Heard:
    """Reference and target as files; a recording that cannot be read is said, and the row is spoken without it."""
    try:
        return write_heard(number, prompt, studio.codec, studio.root, "prompts")
    except (AudioError, ValueError) as error:
        tqdm.write(f"note: {prompt.name}: no reference or target to compare with: {error}", file=sys.stdout)
        return Heard()


COLUMNS = (
    ("row", 4, lambda line: str(line["prompt"])),
    ("stopped", 7, lambda line: {True: "yes", False: "no", None: "-"}[line["stopped"]]),
    ("seconds", 7, lambda line: _number(line["seconds"], 1)),
    ("target", 6, lambda line: _number(line["target_seconds"], 1)),
    ("RTF", 5, lambda line: _number(line["real_time_factor"], 2)),
    ("WER", 5, lambda line: _number(line["scores"].get("wer"), 2)),
    ("similar", 7, lambda line: _number(line["scores"].get("speaker_similarity"), 2)),
    ("dB off", 6, lambda line: _number(line["scores"].get("spectral_distance_db"), 1)),
)
"""Of the table: heading, width, and what stands there."""


def table(lines: list[dict]) -> list[str]:
    """A line for each sample, its text last; in its place the error, if there was one."""
    rows = ["  ".join(f"{name:>{width}}" for name, width, _ in COLUMNS) + "  text"]
    for line in lines:
        said = f"error: {line['error']}" if line["error"] else line["text"]
        shown = said if len(said) <= 60 else f"{said[:59]}…"
        rows.append("  ".join(f"{show(line):>{width}}" for _, width, show in COLUMNS) + f"  {shown}")
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
