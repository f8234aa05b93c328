"""Higgs Engine: fine-tunes Higgs Audio v2 through DeepSpeed or FSDP, full or LoRA, on packed rows."""

from engine.runtime import torchaudio_compat

__version__ = "0.1.0"

torchaudio_compat.install()
