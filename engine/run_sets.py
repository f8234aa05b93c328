"""The samples that a run trains on and those that it is evaluated on: from data files and stores, split, in budget."""

from collections.abc import Callable
from pathlib import Path

from engine.config import Settings
from engine.data.dataset import Dataset, open_data, write_dropped
from engine.data.mels import MelExtractor
from engine.data.split import split
from engine.errors import ConfigError, ModelError
from engine.model import whisper_source
from engine.model.weights import WeightFiles, load_tokenizer
from engine.runtime.distributed import World


class Sets:
    """Every process makes one and asks alike, for what is no store yet is prepared together.

    Args:
        settings: resolved.
        reuse: take what an earlier start of this run prepared.
        say: prints a line, on the main process.

    Raises:
        DataError, ConfigError, ModelError: by all methods too: data or tokenizer do not fit the run.
    """

    def __init__(self, settings: Settings, world: World, files: WeightFiles, reuse: bool, say: Callable[[str], None]):
        self.settings, self.world, self.files, self.reuse, self._say = settings, world, files, reuse, say
        self.tokenizer = load_tokenizer(settings.model_path)
        _check_tokenizer(files, self.tokenizer)
        whisper, _ = whisper_source.resolve(settings.whisper_conditioning, files)
        self.mels = MelExtractor(whisper.preprocessor) if whisper else None

    def both(self) -> tuple[Dataset, Dataset | None]:
        """To train on, and held out; the latter None where nothing is evaluated."""
        settings = self.settings
        data, evaluation = self._opened("train", settings.train_data_file), None
        if self.mels and not any(store.is_heard for store in data.stores):
            self._nothing_to_hear()
        if settings.eval_data_file:
            evaluation = self._opened("eval", settings.eval_data_file) if not settings.disable_evaluation else None
        elif settings.validation_split:
            data, aside = self._split(data)
            evaluation = None if settings.disable_evaluation else aside
        return self._within_budget("train", data), evaluation and self._within_budget("eval", evaluation)

    def held_out(self) -> Dataset:
        """Only what is held out: eval_data_file, or what validation_split sets aside."""
        settings = self.settings
        if settings.eval_data_file:
            return self._within_budget("eval", self._opened("eval", settings.eval_data_file))
        if not settings.validation_split:
            line = "eval_data_file: there is nothing to evaluate on → give it, or train_data_file and validation_split"
            raise ConfigError("the settings cannot be used", [line])
        return self._within_budget("eval", self._split(self._opened("train", settings.train_data_file))[1])

    def _opened(self, name: str, sources: list[str]) -> Dataset:
        return open_data(
            name, sources, self.settings, self.tokenizer, self.files.config, self.world, self.mels, self.reuse,
            self._say,
        )  # fmt: skip

    def _split(self, data: Dataset) -> tuple[Dataset, Dataset]:
        parts = split(data, self.settings.validation_split, self.settings.seed)
        if self.world.is_main:
            parts.write(Path(self.settings.output_dir) / "validation_split.json", data)
        self._say(f"validation_split: by {parts.by}, {len(parts.evaluation)} of {len(data)} samples aside")
        return data.subset(parts.train), data.subset(parts.evaluation, weighted=False)

    def _nothing_to_hear(self) -> None:
        """Whisper was asked for, or is part of the model, and no sample has a clip that it may hear."""
        line = (
            "whisper_conditioning: no sample has audio in a user or system message, so Whisper hears nothing → set "
            "prompt_layout: reference_in_system, or whisper_conditioning: off"
        )
        if self.settings.whisper_conditioning != "auto":
            raise ConfigError("the settings cannot be used with these data", [line])
        self._say(f"note: {line}")

    def _within_budget(self, name: str, data: Dataset) -> Dataset:
        data = data.within(self.settings.max_tokens_per_micro_batch, self.settings.drop_long_samples)
        self._say(f"{name}: {data.describe()}")
        if self.world.is_main:
            write_dropped(data, Path(self.settings.output_dir) / f"dropped_{name}_samples.json", self._say)
        return data


def _check_tokenizer(files: WeightFiles, tokenizer) -> None:
    token = tokenizer.convert_tokens_to_ids("<|AUDIO_OUT|>")
    if token != files.config.audio_token_id or len(tokenizer) > files.config.vocab_size:
        raise ModelError(
            f"{files.folder}: tokenizer and config.json do not belong together: <|AUDIO_OUT|> is {token}, "
            f"audio_token_id {files.config.audio_token_id}; {len(tokenizer)} tokens, vocab_size "
            f"{files.config.vocab_size} → take both from the same release."
        )
