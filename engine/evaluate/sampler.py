"""What the model sounds like while it trains: every `sample_every` steps, and at the end, the same prompts, spoken with
the weights of now, in `samples/`.

Where each process has all weights, the model in training speaks, each process a share of the prompts; else a copy of
the gathered weights on the main process does (whole_model.py), while the others wait at the rendezvous store, where no
collective times out and no watchdog looks. Each prompt has random numbers of its own, and training goes on bit by bit
as it would have without the round. Whatever fails is said, and a line of `samples/samples.jsonl`; a round that does
not fit `sample_budget_s` leaves prompts out.
"""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from engine.callbacks import Callback
from engine.data.codec import Codec
from engine.data.prompts import PromptTokenizer
from engine.errors import ConfigError
from engine.evaluate.generate import generation_config, undisturbed
from engine.evaluate.prompt_sources import Coder, of_run
from engine.evaluate.prompts import SpeechPrompt, stream_of
from engine.evaluate.samples import FILE, Heard, Studio, blank, in_short, in_words, write_heard
from engine.evaluate.scores import Scorer
from engine.evaluate.whole_model import NoCopy, core_of, gathered
from engine.model.weights import load_tokenizer
from engine.observe.journal import Journal, forget_after
from engine.runtime import activity
from engine.runtime.distributed import on_main, wait_for_all

if TYPE_CHECKING:
    from engine.train import Run

FOLDER = "samples"


class Sampler(Callback):
    """Every process has one.

    Attributes:
        prompts: of every round.
        heard: how reference and target of each sound; no files where the codec could not be loaded.
    """

    def __init__(self) -> None:
        self.prompts: list[SpeechPrompt] = []
        self.heard: list[Heard] = []
        self._newest = 0  # step of the newest round

    def on_start(self, run: "Run", step: int) -> None:
        """Chooses the prompts.

        Raises:
            ConfigError, DataError, ModelError: what `sample_prompts` names cannot be spoken, or not be scored.
        """
        activity.current.outside("preparing samples")
        self.journal = Journal(run.output_dir / FOLDER / FILE, run.say)
        with undisturbed(None, run.world.device):
            self.prompts, self.heard = on_main(run.world, lambda: self._prepare(run, step))
        if not self.prompts:
            run.say("note: samples: nothing to say, for no sample has a clip that is trained → give sample_prompts")
        if run.engine.whisper is not None:
            run.say("note: samples: spoken as by transformers' own model, which hears no reference through Whisper")

    def _prepare(self, run: "Run", step: int) -> tuple[list[SpeechPrompt], list[Heard]]:
        settings, root = run.settings, run.output_dir
        if settings.audio_tokenizer_path is None:
            line = "sample_every: speech is made of codes by the codec → give audio_tokenizer_path"
            raise ConfigError("the settings cannot be used", [line])
        Scorer(settings.asr_model_path, settings.speaker_model_path, run.world.device)  # wrong folders are told now
        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        forget_after(root / FOLDER / FILE, step)
        codec = cache(lambda: Codec.load(settings.audio_tokenizer_path, run.world.device))
        tokenize, stream = PromptTokenizer(load_tokenizer(settings.model_path)), stream_of(run.engine.config)
        held_out = run.data.held_out and run.data.held_out.data
        prompts = of_run(settings, held_out, run.data.train, tokenize, stream, Coder(codec, settings.loudness))
        heard = [Heard()] * len(prompts)
        try:
            heard = [write_heard(i, p, codec(), root, f"{FOLDER}/prompts") for i, p in enumerate(prompts)]
        except Exception as error:
            run.say(f"note: samples: no references and targets to listen to: {in_words(error)}")
        return prompts, heard

    def on_step(self, run: "Run", step: int, result: object) -> None:
        if self.prompts and (step % run.settings.sample_every == 0 or step == run.total):
            self.round(run, step)

    def on_log(self, run: "Run", step: int, values: dict) -> None:
        self._if_it_ends(run, step)

    def on_evaluate(self, run: "Run", step: int, values: dict) -> None:
        self._if_it_ends(run, step)

    def _if_it_ends(self, run: "Run", step: int) -> None:
        """That a run ends early (early stopping, a user's hook) is known only now: its last weights speak too."""
        if self.prompts and run.why_stop and self._newest != step:
            self.round(run, step)

    def round(self, run: "Run", step: int) -> None:
        """Lets the weights of now say all prompts. A collective: every process calls it."""
        began, self._newest = time.monotonic(), step
        activity.current.outside("samples")
        backend, device = run.engine.backend, run.world.device
        with run.meter.paused(), undisturbed(backend.model, device):
            if backend.is_whole:
                lines = self._alone(run, step, began, core_of(backend.model), run.world.rank, run.world.size)
            else:
                lines = self._by_copy(run, step, began)
        wait_for_all("the samples")
        lines = sorted(_gathered(lines, run.world.size), key=lambda line: line["prompt"])
        self._tell(run, step, lines)
        run.callbacks.on_sample(run, step, lines)
        activity.current.enter("between steps", step)

    def _by_copy(self, run: "Run", step: int, began: float) -> list[dict]:
        """Lines of the main process; of the others none."""
        try:
            copy = gathered(run.engine, run.world)
        except NoCopy as error:
            return list(self._failed(step, in_words(error), 0 if run.world.is_main else len(self.prompts), 1))
        return [] if copy is None else self._alone(run, step, began, copy, 0, 1)

    def _alone(self, run: "Run", step: int, began: float, model: torch.nn.Module, first: int, of: int) -> list[dict]:
        """Lines of every `of`-th prompt from `first` on, spoken by this process."""
        settings, folder = run.settings, f"{FOLDER}/step-{step:06d}"
        deadline = began + settings.sample_budget_s
        lines: list[dict] = []
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("the round's time (sample_budget_s) was up before it could begin → raise it")
            codec = Codec.load(settings.audio_tokenizer_path, run.world.device)
            how = generation_config(Path(settings.model_path), model.config, settings.sample_temperature)
            scorer = Scorer(settings.asr_model_path, settings.speaker_model_path, run.world.device)
            studio = Studio(model, how, codec, scorer, run.output_dir, settings.sample_seconds, settings.seed)
            for i in range(first, len(self.prompts), of):
                lines.append(studio.record(step, i, self.prompts[i], self.heard[i], f"{folder}/{i:02d}.wav", deadline))
        except Exception as error:
            return lines + list(self._failed(step, in_words(error), first + of * len(lines), of))
        return lines

    def _failed(self, step: int, why: str, first: int, of: int) -> Iterator[dict]:
        for i in range(first, len(self.prompts), of):
            yield blank(step, i, self.prompts[i], self.heard[i], why)

    def _tell(self, run: "Run", step: int, lines: list[dict]) -> None:
        run.say(f"samples: {in_short(lines)}; {FOLDER}/step-{step:06d}")
        for why in dict.fromkeys(line["error"] for line in lines if line["error"]):
            which = ", ".join(str(line["prompt"]) for line in lines if line["error"] == why)
            run.say(f"note: sample(s) {which} of step {step}: {why}")
        if run.world.is_main:
            self.journal.add(lines)


def _gathered(lines: list[dict], processes: int) -> list[dict]:
    if processes == 1:
        return lines
    parts: list = [None] * processes
    dist.all_gather_object(parts, lines)
    return [line for part in parts for line in part]
