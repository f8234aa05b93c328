"""Adapters as plain PEFT makes them, with values as if trained, and logits as plain transformers computes them."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import HiggsAudioV2ForConditionalGeneration

from engine.config import LINEAR_LAYERS
from engine.model.streamed import probe_batch


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def save_adapter(folder: Path, model: torch.nn.Module, by: float = 0.05, **config) -> Path:
    """An adapter for a model, which it wraps; each trained value is a normal number times `by` off its start."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR_LAYERS} | config
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of both heads on the probe batch, one after the other, flat."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    batch = probe_batch(core.config)
    hidden = core.model(
        input_ids=batch.input_ids[None],
        audio_input_ids=batch.audio_ids[None],
        audio_input_ids_mask=torch.ones(1, len(batch.audio_ids), dtype=torch.bool),
    ).last_hidden_state
    return torch.cat([core.text_lm_head(hidden).flatten(), core.audio_lm_head(hidden).flatten()]).float()
