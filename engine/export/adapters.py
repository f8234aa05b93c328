"""Writes what a LoRA run trained as an adapter folder in PEFT's format, a tensor in memory at a time.

What is written is what `adapter_config.json` asks for on the base's configuration, name by name and shape by shape:
plain PEFT loads it without a warning, and nothing of it is half of something. Then it is read back.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import HiggsAudioV2Config

from engine.checkpoint.lifecycle import MODEL_FILES
from engine.checkpoint.stored import StoredWeights
from engine.config import Settings
from engine.errors import CheckpointError
from engine.export.reopened import verify_tensors
from engine.model.adapter_files import PREFIX, STARTS_AT_ZERO, AdapterFiles, misfits
from engine.model.adapter_folder import CONFIG, WEIGHTS
from engine.model.initial import build_on_meta
from engine.model.keys import WHISPER, adapter_name, base_name
from engine.model.lora import variant
from engine.model.safetensors_writer import Spec, write_safetensors
from engine.model.tensor_files import read_json


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter folder holds; as text, for the log."""

    tensors: int
    parameters: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.tensors} tensors, {self.parameters:,} parameters, {self.bytes / 1e6:,.1f} MB"


def write_adapter(
    weights: StoredWeights,
    out: Path,
    adapter_config: Path,
    settings: Settings,
    dtype: torch.dtype = torch.float32,
) -> AdapterSummary:
    """Writes adapter_model.safetensors, adapter_config.json and README.md into `out`, which is made if need be.

    The Whisper conditioning that a run may have trained beside is no part of an adapter.

    Args:
        weights: what the run trained, by parameter name.
        adapter_config: the file as PEFT wrote it into the checkpoint; `model_files/` stands beside it.
        settings: those of the run, for the README.
        dtype: of all tensors.

    Raises:
        CheckpointError: a tensor is missing, too many, of another shape or not finite; or nothing was trained: all
            B matrices are zero and nothing is saved whole. All of it is listed, and no weights are left in `out`.
    """
    config = PeftConfig.from_pretrained(str(adapter_config.parent))
    sources = {adapter_name(name): name for name in weights.shapes if not base_name(name).startswith(WHISPER)}
    expected = _expected(adapter_config, config)
    _fail_on(adapter_config, misfits({name: weights.shapes[source] for name, source in sources.items()}, expected))
    out.mkdir(parents=True, exist_ok=True)
    file = out / WEIGHTS[0]
    specs = {name: Spec(expected[name], dtype) for name in sources}
    broken, moved = [], bool(config.modules_to_save)

    def read(name: str) -> torch.Tensor:
        nonlocal moved
        tensor = weights.read(sources[name])
        if not tensor.isfinite().all():
            broken.append(f"{name} is not finite → take an earlier checkpoint")
        moved = moved or any(part in name for part in STARTS_AT_ZERO) and bool(tensor.any())
        return tensor

    checksums = write_safetensors(file, specs, read)
    if not moved:
        broken.append("all B matrices are zero, so the adapter does nothing → it was never trained")
    if broken:
        file.unlink()
    _fail_on(adapter_config, broken)
    if out != adapter_config.parent:
        shutil.copyfile(adapter_config, out / CONFIG)
    written = AdapterFiles(out)
    verify_tensors(out, written.shapes, written.read, specs, checksums)
    (out / "README.md").write_text(_readme(config, settings), encoding="utf-8")
    return AdapterSummary(len(specs), sum(torch.Size(spec.shape).numel() for spec in specs.values()),
                          sum(spec.bytes for spec in specs.values()))  # fmt: skip


def _expected(adapter_config: Path, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the configuration asks for on the base that the checkpoint describes.

    Told without PEFT's wrapper: to make one, PEFT changes torch itself for a moment, and training may go on meanwhile.
    """
    described = read_json(adapter_config.parent / MODEL_FILES / "config.json", "the checkpoint is not complete")
    shapes = {}
    for name, module in build_on_meta(HiggsAudioV2Config.from_dict(described)).named_modules():
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name):
            outputs, inputs = module.weight.shape
            shapes |= {f"{name}.lora_A.weight": (config.r, inputs), f"{name}.lora_B.weight": (outputs, config.r)}
            shapes |= {f"{name}.lora_magnitude_vector": (outputs,)} if config.use_dora else {}
        if any(name.endswith(whole) for whole in config.modules_to_save or ()):
            shapes |= {f"{name}.{last}": tuple(p.shape) for last, p in module.named_parameters()}
    return {PREFIX + name: shape for name, shape in shapes.items()}


def _fail_on(adapter_config: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{adapter_config.parent}: its adapter cannot be written:", problems)


def _readme(config: LoraConfig, settings: Settings) -> str:
    whole = f", saved whole: {', '.join(sorted(config.modules_to_save))}" if config.modules_to_save else ""
    return f"""---
library_name: peft
tags: [lora, higgs-audio, text-to-speech]
---
# {variant(config)} adapter for Higgs Audio v2

Base model: `{settings.model_path}`. Rank {config.r}, alpha {config.lora_alpha:g}, layers: \
{", ".join(sorted(config.target_modules))}{whole}.

Load it beside its base:

```python
from peft import PeftModel
from transformers import HiggsAudioV2ForConditionalGeneration

base = HiggsAudioV2ForConditionalGeneration.from_pretrained(BASE, use_text_head=True)
model = PeftModel.from_pretrained(base, THIS_FOLDER)
```

(A base in the original `higgs_audio` format is merged, or converted by `higgs-engine export` first.)

Merge it into its base, exactly and verified:

```
higgs-engine merge --base_model_path BASE --lora_adapter_path THIS_FOLDER --output_path MERGED
```
"""
