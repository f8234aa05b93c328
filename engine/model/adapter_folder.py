"""Where an adapter lies, and whether it is the one that settings describe. Needs no torch: asked before anything loads.

An adapter to go on from must be the one described, for a setting that it silently overrode would do nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from engine.untrusted import read_object

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SUBFOLDER = "lora_adapters"
"""Name of the adapter's folder in a run's output folder and in its checkpoints."""

SETTINGS = {
    "r": "lora_rank", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora",
}  # fmt: skip
"""What a configuration says of an adapter -> the setting for it."""
NOT_OF_ITS_SHAPE = {
    "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode",
    "init_lora_weights", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
"""What it says of where the adapter came from, of how it was trained, or without meaning anything alone."""


def weights_file(folder: str | os.PathLike) -> Path | None:
    """The file with an adapter's tensors, the safetensors one if there are both; None if there is none."""
    return next((Path(folder, name) for name in WEIGHTS if os.path.isfile(os.path.join(folder, name))), None)


def adapter_folder(path: str | os.PathLike) -> Path | None:
    """The adapter meant by a path: that folder itself, or the one inside a run's output folder or checkpoint."""
    for folder in (Path(path), Path(path) / SUBFOLDER):
        if (folder / CONFIG).is_file() and weights_file(folder):
            return folder
    return None


def differences(folder: Path, settings: object) -> Iterator[str]:
    """What an adapter is that the settings do not say, a line each with the flag to give.

    Args:
        settings: anything with the attributes that SETTINGS names.
    """
    try:
        found = read_object(folder / CONFIG)
    except (OSError, ValueError) as error:
        yield f"lora_adapter_path: {folder / CONFIG} cannot be read ({error}) → copy the adapter again"
        return
    for name, value in found.items():
        if name in NOT_OF_ITS_SHAPE:
            continue
        setting = SETTINGS.get(name)
        if setting is None or isinstance(value, str):
            if value not in (None, False, "none", [], {}):
                yield f"lora_adapter_path: its {name} is {value!r}, and there is no setting for that → merge it first"
            continue
        if not _is_readable(name, value):
            yield f"lora_adapter_path: its {name} is {value!r} → copy the adapter again"
            continue
        was, now = _comparable(name, value), _comparable(name, getattr(settings, setting))
        if was != now:
            yield f"{setting}: is {_shown(now)}, that of lora_adapter_path {_shown(was)} → --{setting} {_shown(was)}"


def _is_readable(name: str, value: object) -> bool:
    """Whether PEFT writes such values: names in a list, or numbers and truth."""
    if name in ("target_modules", "modules_to_save"):
        return value is None or isinstance(value, list) and all(isinstance(word, str) for word in value)
    return isinstance(value, int | float)


def _comparable(name: str, value: object) -> object:
    """Lists without their order. A module saved whole may be written with those that it stands in, or without."""
    words = value or () if name in ("target_modules", "modules_to_save") else None
    if words is None:
        return value
    return sorted({word.rpartition(".")[2] if name == "modules_to_save" else word for word in words})


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
