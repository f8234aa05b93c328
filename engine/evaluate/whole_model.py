"""A plain copy, on one device, of a model whose weights are sharded over processes (FSDP, ZeRO 3, tensor parallel).

Weights are gathered a tensor at a time and kept by the main process only, in the precision in which the run computes.
Gathering is a collective: whatever fails beside it, every process goes through it to its end.
"""

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.errors import EngineError
from engine.higgs_engine import HiggsEngine
from engine.model.initial import build_on_meta, rebuild_buffers
from engine.model.keys import WHISPER, base_name
from engine.model.lora import add_lora
from engine.runtime.distributed import World

SPARE = 2 << 30
"""Bytes of GPU memory that stay free beside a copy, for its caches and the codec."""
GIB = 1 << 30


class NoCopy(EngineError):
    """The copy cannot be made. What failed on one process fails there alone, when the collective is over."""


def core_of(model: nn.Module) -> HiggsAudioV2ForConditionalGeneration:
    """The Higgs model; adapters around its layers stay active."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def gathered(engine: HiggsEngine, world: World) -> HiggsAudioV2ForConditionalGeneration | None:
    """The copy on the main process, in evaluation mode; None on the others. Every process calls it.

    Raises:
        NoCopy: it does not fit into the main process's GPU, on all processes; or making it failed, there alone.
    """
    dtype = torch.bfloat16 if engine.settings.bf16 else torch.float32
    model = build_on_meta(engine.config)
    _require_room(model, world, dtype)
    copy = failure = None
    if world.is_main:
        copy = add_lora(model, engine.settings) if engine.settings.use_lora else model
    for name, weight in engine.backend.full_weights(dtype):
        if copy is None or base_name(name).startswith(WHISPER):  # generate() has no place for Whisper
            continue
        try:
            put(copy, name, weight.to(world.device, dtype, copy=True))
        except Exception as error:
            copy, failure = None, error
    if failure is not None:
        raise NoCopy(f"no copy of the weights: {type(failure).__name__}: {failure}") from failure
    return None if copy is None else ready(core_of(copy), world.device)


def put(model: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Gives a parameter of a model on the meta device its value."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))


def ready(core: HiggsAudioV2ForConditionalGeneration, device: torch.device) -> HiggsAudioV2ForConditionalGeneration:
    """A model that has all its weights, made fit to generate."""
    rebuild_buffers(core, device)
    return core.eval()


def _require_room(model: nn.Module, world: World, dtype: torch.dtype) -> None:
    """Raises NoCopy on all processes if any has no room for what it needs; asked before anything is gathered."""
    sizes = [parameter.numel() * dtype.itemsize for parameter in model.parameters()]
    needed = 3 * max(sizes) + (sum(sizes) + SPARE if world.is_main else 0)  # a tensor, its pieces, and as received
    problem = None
    torch.cuda.empty_cache()  # what training has kept for itself counts as free
    if world.device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(world.device)[0]):
        problem = f"rank {world.rank}: {needed / GIB:.1f} GiB of GPU memory are needed, {free / GIB:.1f} are free"
    problems = [problem]
    if world.size > 1:
        problems = [None] * world.size
        dist.all_gather_object(problems, problem)
    if found := [line for line in problems if line]:
        raise NoCopy(
            f"no copy of the weights to speak with: {'; '.join(found)} → more processes, or full checkpointing"
        )
