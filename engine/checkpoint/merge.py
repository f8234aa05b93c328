"""Merges LoRA adapters into their base: in fp32, rounded once, written as a model folder that transformers loads.

A tensor at a time, so that the 5.8 B model needs the memory of one shard (5 GB), not its 23 GB in fp32. The Whisper
conditioning that an adapter carries goes along as it is.
"""

import json
import shutil
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch
from peft import PeftConfig, load_peft_weights
from peft.tuners.lora import LoraLayer
from torch import nn

from engine.checkpoint.consolidate import consolidate
from engine.checkpoint.lifecycle import MANIFEST, read_manifest
from engine.checkpoint.model_folder import DTYPES, copy_side_files, require_free, write_model_folder
from engine.errors import ModelError
from engine.model.initial import build_on_meta
from engine.model.keys import adapter_name, base_name
from engine.model.trainable import add_adapters
from engine.model.weights import WeightFiles
from engine.model.whisper_source import FOLDER as WHISPER_FOLDER


def merge(base_model_path: Path, lora_adapter_path: Path, output_path: Path, dtype: str = "auto") -> None:
    """Writes base + adapter.

    Args:
        base_model_path: model folder in either format.
        lora_adapter_path: adapter folder, or a checkpoint of a LoRA run.
        dtype: of the result; auto: that of the base model.

    Raises:
        ModelError: the adapter is none, does not fit the base, or changes nothing.
        ConfigError: `output_path` holds something already.
    """
    require_free(output_path)
    files = WeightFiles(base_model_path)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(lora_adapter_path)
        if (adapter / MANIFEST).is_file():
            if not read_manifest(adapter).use_lora:
                raise ModelError(
                    f"{adapter}: the checkpoint of a full run has no adapter → use `higgs-engine consolidate`."
                )
            consolidate(adapter, Path(scratch) / "adapter")
            adapter = Path(scratch) / "adapter"
        merged = _Merged(files, adapter)
        side_files = Path(scratch) / "side"
        side_files.mkdir()
        copy_side_files(files, side_files)
        info = {
            "base_model": str(base_model_path),
            "lora_adapter": str(lora_adapter_path),
            "merged_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model_type": "higgs_audio_v2",
        }
        kind = files.read("model.norm.weight").dtype if dtype == "auto" else DTYPES[dtype]

        def add(draft: Path) -> None:
            (draft / "merge_info.json").write_text(json.dumps(info, indent=1))
            if (adapter / WHISPER_FOLDER).is_dir():
                shutil.copytree(adapter / WHISPER_FOLDER, draft / WHISPER_FOLDER)

        write_model_folder(output_path, side_files, merged.shapes, merged.read, kind, add)


class _Merged:
    """The merged weights, one at a time: base + delta in fp32. PEFT makes the deltas; the base stays on disk.

    Attributes:
        shapes: name -> shape of every weight of the model.
    """

    def __init__(self, files: WeightFiles, adapter: Path):
        self.files, self.adapter = files, adapter
        model = build_on_meta(files.config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        files.check(self.shapes)
        wrapped = self._wrap(model)
        self._fill(wrapped)
        self.layers = {f"{base_name(n)}.weight": m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
        whole = [(n, p.detach()) for n, p in wrapped.named_parameters() if ".modules_to_save." in n]
        self.replaced = {base_name(name): parameter for name, parameter in whole}
        if not self.replaced and not any(m.lora_B["default"].weight.any() for m in self.layers.values()):
            raise ModelError(
                f"{adapter}: the adapter changes nothing (all its B matrices are zero) → it was never trained."
            )

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The meta model with empty adapters, as adapter_config.json describes them."""
        if not (self.adapter / "adapter_config.json").is_file():
            raise ModelError(
                f"{self.adapter}: no adapter_config.json there → give the folder of an adapter or a LoRA checkpoint."
            )
        config = PeftConfig.from_pretrained(self.adapter)
        if getattr(config, "use_dora", True):
            raise ModelError(
                f"{self.adapter}: {config.peft_type} with DoRA or no LoRA at all → only LoRA can be merged."
            )
        model.name_or_path = config.base_model_name_or_path or ""  # or PEFT warns that it was another
        return add_adapters(model, config)

    def _fill(self, wrapped: nn.Module) -> None:
        """Puts the adapter's tensors into their places, every one of them."""
        tensors = load_peft_weights(str(self.adapter), device="cpu")
        problems = []
        for name, parameter in list(wrapped.named_parameters()):
            if ".lora_" not in name and ".modules_to_save." not in name:
                continue
            value = tensors.pop(adapter_name(name), None)
            if value is None or value.shape != parameter.shape:
                found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                problems.append(f"{adapter_name(name)} {found}, the base needs {tuple(parameter.shape)}")
            else:
                module, _, last = name.rpartition(".")
                setattr(wrapped.get_submodule(module), last, nn.Parameter(value))
        problems += [f"{name} has no place in the base" for name in tensors]
        if problems:
            raise ModelError(f"{self.adapter}: the adapter does not fit {self.files.folder}:", problems)

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        if name in self.replaced:
            return self.replaced[name]
        weight = self.files.read(name).float()
        if name in self.layers:
            weight += self.layers[name].get_delta_weight("default").float()
        return weight
