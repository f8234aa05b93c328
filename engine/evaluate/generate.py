"""Speaking: a prompt to codes, through transformers' own `generate` on HiggsAudioV2ForConditionalGeneration.

One prompt at a time: each has random numbers of its own then, whatever was said before it and on however many
processes, so that two rounds of samples differ by their weights alone. Used on any model with transformers' forward,
the one in training included; `undisturbed` leaves that one as if nothing had been.
"""

import contextlib
import copy
import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from engine.data.labels import codes_of_stream
from engine.evaluate.prompts import SpeechPrompt, stream_of
from engine.export.model_folder import generation_defaults


@dataclass(frozen=True)
class Spoken:
    """What a model said.

    Attributes:
        codes: int16 [C, T].
        stopped: by itself; else it was cut.
        seconds: that generating took, of the clock.
        late: it was cut because the time was up.
    """

    codes: np.ndarray
    stopped: bool
    seconds: float
    late: bool = False

    @property
    def frames(self) -> int:
        return self.codes.shape[1]


def generation_config(folder: Path, config: HiggsAudioV2Config, temperature: float | None = None) -> GenerationConfig:
    """How a model draws its codes: by its generation_config.json, or where that is the original's or missing as the
    released native model does (top_k 50, top_p 0.95, repetition-aware sampling over 7 frames).

    Args:
        folder: of the model.
        temperature: None: the model's own; 0: the most likely code, without any draw.
    """
    found = generation_defaults(config)
    if (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(folder)
        found = own if hasattr(own, "ras_win_len") else found
    if temperature:
        found.do_sample, found.temperature = True, temperature
    elif temperature == 0:
        # repetition-aware sampling draws again where a code comes too often: it would be no longer the most likely
        found.do_sample, found.ras_win_len, found.ras_win_max_num_repeat = False, None, None
        found.temperature = found.top_k = found.top_p = None
    return found


def speak(
    model: HiggsAudioV2ForConditionalGeneration,
    prompt: SpeechPrompt,
    how: GenerationConfig,
    max_frames: int,
    seed: int,
    max_time: float | None = None,
) -> Spoken:
    """Lets a model say a prompt; the random state is another one afterwards (see `undisturbed`).

    Args:
        model: in evaluation mode, with transformers' forward.
        max_frames: of speech, after which it is cut.
        seed: of the draws.
        max_time: seconds of the clock after which it is cut.
    """
    stream = stream_of(model.config)
    inputs = _inputs(prompt, next(model.parameters()).device)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with _generating(model, how):
        # a stream of T frames has T + C + 1 columns: BOS first, and an EOS of each codebook last
        limit = max_frames + stream.codebooks + 1
        out = model.generate(**inputs, max_new_tokens=limit, max_time=max_time)
    columns = out[0, len(prompt.audio_ids) :].cpu().numpy()  # in front of them the prompt's own are given back
    seconds = time.perf_counter() - started
    stopped = bool((columns[-1] == stream.eos).all())
    codes = codes_of_stream(columns, stream) if len(columns) > stream.codebooks else np.empty((stream.codebooks, 0))
    codes = codes[:, :max_frames].astype(np.int16)
    return Spoken(codes, stopped, seconds, late=not stopped and len(columns) < limit)


def _inputs(prompt: SpeechPrompt, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(prompt.input_ids).long()[None].to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(prompt.audio_ids):  # of no frames transformers cannot look up any
        audio = torch.from_numpy(prompt.audio_ids).long()[None].to(device)
        mask = torch.ones(audio.shape[:2], dtype=torch.bool, device=device)
        inputs |= {"audio_input_ids": audio, "audio_input_ids_mask": mask}
    return inputs


@contextlib.contextmanager
def _generating(model: HiggsAudioV2ForConditionalGeneration, how: GenerationConfig) -> Iterator[None]:
    """In here the model draws as `how` says, and is what transformers knows: `generate` reads forward's signature.

    Passed to `generate` instead, what is None in `how` would be filled up from the model's own.
    """
    kind, own = type(model), model.generation_config
    model.__class__, model.generation_config = HiggsAudioV2ForConditionalGeneration, copy.deepcopy(how)
    try:
        yield
    finally:
        model.__class__, model.generation_config = kind, own


@contextlib.contextmanager
def undisturbed(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """In here a model in training may speak; after it training goes on bit by bit as if it had not.

    Random states (torch's of host and device, Python's, numpy's) and the mode of each module are as before, and
    what was used of the device's memory is free.

    Args:
        model: None if it does not speak itself.
    """
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    drawn = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        gc.collect()  # in the steps the collector is off (engine/runtime/garbage.py)
        if device.type == "cuda":
            torch.cuda.empty_cache()
