"""Where the weights of the Whisper conditioning come from, and how they are kept beside a model.

| source | encoder | projection |
|---|---|---|
| an original checkpoint with an audio tower | the tower | the tower's |
| `whisper_conditioning/` in a folder that the engine wrote | there | there |
| a transformers Whisper folder, by the setting's path | there | new |

The engine's own folder is a Whisper folder too, with the projection beside the encoder, so that it can be given by
its path as well. transformers' Higgs model knows nothing of either; in a folder of their own they do not disturb it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperFeatureExtractor

from engine.data.mels import CHUNK_FRAMES, HOP, SAMPLING_RATE
from engine.errors import ModelError
from engine.model.keys import WHISPER
from engine.model.safetensors_writer import Spec, write_safetensors
from engine.model.tensor_files import TensorFiles, read_json, weight_files
from engine.model.weights import WeightFiles
from engine.model.whisper import WhisperConditioning

FOLDER = "whisper_conditioning"
"""Name of the engine's folder within a model, adapter or checkpoint folder."""

REMEDY = "give the folder of a Whisper model (openai/whisper-large-v3 and the like), or set whisper_conditioning: off"

TOWER_DEFAULTS = {
    "num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120, "max_source_positions": 1500, "activation_function": "gelu",
}  # fmt: skip
"""Of the original's own encoder configuration, for what its config.json leaves out."""


class WhisperSource:
    """An encoder, perhaps its projection, and what prepares recordings for it.

    Attributes:
        config: of the encoder.
        extractor: makes its log-mels.
        shapes: name (`whisper.encoder…`, `whisper.projection…`) -> shape of each tensor there is.
        hidden_size: width of the language model.

    Raises:
        ModelError: weights, configuration and feature extractor do not belong together (all is listed).
    """

    def __init__(
        self,
        where: str,
        config: WhisperConfig,
        extractor: WhisperFeatureExtractor,
        shapes: dict[str, tuple[int, ...]],
        read: Callable[..., torch.Tensor],
        hidden_size: int,
    ):
        self.config, self.extractor, self.shapes, self.hidden_size = config, extractor, shapes, hidden_size
        self._read = read
        if problems := [*self._extractor_problems(), *self._weight_problems()]:
            raise ModelError(f"{where}: not a Whisper encoder that this model can be conditioned with:", problems)

    @property
    def preprocessor(self) -> dict:
        """Configuration of the feature extractor (engine.data.mels.MelExtractor)."""
        return self.extractor.to_dict()

    @property
    def has_projection(self) -> bool:
        return f"{WHISPER}projection.weight" in self.shapes

    def build_on_meta(self) -> WhisperConditioning:
        """The module, fp32, without memory."""
        with torch.device("meta"):
            return WhisperConditioning(self.config, self.hidden_size).float().train()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, in the stored dtype."""
        return self._read(name, start, stop)

    def describe(self, folder: Path) -> None:
        """Writes the two configurations into `folder`, which it makes."""
        folder.mkdir()
        self.config.save_pretrained(folder)
        self.extractor.save_pretrained(folder)

    def _extractor_problems(self) -> list[str]:
        found, config = self.extractor, self.config
        wanted = {
            "mel bins": (found.feature_size, config.num_mel_bins),
            "sampling rate": (found.sampling_rate, SAMPLING_RATE),
            "hop length": (found.hop_length, HOP),
            "frames of a chunk": (found.nb_max_frames, CHUNK_FRAMES),
            "dither": (found.dither, 0.0),
            "max_source_positions": (config.max_source_positions, CHUNK_FRAMES // 2),
        }
        return [
            f"{what}: {is_} instead of {must_be} → take configuration and feature extractor of one Whisper model"
            for what, (is_, must_be) in wanted.items()
            if is_ != must_be
        ]

    def _weight_problems(self) -> list[str]:
        needed = {WHISPER + name: tuple(p.shape) for name, p in self.build_on_meta().named_parameters()}
        if not self.has_projection:
            needed = {name: shape for name, shape in needed.items() if not name.startswith(f"{WHISPER}projection.")}
        problems = [f"{_bare(name)} is missing → {REMEDY}" for name in needed if name not in self.shapes]
        problems += [
            f"{_bare(name)} has shape {self.shapes[name]}, {shape} is needed → {REMEDY}"
            for name, shape in needed.items()
            if self.shapes.get(name, shape) != shape
        ]
        return problems + [f"{_bare(name)} has no place in it" for name in self.shapes if name not in needed]


def _bare(name: str) -> str:
    return name.removeprefix(WHISPER)


def resolve(setting: str, files: WeightFiles) -> tuple[WhisperSource | None, str | None]:
    """What the setting `whisper_conditioning` means for a model.

    Args:
        setting: off, auto, or the path of a Whisper folder.

    Returns:
        The source, None if nothing of it is to be built; and a line for the start-up print, None if all is as ever.

    Raises:
        ModelError: the source cannot be used.
    """
    beside = files.folder / FOLDER
    hidden_size = files.config.hidden_size
    if setting == "off":
        present = files.tower_shapes or beside.is_dir()
        return None, "whisper_conditioning: off, the audio tower of this checkpoint is left out" if present else None
    if setting != "auto":
        source = of_folder(Path(setting), hidden_size)
        return source, f"whisper_conditioning: {setting}, with {'its' if source.has_projection else 'a new'} projection"
    if beside.is_dir():
        return of_folder(beside, hidden_size), f"whisper_conditioning: auto → {FOLDER}/ of this checkpoint"
    if files.tower_config is None:
        return None, "whisper_conditioning: auto → off, this checkpoint has no audio tower"
    if not files.uses_tower:
        return None, "whisper_conditioning: auto → off, this checkpoint was trained without its audio tower"
    return of_tower(files), "whisper_conditioning: auto → the audio tower of this checkpoint"


def of_tower(files: WeightFiles) -> WhisperSource:
    """The audio tower of a checkpoint in the original format, whose feature extractor is Whisper's own."""
    if f"{WHISPER}projection.weight" not in files.tower_shapes:
        raise ModelError(
            f"{files.folder}: config.json promises an audio tower (skip_audio_tower false), but audio_tower and "
            "audio_encoder_proj are not among the weights → download them again, or set whisper_conditioning: off."
        )
    known = {name: files.tower_config.get(name, default) for name, default in TOWER_DEFAULTS.items()}
    extractor = WhisperFeatureExtractor(feature_size=known["num_mel_bins"])
    where = f"{files.folder}, audio tower"
    return WhisperSource(
        where, WhisperConfig(**known), extractor, files.tower_shapes, files.read, files.config.hidden_size
    )


def of_folder(folder: Path, hidden_size: int) -> WhisperSource:
    """A Whisper folder: with decoder or without, or the engine's own.

    Raises:
        ModelError: it is none.
    """
    raw = read_json(folder / "config.json", REMEDY)
    if raw.get("model_type") != "whisper":
        raise ModelError(f"{folder}: model_type is {raw.get('model_type')!r}, not whisper → {REMEDY}.")
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ModelError(
            f"{folder}: no usable feature extractor ({error}) → copy the model's preprocessor_config.json there."
        ) from None
    tensors = TensorFiles(weight_files(folder, REMEDY), _name_in_folder)
    return WhisperSource(
        str(folder), WhisperConfig.from_dict(raw), extractor, tensors.shapes, tensors.read, hidden_size
    )


def _name_in_folder(stored: str) -> str | None:
    """Our name of a tensor of a Whisper folder, None for one of the decoder.

    `model.encoder.…` in WhisperForConditionalGeneration, `encoder.…` in WhisperModel and in the engine's own folder.
    """
    name = stored.removeprefix("model.")
    if name.startswith(("encoder.", "projection.")):
        return WHISPER + name
    return None if name.startswith(("decoder.", "proj_out.")) else f"{WHISPER}encoder.{name}"


def write_weights(folder: Path, specs: dict[str, Spec], read: Callable[[str], torch.Tensor]) -> tuple[Path, dict]:
    """Writes the tensors beside the configurations that `folder` holds.

    Args:
        specs: `whisper.…` -> shape and dtype to be kept, of all tensors.
        read: gives one.

    Returns:
        The file, and name in it -> checksum of what was written.
    """
    file, stored = folder / "model.safetensors", {_bare(name): spec for name, spec in specs.items()}
    return file, write_safetensors(file, stored, lambda name: read(WHISPER + name))
