"""Models of others, read from a local folder to judge speech with: never downloaded, none of their code run.

A folder says in config.json which class it was saved from. Only that tells a recogniser from a bare encoder, or a
WavLM that spells from one that knows voices.
"""

from pathlib import Path
from typing import Any

import torch

from engine import untrusted
from engine.errors import ModelError

OFFLINE = {"local_files_only": True, "trust_remote_code": False}
EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
_ONLY_IN_TRAINING = ("masked_spec_embed", "objective.", "classifier.")
"""Parts of names: weights that neither a transcript nor an x-vector depends on."""


def problems(folder: Path, classes: dict[str, Any], remedy: str) -> list[str]:
    """What is wrong with a folder by its small files alone; one line each.

    Args:
        classes: name of a model class -> the Auto class that loads it.
    """
    try:
        named = untrusted.read_object(folder / "config.json").get("architectures")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return [f"{folder}: config.json cannot be read: {reason} → {remedy}"]
    lines = []
    if _known(named, classes) is None:
        lines.append(f"{folder}: config.json names {_shown(named)}, which is no such model → {remedy}")
    if not any((folder / name).is_file() for name in EXTRACTOR_FILES):
        lines.append(f"{folder}: has no preprocessor_config.json → copy all files of the model, not only its weights")
    return lines


def load(folder: Path, classes: dict[str, Any], dtype: torch.dtype, device: torch.device, remedy: str) -> tuple:
    """(model in evaluation mode, feature extractor).

    Raises:
        ModelError: a file cannot be read, or weights are missing that a score depends on.
    """
    from transformers import AutoFeatureExtractor

    if found := problems(folder, classes, remedy):
        raise ModelError("a model to score with cannot be loaded", found)
    auto = _known(untrusted.read_object(folder / "config.json")["architectures"], classes)
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, **OFFLINE)
        model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **OFFLINE)
    except Exception as error:
        raise ModelError(f"{folder}: cannot be loaded", [f"{error} → {remedy}"]) from error
    missing = [name for name in info["missing_keys"] if not any(part in name for part in _ONLY_IN_TRAINING)]
    if missing:
        raise ModelError(
            f"{folder}: weights are missing", [f"{name} → copy all files of the model" for name in sorted(missing)]
        )
    return model.eval().to(device), extractor


def _known(named: Any, classes: dict[str, Any]) -> Any:
    names = named if isinstance(named, list) else []
    return next((classes[name] for name in names if isinstance(name, str) and name in classes), None)


def _shown(named: Any) -> str:
    return ", ".join(map(str, named)) if isinstance(named, list) and named else "no architecture"
