"""Merges LoRA adapters into their base: in fp32, rounded once, written as a model folder that transformers loads."""

import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch
from peft import PeftModel

from engine.checkpoint.consolidate import consolidate
from engine.checkpoint.lifecycle import MANIFEST
from engine.checkpoint.model_folder import DTYPES, copy_side_files, require_free, write_model_folder
from engine.errors import ModelError
from engine.model.initial import InitialWeights, build_on_meta, fill, rebuild_buffers
from engine.model.weights import WeightFiles


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
            if consolidate(adapter, Path(scratch) / "adapter") != "adapter":
                raise ModelError(
                    f"{adapter}: the checkpoint of a full run has no adapter → use `higgs-engine consolidate`."
                )
            adapter = Path(scratch) / "adapter"
        merged = _merged_weights(files, adapter)
        side_files = Path(scratch) / "side"
        side_files.mkdir()
        copy_side_files(files, side_files)
        info = {
            "base_model": str(base_model_path),
            "lora_adapter": str(lora_adapter_path),
            "merged_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model_type": "higgs_audio_v2",
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
        kind = files.read("model.norm.weight").dtype if dtype == "auto" else DTYPES[dtype]
        text = {"merge_info.json": json.dumps(info, indent=1)}
        write_model_folder(output_path, side_files, shapes, merged.__getitem__, kind, text)


def _merged_weights(files: WeightFiles, adapter: Path) -> dict[str, torch.Tensor]:
    model = build_on_meta(files.config)
    weights = InitialWeights(files, seed=0)
    weights.check(model)
    fill(model, weights, torch.device("cpu"), torch.float32)
    rebuild_buffers(model, torch.device("cpu"))
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter}: no adapter_config.json there → give the folder of an adapter or a LoRA checkpoint."
        )
    try:
        wrapped = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{adapter}: the adapter does not fit {files.folder}: {error}") from None
    if not any(p.any() for name, p in wrapped.named_parameters() if ".lora_B." in name or ".modules_to_save." in name):
        raise ModelError(
            f"{adapter}: the adapter changes nothing (all its B matrices are zero) → it was never trained."
        )
    return {name: tensor.detach() for name, tensor in wrapped.merge_and_unload().named_parameters()}
