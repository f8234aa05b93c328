"""What is said in a clip, by any speech recogniser of transformers in a local folder.

Two kinds are told apart by the class that the folder's config.json names: those that write (Whisper, Moonshine, ...),
and those that spell frame by frame (CTC: wav2vec2, HuBERT, ...). transformers' own pipeline runs both, resamples, and
takes long clips in pieces: Whisper by its own rule of 30 s windows, CTC models in windows that overlap.

Nothing is downloaded, no code of the folder is run, and weights that are missing are an error: new ones at random
would hear nonsense and call it the clip's fault.
"""

from pathlib import Path
from typing import Any

import torch

from engine.data.audio import Decoded, resample
from engine.errors import ModelError
from engine.evaluate import local_model

SHORTEST = 0.1
"""Seconds; nothing is said in less, and some models cannot take it."""
WINDOW = 30.0
"""Seconds of speech that a CTC model hears at once, a sixth of them at each end only as context."""
REMEDY = "give the folder of a Whisper, wav2vec2 or other transformers speech recogniser"


class SpeechRecogniser:
    """
    Args:
        folder: the model with its tokenizer and feature extractor, as `save_pretrained` or a download leaves them.
        device: where it runs, in float32 on a CPU and in bfloat16 elsewhere.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        self._pipeline: Any = None

    def problems(self) -> list[str]:
        """What is wrong with the folder, without reading its weights; one line each."""
        lines = local_model.problems(self.folder, self._classes(), REMEDY)
        if not lines and not any((self.folder / name).is_file() for name in local_model.TOKENIZER_FILES):
            lines.append(f"{self.folder}: has no tokenizer → copy all files of the model, not only its weights")
        return lines

    def transcribe(self, clip: Decoded) -> str:
        """The words of a clip, "" if it lasts less than SHORTEST.

        Raises:
            ModelError: the model cannot be loaded.
            AudioError: its rate and the model's have too little in common.
        """
        if len(clip.wave) < SHORTEST * clip.sampling_rate:
            return ""
        if self._pipeline is None:
            self._pipeline = self._load()
        rate = self._pipeline.feature_extractor.sampling_rate
        wave = resample(clip, rate)
        options: dict[str, Any] = {}
        if self._pipeline.type == "ctc":
            options["chunk_length_s"] = WINDOW
        elif self._pipeline.type == "seq2seq_whisper" and len(wave) > self._pipeline.feature_extractor.n_samples:
            options["return_timestamps"] = True  # Whisper finds by them where its next window begins
        return self._pipeline(wave, **options)["text"].strip()

    def _classes(self) -> dict[str, Any]:
        from transformers.models.auto import modeling_auto as auto

        writers = dict.fromkeys(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(), auto.AutoModelForSpeechSeq2Seq)
        return writers | dict.fromkeys(auto.MODEL_FOR_CTC_MAPPING_NAMES.values(), auto.AutoModelForCTC)

    def _load(self) -> Any:
        from transformers import AutomaticSpeechRecognitionPipeline, AutoTokenizer

        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model, extractor = local_model.load(self.folder, self._classes(), dtype, self.device, REMEDY)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **local_model.OFFLINE)
        except Exception as error:
            raise ModelError(f"{self.folder}: its tokenizer cannot be loaded", [f"{error} → {REMEDY}"]) from error
        return AutomaticSpeechRecognitionPipeline(
            model=model, tokenizer=tokenizer, feature_extractor=extractor, device=self.device
        )
