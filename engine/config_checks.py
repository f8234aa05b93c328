"""What is wrong with settings, a line for each mistake with its remedy: values, alone and together; files."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from engine.config_sources import LIMITS, Schema
from engine.data.layouts import TASK_TYPES
from engine.model.adapter_folder import adapter_folder, differences

REPOSITORY = Path(__file__).resolve().parent.parent
HUB_IDS = {
    "model_path": "bosonai/higgs-audio-v2-generation-3B-base",
    "audio_tokenizer_path": "bosonai/higgs-audio-v2-tokenizer",
}


def value_problems(settings: Any, schema: Schema) -> Iterator[str]:
    """Values out of range, and settings that contradict each other."""
    for name, field in schema.fields.items():
        value, choices, limits = getattr(settings, name), field.metadata["choices"], field.metadata["limits"]
        for word in value if choices and isinstance(value, list) else [value]:
            if choices and word not in choices:
                yield f"{name}: {word!r} is not a choice → one of {', '.join(choices)}"
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        if not all(LIMITS[word](number, limit) for number in numbers for word, limit in limits.items()):
            rule = field.metadata["rule"] + ", or null" * (name in schema.optional)
            yield f"{name}: {value} is out of range → {rule}"
    if settings.codebook_weights is not None and not any(settings.codebook_weights):
        yield "codebook_weights: no codebook has weight → one above 0, or null for equal weights"
    if settings.text_loss_weight == settings.audio_loss_weight == 0:
        yield "text_loss_weight, audio_loss_weight: both are 0, so there is no loss → set one above 0"
    if settings.profile_steps is not None and not profiled_steps(settings.profile_steps):
        yield f"profile_steps: {settings.profile_steps!r} → first and last step, from 1 on, as 10:13"
    yield from _data_problems(settings)
    yield from _trained_problems(settings, schema)
    yield from _backend_problems(settings)


def profiled_steps(text: str) -> range | None:
    """The steps that `profile_steps` names; None if it is not written as it should be."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    return range(first, last + 1) if 1 <= first <= last else None


def _data_problems(settings: Any) -> Iterator[str]:
    layout = TASK_TYPES.get(settings.prompt_layout, settings.prompt_layout)
    if settings.train_reference and layout in ("as_written", "reference_in_system", "single_speaker"):
        yield (
            f"train_reference: {layout} has no turn of the reference → set prompt_layout to voice_cloning, "
            "multi_speaker or auto"
        )
    if settings.reference_dropout and layout in ("as_written", "single_speaker"):
        yield f"reference_dropout: {layout} has no reference to leave out → set prompt_layout to another, or 0"
    if settings.pair_references and layout in ("as_written", "single_speaker"):
        yield f"pair_references: {layout} has no place for a reference → set prompt_layout to another"
    if settings.data_weights is not None and len(settings.data_weights) != len(settings.train_data_file):
        weights, sources = len(settings.data_weights), len(settings.train_data_file)
        yield f"data_weights: {weights} weight(s), but {sources} train_data_file → one for each"
    shortest, longest = settings.min_seconds, settings.max_seconds
    if shortest is not None and longest is not None and shortest >= longest:
        yield f"min_seconds: {shortest:g} is not below max_seconds = {longest:g} → lower it"


def _trained_problems(settings: Any, schema: Schema) -> Iterator[str]:
    if settings.use_lora:
        for name in ("train_modules", "freeze_llm"):
            if getattr(settings, name):
                yield f"{name}: LoRA trains adapters only → remove {name}, or use_lora for full training"
        if not settings.lora_target_modules:
            layers = schema.fields["lora_target_modules"].metadata["default"]
            yield f"lora_target_modules: no layer has adapters → some of {' '.join(layers)}"
    elif settings.lora_modules_to_save:
        yield "lora_modules_to_save: has no meaning without LoRA → add use_lora, or name train_modules"
    for name in ("use_rslora", "use_dora", "lora_adapter_path"):
        if getattr(settings, name) and not settings.use_lora:
            yield f"{name}: has no meaning without LoRA → add use_lora, or remove {name}"


def _backend_problems(settings: Any) -> Iterator[str]:
    if settings.bf16 and settings.backend == "none":
        yield "bf16: backend none computes in fp32 only → set backend to fsdp, which runs in one process too"
    if settings.float8:
        if settings.backend != "fsdp":
            yield (
                f"float8: backend {settings.backend} keeps gathered weights for their products' backward → set "
                "backend to fsdp, which runs in one process too"
            )
        if settings.bf16 is False:
            yield "float8: starts from bf16 → set bf16 to true, or float8 to false"
        if settings.use_lora:
            yield "float8: computes the gradients of frozen weights too, no gain with LoRA → set float8 to false"
    if settings.optimizer_state_dtype == "int8" and settings.backend == "deepspeed":
        yield (
            "optimizer_state_dtype: int8 has scales for the shards of fsdp, not for deepspeed's → set backend "
            "to fsdp, or optimizer_state_dtype to bf16"
        )
    if settings.fsdp_replicas != 1 and settings.backend != "fsdp":
        yield f"fsdp_replicas: has no meaning for backend {settings.backend} → set backend to fsdp"
    if settings.sequence_parallel_size > 1 and settings.backend == "none":
        yield "sequence_parallel_size: backend none is one process → set backend to fsdp or deepspeed"
    if settings.torch_compile and settings.use_liger_kernel:
        yield "use_liger_kernel, torch_compile: both fuse the same operations → one of them"
    if settings.torch_compile and settings.processes_per_row > 1:
        yield "torch_compile: not with processes that share a row → leave it out, or set their number to 1"
    if settings.tensor_parallel_size > 1:
        if settings.backend != "deepspeed":
            yield f"tensor_parallel_size: has no meaning for backend {settings.backend} → set backend to deepspeed"
        if settings.sequence_parallel_size > 1:
            yield "tensor_parallel_size, sequence_parallel_size: only one of them may be above 1 → 1 for the other"
        if settings.use_lora:
            yield "tensor_parallel_size: cuts matrices, not adapters → train in full, or set it to 1"


def path_problems(settings: Any, schema: Schema, excused: Collection[str]) -> Iterator[str]:
    """Files and folders that are missing, or are not what they should be."""
    for name, field in schema.fields.items():
        value, kind, about = getattr(settings, name), field.metadata["path"], field.metadata["help"]
        if value is None or value == []:
            if name == "audio_tokenizer_path" and settings.all_prepared:
                continue  # codes are there already
            must = field.metadata["required"] or value is None and name not in schema.optional
            if kind and must and name not in excused:
                yield f"{name}: missing → give --{name} {kind}: {about}"
        elif kind == "DATA":
            for path in value:
                if not os.path.exists(path):
                    yield f"{name}: {path} does not exist → give a file or folder of samples, or a prepared store"
        elif name in HUB_IDS and not os.path.isdir(value):
            asked = os.path.relpath(value)
            wanted = asked if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", asked) else HUB_IDS[name]
            yield (
                f"{name}: {value} is not a folder, and the engine reaches no model hub → first "
                f"`hf download {wanted} --local-dir FOLDER`, then give that folder"
            )
    if settings.whisper_conditioning not in ("off", "auto") and not os.path.isdir(settings.whisper_conditioning):
        yield (
            f"whisper_conditioning: {settings.whisper_conditioning} is not a folder → off, auto, or the folder of a "
            "Whisper model"
        )
    if settings.lora_adapter_path:
        adapter = adapter_folder(settings.lora_adapter_path)
        if adapter is None:
            yield (
                f"lora_adapter_path: {settings.lora_adapter_path} holds no adapter → give a folder with "
                "adapter_config.json and adapter_model.safetensors, or a LoRA checkpoint"
            )
        elif settings.use_lora:
            yield from differences(adapter, settings)
    for spec in settings.callbacks:
        if not os.path.isfile(spec.rpartition(":")[0]):
            yield f"callbacks: {spec}: there is no such file → give path.py:Class"
    for name in ("asr_model_path", "speaker_model_path"):
        folder = getattr(settings, name)
        if folder and not os.path.isfile(os.path.join(folder, "config.json")):
            yield f"{name}: {folder} holds no config.json → give the folder of a transformers model"
    if settings.resume not in ("none", "auto") and not os.path.isdir(settings.resume):
        yield f"resume: {settings.resume} is not a folder → give a checkpoint's folder, auto or none"
    if settings.backend == "deepspeed" and not find_ds_config(settings.ds_config):
        names = ", ".join(sorted(file.stem for file in REPOSITORY.glob("ds_configs/*.json")))
        yield f"ds_config: there is no {settings.ds_config!r} → a JSON file, or one of: {names}"


def find_ds_config(name: str) -> str | None:
    """The file meant by a path or a bare name: from the current directory, else from the repository."""
    for folder in (Path.cwd(), REPOSITORY, REPOSITORY / "ds_configs"):
        for path in (folder / os.path.expanduser(name), folder / f"{os.path.expanduser(name)}.json"):
            if os.path.isfile(path):  # false, where Path.is_file raises, for a name too long
                return os.path.abspath(path)
    return None
