"""What is trained: every weight, a chosen part, or LoRA adapters. Decided by name, printed, never a silent nothing."""

import fnmatch

from torch import nn

from engine.config import Settings
from engine.errors import ConfigError
from engine.model.lora import add_adapters, add_lora, describe_adapters
from engine.model.whisper import WhisperConditioning

__all__ = ["add_adapters", "choose_trainable", "decayed", "describe", "optimizer_groups"]

FROZEN_BY_FREEZE_LLM = ("model.layers.", "model.norm.", "model.embed_tokens.")
"""As the original's freeze_llm(): the body and the text embeddings; audio embeddings and both heads are trained."""


def choose_trainable(model: nn.Module, settings: Settings, whisper: WhisperConditioning | None = None) -> nn.Module:
    """Freezes, or wraps in adapters, as the settings say. The model may be on the meta device.

    Args:
        whisper: becomes the submodule `whisper` of `model`. Its own two settings alone say what of it is trained,
            with adapters and without. It comes after them, for their targets are names of its layers too.

    Raises:
        ConfigError: a pattern or target that matches nothing, or that cannot be trained; an adapter to go on from
            that is another than the settings describe.
    """
    wrapped = add_lora(model, settings) if settings.use_lora else model
    if whisper is not None:
        model.whisper = whisper
    if not settings.use_lora:
        _freeze(model, settings)
    if whisper is not None:
        whisper.choose_trainable(not settings.freeze_audio_tower, not settings.freeze_audio_encoder_proj)
    if not any(p.requires_grad for p in wrapped.parameters()):
        raise ConfigError("What to train:", ["nothing is left to train → loosen train_modules or freeze_llm"])
    return wrapped


def _freeze(model: nn.Module, settings: Settings) -> None:
    names = [name for name, _ in model.named_parameters()]
    problems = [
        f"train_modules: {pattern!r} matches no parameter → names look like {names[0]!r} or {names[-1]!r}"
        for pattern in settings.train_modules
        if not fnmatch.filter(names, _glob(pattern))
    ]
    if problems:
        raise ConfigError("What to train:", problems)
    for name, parameter in model.named_parameters():
        chosen = not settings.train_modules or any(fnmatch.fnmatch(name, _glob(p)) for p in settings.train_modules)
        parameter.requires_grad = chosen and not (settings.freeze_llm and name.startswith(FROZEN_BY_FREEZE_LLM))


def _glob(pattern: str) -> str:
    """A pattern without wildcards means the module of that name and all below it."""
    return pattern if any(c in pattern for c in "*?[") else f"*{pattern}.*"


def describe(model: nn.Module, settings: Settings) -> list[str]:
    """Lines that say which modules are trained, in which way, and how many parameters they have."""
    groups: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        entry = groups.setdefault(_group(name), [0, 0])
        entry[0] += parameter.numel() if parameter.requires_grad else 0
        entry[1] += parameter.numel()
    trained, total = (sum(entry[i] for entry in groups.values()) for i in (0, 1))
    kind = "LoRA" if settings.use_lora else "full"
    lines = [f"{kind}: {trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"]
    lines += describe_adapters(model)
    if settings.lora_adapter_path:
        lines.append(f"  going on from {settings.lora_adapter_path}")
    width = max(len(group) for group in groups)
    lines += [f"  {group:<{width}} {count:>15,}" for group, (count, _) in groups.items() if count]
    has_whisper = any(isinstance(module, WhisperConditioning) for module in model.modules())
    if settings.freeze_audio_encoder_proj and not has_whisper:
        lines.append("  freeze_audio_encoder_proj: this model has no such module, nothing to freeze")
    return lines


def _group(parameter: str) -> str:
    """Name of a parameter without its layer number and our wrappers' prefixes, so that layers add up."""
    parts = parameter.removeprefix("base_model.model.").split(".")
    return ".".join("*" if part.isdigit() else part for part in parts if part not in ("weight", "default"))


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters with weight decay: matrices, not norms and biases. Asked before any sharding."""
    return {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}


def optimizer_groups(model: nn.Module, decayed_names: set[str], weight_decay: float) -> list[dict]:
    """The trainable parameters as optimizer groups, in the model's order."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decayed_names], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decayed_names], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
