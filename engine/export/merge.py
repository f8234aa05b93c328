"""Merges LoRA adapters into their base: in fp32, rounded once, written as a model folder that transformers loads.

A tensor at a time, so that the 5.8 B model needs no more memory than its largest weight. The result is compared with
base and adapter side by side before it gets its name. The Whisper conditioning that an adapter carries goes along as
it is.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from engine import __version__
from engine.checkpoint.manifest import MANIFEST, read_manifest
from engine.errors import ModelError
from engine.export.consolidate import consolidate
from engine.export.merge_check import Changes, compare, verify
from engine.export.merged import MergedWeights
from engine.export.model_card import BASE_CARD, CARD, NATIVE_USE
from engine.export.model_folder import DTYPES, copy_side_files, require_free, write_model_folder
from engine.export.shards import MAX_SHARD_SIZE, parse_size
from engine.model.adapter_files import AdapterFiles, open_adapter
from engine.model.adapter_folder import SUBFOLDER
from engine.model.lora import variant
from engine.model.streamed import ProbeBatch, probe_batch
from engine.model.weights import WeightFiles, load_tokenizer
from engine.model.whisper_source import FOLDER as WHISPER_FOLDER

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


def merge(
    base_model_path: Path | None,
    lora_adapter_path: Path,
    output_path: Path,
    dtype: str = "auto",
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
    compare_text: str | None = None,
    save_tokenizer: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes base + adapter.

    Args:
        base_model_path: model folder in either format; None: the one that the adapter names.
        lora_adapter_path: adapter folder, a checkpoint of a LoRA run, or a LoRA run's output folder.
        dtype: of the result; auto: that of the base model.
        max_shard_size: of a file of the result, as 5GB.
        compare_text: compare base and result on this text as well.
        say: is told what was compared.

    Raises:
        ModelError: the adapter is none, does not fit the base, or changes nothing.
        ConfigError: `output_path` holds something already, or `max_shard_size` is no size.
        CheckpointError: what was written does not compute what base and adapter compute.
    """
    require_free(output_path)
    max_bytes = parse_size(max_shard_size)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = _open(Path(lora_adapter_path), Path(scratch))
        files = WeightFiles(_base(base_model_path, adapter))
        merged = MergedWeights(files, adapter)
        written_as = files.read("model.norm.weight").dtype if dtype == "auto" else DTYPES[dtype]
        changes = Changes(merged, written_as)
        side_files = Path(scratch) / "side"
        side_files.mkdir()
        copy_side_files(files, side_files)
        tokenizer = load_tokenizer(files.folder) if compare_text is not None else None
        if not save_tokenizer:
            for file in (file for pattern in TOKENIZER_FILES for file in side_files.glob(pattern)):
                file.unlink()
        info = {
            "base_model": str(files.folder.absolute()),
            "lora_adapter": str(Path(lora_adapter_path).absolute()),
            "merged_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model_type": "higgs_audio_v2",
            "dtype": str(written_as).removeprefix("torch."),
            "engine_version": __version__,
        }
        batch = probe_batch(files.config, compare_text, tokenizer)
        add = partial(_complete, merged, changes, batch, compare_text, info, say)
        # compared here with base + adapter, which is more than with itself read twice
        write_model_folder(output_path, side_files, merged.shapes, changes.read, written_as, add,
                           max_shard_bytes=max_bytes, logits=False, say=say)  # fmt: skip


def _complete(
    merged: MergedWeights, changes: Changes, batch: ProbeBatch, compare_text: str | None, info: dict,
    say: Callable[[str], None], draft: Path,
) -> None:  # fmt: skip
    """Compares the weights in a draft, and puts into it what belongs beside them."""
    changes.require_some()
    say(changes.line())
    verified = verify(merged, WeightFiles(draft), changes.dtype, batch)
    say(verified.line())
    info = info | {"changed_tensors": changes.count, "verified": verified.numbers()}
    if compare_text is not None:
        comparison = compare(merged, WeightFiles(draft), batch)
        for line in [*comparison.lines(compare_text), *changes.table()]:
            say(line)
        info["compared"] = {"text": compare_text} | comparison.numbers()
    if (draft / CARD).is_file():
        (draft / CARD).rename(draft / BASE_CARD)
    (draft / CARD).write_text(_card(merged, info), encoding="utf-8")
    (draft / "merge_info.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    if (merged.adapter.folder / WHISPER_FOLDER).is_dir():
        shutil.copytree(merged.adapter.folder / WHISPER_FOLDER, draft / WHISPER_FOLDER)


def _card(merged: MergedWeights, info: dict) -> str:
    kind = variant(merged.adapter.config)
    return (
        "---\nlicense: other\nlibrary_name: transformers\npipeline_tag: text-to-speech\n---\n\n"
        f"# Higgs Audio v2 with a {kind} adapter merged into it\n\nBase: `{info['base_model']}`, adapter: "
        f"`{info['lora_adapter']}`, merged by Higgs Engine {__version__} in fp32 and rounded to {info['dtype']} once; "
        f"`merge_info.json` holds what was verified.\n\n## Use\n\n{NATIVE_USE}\n\n## Licence\n\nThat of the base "
        "model, whose licence files, if it had any, are copied here.\n"
    )


def _open(path: Path, scratch: Path) -> AdapterFiles:
    """The adapter meant; of a checkpoint it is made anew from its shards, with what it has of Whisper."""
    if path.name == SUBFOLDER and not (path / WHISPER_FOLDER).is_dir() and (path.parent / WHISPER_FOLDER).is_dir():
        path = path.parent  # the checkpoint, for the adapter alone lacks its Whisper conditioning
    if not (path / MANIFEST).is_file():
        return open_adapter(path)
    if not read_manifest(path).use_lora:
        raise ModelError(f"{path}: the checkpoint of a full run has no adapter → use `higgs-engine consolidate`.")
    consolidate(path, scratch / "adapter", say=lambda line: None)
    return AdapterFiles(scratch / "adapter")


def _base(given: Path | None, adapter: AdapterFiles) -> Path:
    named = adapter.config.base_model_name_or_path
    if given is None and not (named and Path(named).is_dir()):
        raise ModelError(f"{adapter.folder}: its base {named!r} is not a folder here → give --base_model_path.")
    return Path(given or named)
