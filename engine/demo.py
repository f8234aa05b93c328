"""The demo, what a newcomer sees first: data, training, resuming, final weights, and the result in transformers.

Every step is what a user would do: the real launcher, the real commands. Only model, codec and voices are made up.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from engine.config import Settings
from engine.config_checks import REPOSITORY
from engine.data.demo import Demo, make_demo
from engine.errors import EngineError

FIRST_STEPS = 60
"""Steps before the run is interrupted; the second run goes on from its checkpoint to the recipe's end."""


def run(folder: Path, recordings: Path | None, extra: list[str]) -> None:
    """Makes everything below `folder`, trains twice (the second run resumes), and checks the result.

    Args:
        extra: further settings for both runs, as on the command line.
    """
    started = time.perf_counter()
    folder = folder.resolve()
    _title("1. a small random Higgs, its codec and recordings")
    demo = make_demo(folder, recordings)
    print(f"data {demo.data_file}\nmodel {demo.model_path}\ncodec {demo.audio_tokenizer_path}", flush=True)
    out = _fresh(folder)
    _title(f"2. training, {FIRST_STEPS} steps")
    _train(demo, folder, out, [*extra, "--max_steps", str(FIRST_STEPS)])
    _title("3. training goes on from the last checkpoint")
    _train(demo, folder, out, [*extra, "--resume", "auto"])
    _title("4. the result in plain transformers")
    settings = Settings.from_yaml(out / "config.yaml")
    model = _merged(demo, out) if settings.use_lora else out / "model"
    wav = _speak(model, settings, out)
    _summary(out, model, wav, time.perf_counter() - started)


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _fresh(folder: Path) -> Path:
    number = 1
    while (folder / f"run-{number}").exists():
        number += 1
    return folder / f"run-{number}"


def _train(demo: Demo, folder: Path, out: Path, extra: list[str]) -> None:
    command = [
        "bash",
        str(REPOSITORY / "launch" / "train.sh"),
        "--config",
        str(REPOSITORY / "launch/recipes/demo.yaml"),
    ]
    command += ["--model_path", str(demo.model_path), "--audio_tokenizer_path", str(demo.audio_tokenizer_path)]
    command += ["--train_data_file", str(demo.data_file), "--output_dir", str(out)]
    command += ["--codes_cache_dir", str(folder / "codes"), *extra]
    print("$", " ".join(command), flush=True)
    # the same interpreter, in whatever environment the demo runs
    code = subprocess.run(command, env=os.environ | {"HIGGS_ENGINE_PYTHON": sys.executable}).returncode
    if code:
        raise EngineError(f"The training command ended with exit code {code}; its messages are above.")


def _merged(demo: Demo, out: Path) -> Path:
    from engine.export.merge import merge

    merge(demo.model_path, out / "lora_adapters", out / "merged")
    return out / "merged"


def _speak(model_folder: Path, settings: Settings, out: Path) -> Path:
    """Loads the weights with unmodified transformers and lets them say a sentence of the training data."""
    import soundfile
    from transformers import HiggsAudioV2ForConditionalGeneration

    from engine.data.audio import content_key
    from engine.data.code_cache import CodeCache
    from engine.data.codec import Codec, codec_identity
    from engine.data.formats import read_rows
    from engine.data.layouts import Layout
    from engine.data.prompts import PromptTokenizer
    from engine.evaluate.generate import generation_config, speak
    from engine.evaluate.prompts import of_row, stream_of
    from engine.model.weights import load_tokenizer

    model, loading = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        model_folder, use_text_head=True, output_loading_info=True
    )
    print(f"missing keys: {len(loading['missing_keys'])}, unexpected keys: {len(loading['unexpected_keys'])}")
    cache = CodeCache(settings.codes_cache_dir, codec_identity(settings.audio_tokenizer_path, settings.loudness))
    aside, rows = _set_aside(out), read_rows(settings.train_data_file[0], settings.format)
    row = next(row.conversation for row in rows if row.number not in aside)
    tokenize = PromptTokenizer(load_tokenizer(model_folder))

    def codes(recording):
        return cache.get(content_key(recording))

    prompt = of_row(row, f"row {row.row}", Layout.of(settings), tokenize, stream_of(model.config), codes)
    target, how = codes(prompt.target), generation_config(model_folder, model.config, temperature=0)
    spoken = speak(model.eval(), prompt, how, max_frames=2 * target.shape[1], seed=settings.seed)
    frames = min(spoken.frames, target.shape[1])
    equal = (spoken.codes[:, :frames] == target[:, :frames]).mean()
    print(f"said {prompt.text!r} and {'stopped by itself' if spoken.stopped else 'did not stop by itself'}")
    print(f"{spoken.frames} frames, the recording has {target.shape[1]}; {100 * equal:.0f} % of its codes equal")
    wav = out / "spoken.wav"
    codec = Codec.load(settings.audio_tokenizer_path)
    soundfile.write(wav, codec.decode(spoken.codes), codec.sampling_rate)
    return wav


def _set_aside(out: Path) -> set[int]:
    """Rows that the run has not been trained on, so that it cannot know them by heart."""
    file = out / "validation_split.json"
    if not file.is_file():
        return set()
    return {row for rows in json.loads(file.read_text())["evaluation_rows"].values() for row in rows}


def _summary(out: Path, model: Path, wav: Path, seconds: float) -> None:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]  # the others are evaluations
    first, last = steps[0], steps[-1]
    _title(f"the demo took {seconds:.0f} s")
    print(f"loss     {first['loss']:.3f} at step {first['step']} -> {last['loss']:.3f} at step {last['step']}")
    for name, path in [
        ("model", model),
        ("speech", wav),
        ("metrics", out / "metrics.jsonl"),
        ("settings", out / "config.yaml"),
        ("report", out / "report.html"),
    ]:
        print(f"{name:<8} {path}")
    print("(codec and model are random, so what it has learnt to say is noise)")
    train = "bash launch/train.sh --model_path MODEL --audio_tokenizer_path CODEC --train_data_file DATA.json"
    print(f"next     {train} --output_dir OUT")
    sys.stdout.flush()
