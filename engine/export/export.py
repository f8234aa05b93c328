"""Exports a whole model: for transformers (`native`), or in the original `higgs_audio` format (`boson`).

The two hold the same tensors under other names, so a model goes from one to the other and back bit for bit. Its source
is the checkpoint of a full run, or a model folder of either format.
"""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import HiggsAudioV2Config

from engine.export.model_folder import Form, require_free, write_model_folder
from engine.export.model_source import ModelSource, model_source
from engine.export.original_format import KEPT_CONFIG, original_config, to_original
from engine.export.shards import MAX_SHARD_SIZE, parse_size
from engine.model.keys import original_name
from engine.model.weights import load_tokenizer

FORMATS = ("native", "boson")


def export(
    source: Path,
    out: Path,
    format: str,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    say: Callable[[str], None] = print,
) -> None:
    """Writes a model in a format of FORMATS, and verifies it.

    Args:
        source: checkpoint of a full run, or model folder.
        dtype: as ModelSource.dtypes.
        max_shard_size: of a file, as 5GB.
        say: is told what is written and what was verified.

    Raises:
        ConfigError: `out` holds something already, or `max_shard_size` is no size.
        CheckpointError, ModelError: the source is none, has no counterpart in that format, or was not written right.
    """
    max_bytes = parse_size(max_shard_size)
    require_free(out)
    with model_source(source) as model:
        if model.left_out:
            say(f"note: {source}: left out is {model.left_out}")
        write = write_native if format == "native" else _write_original
        write(model, out, dtype, max_bytes, say)


def write_native(model: ModelSource, out: Path, dtype: str | None, max_bytes: int, say: Callable[[str], None]) -> None:
    """transformers' format; a Whisper conditioning is a folder of its own within, of which transformers knows nothing.

    Replaces what stands at `out`.
    """
    dtypes = model.dtypes(dtype)

    def add(draft: Path) -> None:
        model.write_whisper(draft, dtypes)
        model.write_card(draft, native=True)

    write_model_folder(out, model.side_files, model.shapes, model.read, dtypes, add, max_shard_bytes=max_bytes, say=say)


def _write_original(
    model: ModelSource, out: Path, dtype: str | None, max_bytes: int, say: Callable[[str], None]
) -> None:
    """The original format; a Whisper conditioning is its audio tower."""
    side = model.side_files
    kept = json.loads((side / KEPT_CONFIG).read_text()) if (side / KEPT_CONFIG).is_file() else None
    tokenizer = load_tokenizer(side)
    config = original_config(HiggsAudioV2Config.from_pretrained(side), tokenizer, kept, model.whisper)
    form = Form(original_name, lambda folder: to_original(folder, config, tokenizer))
    shapes = model.shapes | (model.whisper.shapes if model.whisper else {})
    write_model_folder(
        out, side, shapes, model.read, model.dtypes(dtype), lambda draft: model.write_card(draft, native=False),
        max_shard_bytes=max_bytes, form=form, say=say,
    )  # fmt: skip
