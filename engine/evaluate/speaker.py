"""How much two clips sound like one person: the cosine of their x-vectors, by any x-vector model of transformers.

An x-vector is what a model that was trained to tell speakers apart makes of a clip, whatever is said in it. The cosine
is between -1 and 1; how high it is for two recordings of one person depends on the model (WavLM-base-plus-sv: above
0.86 by its authors), so compare a clip's with that of a real recording rather than with 1.
"""

from pathlib import Path
from typing import Any

import torch

from engine.data.audio import Decoded, resample
from engine.evaluate import local_model

SHORTEST = 0.5
"""Seconds; a voice is not told by less, and the models need some 0.35."""
LONGEST = 30.0
"""Seconds that are heard of a clip, from its begin; the memory grows with their square."""
REMEDY = "give the folder of a WavLM, wav2vec2 or other transformers model with an x-vector head"


class SpeakerModel:
    """
    Args:
        folder: the model with its feature extractor, as `save_pretrained` or a download leaves them.
        device: where it runs, in float32.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        self._loaded: Any = None

    def problems(self) -> list[str]:
        """What is wrong with the folder, without reading its weights; one line each."""
        return local_model.problems(self.folder, self._classes(), REMEDY)

    def similarity(self, one: Decoded, other: Decoded) -> float | None:
        """The cosine of their x-vectors, None if one of them lasts less than SHORTEST.

        Raises:
            ModelError: the model cannot be loaded.
            AudioError: the rate of a clip and the model's have too little in common.
        """
        if min(len(clip.wave) / clip.sampling_rate for clip in (one, other)) < SHORTEST:
            return None
        cosine = torch.nn.functional.cosine_similarity(self.voice(one), self.voice(other), dim=0)
        return float(cosine) if torch.isfinite(cosine) else None

    @torch.inference_mode()
    def voice(self, clip: Decoded) -> torch.Tensor:
        """The x-vector of a clip of SHORTEST or more, float32 [its size]."""
        if self._loaded is None:
            self._loaded = local_model.load(self.folder, self._classes(), torch.float32, self.device, REMEDY)
        model, extractor = self._loaded
        wave = resample(clip, extractor.sampling_rate)[: round(LONGEST * extractor.sampling_rate)]
        inputs = extractor(wave, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        values = inputs[model.main_input_name].to(self.device)
        return model(values).embeddings[0].float().cpu()

    def _classes(self) -> dict[str, Any]:
        from transformers.models.auto import modeling_auto as auto

        return dict.fromkeys(auto.MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES.values(), auto.AutoModelForAudioXVector)
