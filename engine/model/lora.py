"""LoRA and its variants (rsLoRA, DoRA) on the model, by PEFT: which layers get adapters, which are trained whole."""

import warnings
from collections import Counter

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from engine.config import Settings
from engine.errors import ConfigError
from engine.model.adapter_files import open_adapter
from engine.model.adapter_folder import differences
from engine.model.keys import base_name

HEADS = ("text_lm_head", "audio_lm_head")


def add_lora(model: nn.Module, settings: Settings) -> PeftModel:
    """The model with the adapters of the settings, without values.

    Raises:
        ConfigError: a target or module that matches nothing or cannot be one; an adapter other than described.
        ModelError: `lora_adapter_path` is no adapter.
    """
    problems = [*_target_problems(model, settings), *_whole_problems(model, settings)]
    if settings.lora_adapter_path:
        problems += differences(open_adapter(settings.lora_adapter_path).folder, settings)
    if problems:
        raise ConfigError("LoRA:", problems)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_target_modules),
        modules_to_save=_whole(model, settings) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    model.name_or_path = settings.model_path  # PEFT writes it into adapter_config.json
    return add_adapters(model, config)


def add_adapters(model: nn.Module, config: PeftConfig) -> PeftModel:
    """The model in PEFT's wrapper, its new adapters on the meta device like the model, to be filled later."""
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by an attribute of an older name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _target_problems(model: nn.Module, settings: Settings) -> list[str]:
    problems = []
    for target in settings.lora_target_modules:
        matched = [name for name in _linears(model) if _is_target(name, target)]
        if not matched:
            problems.append(f"lora_target_modules: {target!r} matches no linear layer → e.g. q_proj, audio_mlp.up_proj")
        elif heads := [name for name in matched if name in HEADS]:
            problems.append(f"lora_target_modules: {heads[0]} is trained whole → put it into lora_modules_to_save")
    return problems


def _whole_problems(model: nn.Module, settings: Settings) -> list[str]:
    return [
        f"lora_modules_to_save: {name!r} matches no module → e.g. audio_lm_head, embed_audio_tokens"
        for name in settings.lora_modules_to_save
        if not _innermost(model, name)
    ]


def _whole(model: nn.Module, settings: Settings) -> list[str]:
    """Names by which PEFT wraps exactly the modules meant.

    It takes every module whose name ends so, `audio_mlp` for `mlp`; and of an embedding within an embedding
    (`embed_audio_tokens`) it would wrap both, train the inner copy and compute with the other.
    """
    everything = [name for name, _ in model.named_modules()]
    names = []
    for name in settings.lora_modules_to_save:
        matched = _innermost(model, name)
        short = _short(matched)
        exact = [n for n in everything if n.endswith(short)] == matched
        names += [short] if exact else matched
    return list(dict.fromkeys(names))


def _innermost(model: nn.Module, target: str) -> list[str]:
    """The modules that a name means, without those that hold another of them."""
    matched = [name for name, _ in model.named_modules() if _is_target(name, target)]
    return [name for name in matched if not any(other.startswith(f"{name}.") for other in matched)]


def _short(names: list[str]) -> str:
    """The longest run of whole words in which all names end, without layer numbers."""
    words = []
    for level in zip(*(reversed(name.split(".")) for name in names), strict=False):
        if len(set(level)) > 1 or level[0].isdigit() or level[0] == "model":
            break
        words.insert(0, level[0])
    return ".".join(words)


def _is_target(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def variant(config: LoraConfig) -> str:
    """LoRA, rsLoRA, DoRA or rsDoRA."""
    return f"{'rs' if config.use_rslora else ''}{'DoRA' if config.use_dora else 'LoRA'}"


def describe_adapters(model: nn.Module) -> list[str]:
    """Lines that say what PEFT wrapped: adapters by kind of layer, and what is trained and saved whole."""
    if not isinstance(model, PeftModel):
        return []
    config = model.peft_config["default"]
    wrapped = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    counts = Counter(_kind(name) for name, _ in wrapped)
    scale = wrapped[0][1].scaling["default"]
    lines = [
        f"  adapters: {variant(config)}, rank {config.r}, alpha {config.lora_alpha:g} (scale {scale:g}), on "
        f"{len(wrapped)} layers: {', '.join(f'{kind} {count}' for kind, count in counts.items())}"
    ]
    whole = [base_name(name) for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if whole:
        lines.append(f"  trained and saved whole: {', '.join(whole)}")
    return lines


def _kind(module: str) -> str:
    """Name of a layer without those of what it stands in, but with its FFN's."""
    parent, last = module.split(".")[-2:]
    return f"{parent}.{last}" if parent in ("mlp", "audio_mlp") else last
