"""What `prepare` and `validate` of the command line do: over all data files of the settings."""

from pathlib import Path

from transformers.utils import logging as transformers_log

from engine.config import Settings
from engine.data.mels import MelExtractor
from engine.data.prepare import prepare
from engine.data.store import is_store
from engine.data.validate import Validation
from engine.errors import ConfigError, DataError
from engine.model import whisper_source
from engine.model.weights import WeightFiles, load_tokenizer
from engine.observe.progress import Progress
from engine.runtime.distributed import init_process_group, raise_together, shutdown


def prepare_stores(settings: Settings, out: Path) -> None:
    """Makes the store `out`, or with several data files one in it for each; every process of the launcher calls it."""
    transformers_log.disable_progress_bar()
    world = init_process_group(settings.timeout_s)
    say = Progress(world).say
    try:
        files = WeightFiles(settings.model_path)
        tokenizer = load_tokenizer(settings.model_path)
        whisper, line = whisper_source.resolve(settings.whisper_conditioning, files)
        mels = MelExtractor(whisper.preprocessor) if whisper else None
        if line:
            say(line)
        for source, folder in _folders(settings, out).items():
            prepare(source, folder, settings, tokenizer, files.config, world, mels, say)
            say(f"store: {folder}")
        say("next: train with --train_data_file STORE and the same settings")
    except Exception as error:
        raise_together(world, error)
    shutdown(world)


def _folders(settings: Settings, out: Path) -> dict[str, Path]:
    """Each data file with its store."""
    sources = [*settings.train_data_file, *settings.eval_data_file]
    if stores := [source for source in sources if is_store(source)]:
        raise ConfigError(
            "prepare makes stores of data:", [f"{store} is a store already → leave it out" for store in stores]
        )
    if is_store(out) or not out.exists():
        pass
    elif not out.is_dir() or any(out.iterdir()):
        raise ConfigError(f"--out: {out} exists and is not a store → give another folder, or remove it.")
    if len(sources) == 1:
        return {sources[0]: out}
    names = [Path(source).stem for source in sources]
    repeated = {name for name in names if names.count(name) > 1}
    return {
        source: out / (f"{name}-{number}" if name in repeated else name)
        for number, (source, name) in enumerate(zip(sources, names, strict=True))
    }


def validate_all(settings: Settings, folder: Path) -> bool:
    """Prints and writes the report of every data file; whether all of them may be used."""
    sources = _unprepared(settings)
    passed = True
    for number, source in enumerate(sources):
        report = _validation(source, settings).report(folder if len(sources) == 1 else folder / str(number))
        print("\n".join(report.lines()))
        passed &= report.passed
    return passed


def show_row(settings: Settings, number: int) -> str:
    transformers_log.disable_progress_bar()
    source, *more = _unprepared(settings)
    if more:
        raise ConfigError("--show takes one data file → give only one train_data_file.")
    return _validation(source, settings).show(number, WeightFiles(settings.model_path).config)


def _unprepared(settings: Settings) -> list[str]:
    sources = [*settings.train_data_file, *settings.eval_data_file]
    if stores := [source for source in sources if is_store(source)]:
        raise DataError(
            "validate reads data, not stores → give the data file; a store's own report is beside it:", stores
        )
    return sources


def _validation(source: str, settings: Settings) -> Validation:
    if settings.model_path is None:
        return Validation(source, settings)
    files = WeightFiles(settings.model_path)
    whisper, _ = whisper_source.resolve(settings.whisper_conditioning, files)
    tokenizer = load_tokenizer(settings.model_path)
    mels = MelExtractor(whisper.preprocessor) if whisper else None
    return Validation(source, settings, tokenizer, files.config.num_codebooks, mels)
