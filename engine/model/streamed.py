"""Logits of transformers' own model while its weights stay where they are: a part in memory at a time.

The model stands on the meta device. Before transformers' unmodified forward enters one of its parts (an embedding, a
decoder layer, the norm, a head) the part's weights are read, in fp32; after it they are gone again. So the 5.8 B model
answers within the memory of its largest part (1.6 GB), and what two sets of files compute can be compared anywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from engine.data.labels import StreamIds, delayed_stream
from engine.model.initial import rebuild_buffers

Read = Callable[[str], torch.Tensor]

PROBE_TEXT, PROBE_FRAMES = 12, 12
"""Text tokens before and after the clip of a probe batch, and frames of the clip before its delay pattern."""


@dataclass(frozen=True)
class ProbeBatch:
    """One sequence to compute logits of; L positions, A of them audio frames.

    Attributes:
        input_ids: int64 [L]; audio positions carry the audio token id.
        audio_ids: int64 [A, C]; delayed streams, in position order.
    """

    input_ids: torch.Tensor
    audio_ids: torch.Tensor


def probe_batch(config: HiggsAudioV2Config, text: str | None = None, tokenizer=None) -> ProbeBatch:
    """The same batch on every machine: a text, a clip with the BOS and EOS of its stream, the text again.

    Args:
        text: what to say, with the tokenizer for it; None: arbitrary tokens.
    """
    if text is not None:
        words = tokenizer.encode(text, add_special_tokens=False)
    else:
        placeholders = (config.audio_token_id, config.audio_delay_token_id)
        words = [token for token in _spread(PROBE_TEXT + 2, config.vocab_size) if token not in placeholders]
        words = words[:PROBE_TEXT]
    stream = StreamIds(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
    codes = min(stream.bos, stream.eos)
    clip = np.array(_spread(config.num_codebooks * PROBE_FRAMES, codes), np.int16)
    audio = delayed_stream(clip.reshape(config.num_codebooks, PROBE_FRAMES), stream)
    ids = [*words, config.audio_bos_token_id, *[config.audio_token_id] * len(audio), *words]
    return ProbeBatch(torch.tensor(ids), torch.from_numpy(audio).long())


def _spread(count: int, below: int) -> list[int]:
    """Arbitrary different numbers (as far as there are) all over the range, without any random state."""
    return [(7 + int(number * 0.6180339887 * below)) % below for number in range(1, count + 1)]


@torch.no_grad()
def streamed_logits(
    model: HiggsAudioV2ForConditionalGeneration | PeftModel, read: Read, batch: ProbeBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two heads say, fp32: text logits [T, V] at the text positions, audio logits [A, C, codebook].

    Args:
        model: on the meta device, transformers' own forward, with its text head; perhaps wrapped in adapters.
        read: gives a parameter by its name in `model`, in any floating dtype. Nothing is asked for but what computes:
            of a module that is trained whole beside adapters, its copy and not the original.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    rebuild_buffers(base, torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for prefix, part in _parts(model, base):
                stack.enter_context(_lent(part, prefix, read))
            return _logits(base, batch)
    finally:
        model.train(was_training)


def _logits(base: HiggsAudioV2ForConditionalGeneration, batch: ProbeBatch) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = base.model(
        input_ids=batch.input_ids[None],
        audio_input_ids=batch.audio_ids[None],
        audio_input_ids_mask=torch.ones(1, len(batch.audio_ids), dtype=torch.bool),
        use_cache=False,
    ).last_hidden_state
    is_audio = batch.input_ids == base.config.audio_token_id
    # the heads on every position, as transformers itself has it: on fewer rows a product may be rounded otherwise
    text = base.text_lm_head(hidden)[0, ~is_audio]
    audio = base.audio_lm_head(hidden)[0, is_audio]
    return text, audio.view(-1, base.config.num_codebooks, base.config.codebook_size)


def _parts(model: nn.Module, base: HiggsAudioV2ForConditionalGeneration) -> Iterator[tuple[str, nn.Module]]:
    """The parts that have weights at the same time, each with the beginning of its parameters' names."""
    body = base.model
    parts = [body.embed_tokens, body.embed_audio_tokens, *body.layers, body.norm, base.audio_lm_head, base.text_lm_head]
    names = {id(module): name for name, module in model.named_modules()}
    return ((names[id(part)], part) for part in parts)


@contextmanager
def _lent(part: nn.Module, prefix: str, read: Read) -> Iterator[None]:
    """Within the context a part has weights while its forward runs, and only then."""
    on_meta = {
        (module, last): parameter
        for name, module in part.named_modules()
        for last, parameter in module.named_parameters(recurse=False)
        if "original_module" not in name.split(".")
    }
    names = {id(module): f"{prefix}.{name}" if name else prefix for name, module in part.named_modules()}

    def fill(*_) -> None:
        for module, last in on_meta:
            value = read(f"{names[id(module)]}.{last}").float()
            setattr(module, last, nn.Parameter(value, requires_grad=False))

    def empty(*_) -> None:
        for (module, last), parameter in on_meta.items():
            setattr(module, last, parameter)

    hooks = [part.register_forward_pre_hook(fill), part.register_forward_hook(empty)]
    try:
        yield
    finally:
        empty()  # a forward that failed has not come to its end
        for hook in hooks:
            hook.remove()
