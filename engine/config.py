"""The settings of a training run: one flat namespace, each name with its default, limits and help.

Sources, the later the stronger: the defaults below, a YAML file (`--config FILE`), the command line's flags.
The same metadata makes `--help`, the checks and the `config.yaml` that repeats a run. Hours on many GPUs hang
on these values, so nothing is guessed: an unknown name, a wrong type or a contradiction is an error before
anything is loaded, and all mistakes come in one message, each with its remedy.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Collection, Iterable
from functools import partial
from itertools import groupby
from pathlib import Path

import yaml

from engine import config_sources
from engine.config_checks import find_ds_config, path_problems, value_problems
from engine.config_sources import Reading, Schema, setting
from engine.data.formats import FORMAT_NAMES
from engine.data.layouts import LAYOUTS, TASK_TYPES
from engine.errors import ConfigError

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = {
    "Model": "what the run starts from, and how its forward and backward run",
    "Data": "what is trained on, and how recordings become codes",
    "Batches": "a micro-batch is one packed row of whole samples, closed by whichever limit is given",
    "Optimisation": "AdamW and its schedule, counted in optimizer steps",
    "Trained parameters": "everything, chosen parts, or LoRA adapters",
    "Backend": "how the model is spread over processes",
    "Run": "where the run writes, and how often",
    "Watching": "what is told, heard and measured while it trains",
}

_model, _data, _batch, _optim, _trained, _backend, _run, _watch = (partial(setting, group) for group in GROUPS)


@dataclasses.dataclass(kw_only=True)
class Settings:
    """One training run. Paths are absolute from the start, so it means the same in any directory."""

    model_path: str | None = _model(None, "Higgs Audio v2, in either checkpoint format", path="FOLDER", required=True)
    audio_tokenizer_path: str | None = _model(None, "its audio codec", path="FOLDER", required=True)
    attention: str = _model(
        "auto", "kernel for packed rows: flash (flash-attn package), varlen (torch's own), flex (compiled "
        "block mask), sdpa (runs anywhere); auto: the fastest that works here",
        choices=("auto", "flash", "varlen", "flex", "sdpa"))
    bf16: bool | None = _model(
        None, "bf16 compute, fp32 master weights; false: fp32 throughout; none: true on GPU unless backend is none")
    float8: bool = _model(
        False, "matrix products of attention and FFNs in float8, scaled a tensor at a time (torchao): for full "
        "training on GPUs of Hopper's kind or newer, backend fsdp; rounds more coarsely than bf16")
    torch_compile: bool = _model(
        False, "compile the decoder layers: fewer, fused kernels; the first steps take minutes. Not with ZeRO 3, nor "
        "attention: flex")
    use_liger_kernel: bool = _model(
        False, "Liger's fused norms, rotary positions and SwiGLU (GPU; pip install 'higgs-engine[kernels]'); "
        "torch_compile fuses them itself")
    gradient_checkpointing: str = _model(
        "auto", "what the backward computes again instead of keeping it: none; selective (all but matrix products and "
        "attention: half the memory, a few per cent more compute); full (whole layers: the least memory, a third more "
        "compute); auto: the fastest that fits. true means full, false none",
        choices=("auto", "none", "selective", "full"), switch={True: "full", False: "none"})

    train_data_file: list[str] = _data(
        [], "samples to train on: data files or folders of any format, or prepared stores; several are put together",
        path="DATA", required=True)
    eval_data_file: list[str] = _data(
        [], "samples to evaluate on, likewise; none: what validation_split sets aside", path="DATA")
    data_weights: list[float] | None = _data(
        None, "how often an epoch sees each train_data_file, 0.5 is every other time; none: each once", above=0)
    validation_split: float = _data(
        0.0, "share of train_data_file set aside to evaluate on, whole speakers where that comes near it; "
        "eval_data_file wins over it", at_least=0, below=1)
    format: str = _data(
        "auto", "format of the data that is no store; auto: told from its content", choices=("auto", *FORMAT_NAMES))
    prompt_layout: str = _data(
        "auto", "turns of a sample: as_written keeps them; voice_cloning makes reference and target the two turns "
        "that inference uses; reference_in_system puts the reference into the system turn; single_speaker has scene "
        "and text only; multi_speaker tags its speakers; auto: what the row's task_type says, else voice_cloning for a "
        "sample of that shape, else as_written. The task types of other trainers are taken for their layouts",
        choices=("auto", *LAYOUTS, *TASK_TYPES))
    system_prompt: str | None = _data(None, "first words of the system turn; none: those of the original's inference")
    scene: str | None = _data(
        "Audio is recorded from a quiet room.", "scene description of that turn, where a row has none of its own")
    normalize_text: bool = _data(True, "change the text to speak as the original's inference does; not as_written")
    train_reference: bool = _data(False, "also train the reference turns")
    pair_references: bool = _data(
        False, "give samples without reference another clip of the same speaker as reference")
    reference_dropout: float = _data(0.0, "share of samples trained without their reference", at_least=0, below=1)
    min_seconds: float | None = _data(None, "shorter recordings are bad rows", above=0)
    max_seconds: float | None = _data(None, "longer recordings are bad rows", above=0)
    loudness: float | None = _data(
        None, "dBFS to which the RMS of every recording is brought, as far as its peak allows; none: as it is", below=0)
    reject_suspicious: bool = _data(False, "rows with warnings (clipping, truncation, ...) are bad rows too")
    max_bad_fraction: float = _data(
        0.0, "share of bad rows, named and left out, up to which to go on", at_least=0, below=1)
    store_shard_samples: int | None = _data(
        None, "samples in a part of a prepared store, shuffled once, so that an epoch reads part after part: for "
        "network file systems; none: one part in the order of the data", at_least=1)
    whisper_conditioning: str = _data(
        "auto", "also show reference audio to the model through a Whisper encoder: off; auto: if the checkpoint has "
        "one; or the folder of a Whisper model, with a new projection")
    codes_cache_dir: str | None = _data(
        None, "encoded recordings; none: higgs-engine/codes in $XDG_CACHE_HOME or ~/.cache", path="FOLDER")
    codec_batch_seconds: float = _data(120.0, "seconds of audio that the codec encodes at once", above=0)
    drop_long_samples: bool = _data(
        False, "leave out, count and name samples longer than a micro-batch; false: they are an error")
    dataloader_num_workers: int = _data(2, "batch-making workers of each process; 0: none", at_least=0)

    max_tokens_per_micro_batch: int | None = _batch(
        None, "tokens of a micro-batch, text and audio; none: no limit, or 8192 without the next", at_least=1)
    per_device_train_batch_size: int | None = _batch(None, "samples of a micro-batch; none: no limit", at_least=1)
    micro_batches_per_step: int | None = _batch(
        None, "micro-batches of an optimizer step over all processes together, so that steps are the same on "
        "any number of GPUs; none: gradient accumulation times processes (groups, where they share rows)", at_least=1)
    gradient_accumulation_steps: int | None = _batch(
        None, "micro-batches of a step in each process; none: 1, or as the setting before says", at_least=1)

    learning_rate: float = _optim(5e-5, "peak learning rate", above=0)
    lr_scheduler_type: str = _optim(
        "linear", "after the warmup: to zero in a line or a cosine, or constant",
        choices=("linear", "cosine", "constant"))
    warmup_steps: int = _optim(100, "steps in which the rate rises from zero", at_least=0)
    num_train_epochs: int = _optim(3, "passes over the training data", at_least=1)
    max_steps: int | None = _optim(None, "steps of the whole run; none: as the epochs say", at_least=1)
    weight_decay: float = _optim(0.0, "decoupled, of matrices only: not of norms and biases", at_least=0)
    adam_beta1: float = _optim(0.9, "decay of the gradient's mean", at_least=0, below=1)
    adam_beta2: float = _optim(0.95, "decay of the gradient's square", at_least=0, below=1)
    adam_epsilon: float = _optim(1e-8, "added to the update's denominator", above=0)
    optimizer_state_dtype: str = _optim(
        "fp32", "what AdamW's two moments are kept in: fp32 (8 bytes a parameter), bf16 (4) or int8 (2, logarithms "
        "with a scale for 256 neighbours; not with deepspeed); below fp32 they are rounded at random, right on average",
        choices=("fp32", "bf16", "int8"))
    max_grad_norm: float = _optim(1.0, "norm to which gradients are clipped; 0: never", at_least=0)
    skip_spikes_sigma: float | None = _optim(
        None, "skip steps whose gradient norm is above the mean of the last 128 by so many standard deviations, as 6; "
        "none: only steps whose loss or gradient is not finite", above=0)
    max_skipped_steps: int = _optim(
        10, "skipped steps in a row after which the run ends, with a report", at_least=1)
    text_loss_weight: float = _optim(1.0, "weight of the text head's loss", at_least=0)
    audio_loss_weight: float = _optim(1.0, "weight of the audio loss, a mean over codebooks", at_least=0)
    codebook_weights: list[float] | None = _optim(
        None, "weight of each codebook in that mean, the first one first; none: all equal", at_least=0)

    use_lora: bool = _trained(False, "train LoRA adapters; false: train the parameters themselves")
    lora_rank: int = _trained(16, "rank of the adapters", at_least=1)
    lora_alpha: float = _trained(32.0, "adapters are scaled by alpha / rank", above=0)
    lora_dropout: float = _trained(0.1, "share of an adapter's inputs dropped", at_least=0, below=1)
    lora_target_modules: list[str] = _trained(LINEAR_LAYERS, "layers with adapters: attention and both FFNs")
    lora_modules_to_save: list[str] = _trained([], "trained in full beside the adapters, as audio_lm_head")
    use_rslora: bool = _trained(False, "scale adapters by alpha / sqrt(rank) instead, for high ranks")
    use_dora: bool = _trained(
        False, "DoRA: adapters turn the weights' rows, a magnitude of each row is trained beside; slower")
    lora_adapter_path: str | None = _trained(
        None, "adapter to go on from, of the shape that these settings describe: its folder, a LoRA checkpoint or a "
        "LoRA run's output folder; none: a new one", path="FOLDER")
    train_modules: list[str] = _trained(
        [], "without LoRA: globs of parameter names to train, such as '*audio_mlp*'; none: everything")
    freeze_llm: bool = _trained(False, "without LoRA: keep the text backbone as it is")
    freeze_audio_tower: bool = _trained(True, "keep the Whisper encoder as it is")
    freeze_audio_encoder_proj: bool = _trained(False, "keep the Whisper encoder's projection as it is")

    backend: str = _backend(
        "deepspeed", "deepspeed (ZeRO), fsdp (torch's fully_shard) or none (plain torch in one process, fp32)",
        choices=("deepspeed", "fsdp", "none"))
    ds_config: str = _backend("zero2", "DeepSpeed settings: a JSON file, or the name of one in ds_configs/")
    fsdp_reshard_after_forward: bool = _backend(
        True, "free a layer's weights after its forward: less memory, one more gather in the backward")
    fsdp_reduce_once: bool | None = _backend(
        None, "sum gradients over processes once a step, not in every micro-batch: less communication, but whole fp32 "
        "gradients in each process meanwhile; none: with LoRA, whose gradients are small")
    fsdp_replicas: int = _backend(
        1, "copies of the model, each sharded over processes / copies (hybrid sharding)", at_least=1)
    sequence_parallel_size: int = _backend(
        1, "neighbouring processes that share each packed row, a piece of it each (Ulysses): for long samples; divides "
        "the model's key-value heads", at_least=1)
    tensor_parallel_size: int = _backend(
        1, "neighbouring processes that share each matrix product (DeepSpeed's AutoTP, not with ZeRO 3): for GPUs too "
        "small for a layer's work, within one machine; divides the model's key-value heads", at_least=1)
    timeout_s: float = _backend(
        1800.0, "seconds in which a process has to get further within a step, an evaluation or a save; then the run "
        "ends, and says which process holds it up", above=0)

    output_dir: str = _run("./output", "everything is written here", path="FOLDER")
    seed: int = _run(42, "of the data order, dropout and new parameters", at_least=0, below=2**32)
    save_steps: int = _run(500, "steps between checkpoints", at_least=1)
    save_total_limit: int | None = _run(
        3, "newest checkpoints to keep, beside the best one; none: all", at_least=1)
    keep_every: int | None = _run(None, "steps whose multiples are kept for good, as 5000; none: none", at_least=1)
    async_save: bool = _run(
        False, "write checkpoints behind the training's back, from a copy in host memory: each process needs room for "
        "its share of weights and optimizer, and on a GPU up to twice that, for pinned memory comes in powers of two")
    resume: str = _run(
        "none", "none: start afresh; auto: from the newest complete checkpoint of the output folder, if any; "
        "or the folder of a checkpoint")
    max_train_hours: float | None = _run(
        None, "hours after which the run saves, leaves and can be resumed, counted from its last start; none: no "
        "limit", above=0)
    max_restarts: int = _run(
        0, "times that launch/train.sh starts the run again after a failure, from its last checkpoint", at_least=0)
    callbacks: list[str] = _run(
        [], "hooks of your own that the run calls (engine/callbacks.py), each as path.py:Class: your code is run")

    logging_steps: int = _watch(10, "steps between lines of the log", at_least=1)
    report_to: list[str] = _watch(
        ["tensorboard"], "trackers that are told every metric: tensorboard, wandb, mlflow, trackio; none: only "
        "metrics.jsonl, which is always written", choices=("tensorboard", "wandb", "mlflow", "trackio"))
    logging_dir: str | None = _watch(
        None, "for TensorBoard's files, in a folder named as the run; none: tensorboard in the output folder",
        path="FOLDER")
    run_name: str | None = _watch(None, "name of the run for trackers; none: that of the output folder")
    eval_steps: int = _watch(500, "steps between evaluations", at_least=1)
    per_device_eval_batch_size: int | None = _watch(
        None, "samples of an evaluation's micro-batch; none: as in training", at_least=1)
    disable_evaluation: bool = _watch(False, "never evaluate, even if eval_data_file is given")
    early_stopping_patience: int | None = _watch(
        None, "evaluations in a row without a better loss after which the run ends; none: never", at_least=1)
    sample_every: int | None = _watch(
        None, "steps between rounds of generated speech, always of the same prompts with the same random numbers; "
        "none: never", at_least=1)
    sample_prompts: list[str] = _watch(
        [], "what these say: data files of any format; none: held-out samples, or without any, training samples",
        path="DATA")
    sample_count: int = _watch(4, "prompts of a round, the first ones", at_least=1)
    sample_seconds: float = _watch(30.0, "of speech after which a sample that has not stopped is cut", above=0)
    sample_temperature: float = _watch(
        1.0, "of the draw of each code, with the model's own top_k and top_p; 0: always the most likely", at_least=0)
    sample_budget_s: float = _watch(
        300.0, "seconds that a round may take, gathering the weights included; prompts that are left are skipped, "
        "and said", above=0)
    asr_model_path: str | None = _watch(
        None, "any speech recogniser of transformers, to count word errors of samples; none: not counted",
        path="FOLDER")
    speaker_model_path: str | None = _watch(
        None, "any x-vector model of transformers (WavLM, ...), to compare voices of samples and references; none: "
        "not compared", path="FOLDER")
    profile_steps: str | None = _watch(
        None, "first and last step to trace with torch's profiler, as 10:13; none: none")

    def __post_init__(self) -> None:
        if not self.codes_cache_dir:
            self.codes_cache_dir = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/higgs-engine/codes"
        words = {"resume": ("none", "auto", ""), "whisper_conditioning": ("off", "auto", "")}
        for name, field in FIELDS.items():
            value = getattr(self, name)
            if isinstance(value, list) and field.metadata["path"]:
                setattr(self, name, [_absolute(path) for path in value if path])
            elif field.metadata["path"] or name in words and value not in words[name]:
                setattr(self, name, _absolute(value) if value else None)
        parts = [spec.rpartition(":") for spec in self.callbacks]
        self.callbacks = [f"{_absolute(file)}:{name}" for file, _, name in parts]
        self.ds_config = find_ds_config(self.ds_config) or self.ds_config

    def check(self, found: Iterable[str] = (), excused: Collection[str] = ()) -> None:
        """Raise one ConfigError with the problems `found` in reading and those of values and paths.

        The `excused` settings are not called missing, since `found` already says why they are.
        """
        _fail_on([*found, *value_problems(self, SCHEMA), *path_problems(self, SCHEMA, excused)])

    @property
    def all_prepared(self) -> bool:
        data = [*self.train_data_file, *self.eval_data_file]
        return bool(data) and all(os.path.isfile(os.path.join(path, "header.json")) for path in data)

    @property
    def processes_per_row(self) -> int:
        """Neighbouring processes that work on the same packed row."""
        return self.sequence_parallel_size * self.tensor_parallel_size

    def with_resolved(self, world_size: int, has_gpu: bool, resumed_step: int | None = None) -> "Settings":
        """These settings with each automatic value decided for `world_size` processes.

        The step is fixed as micro-batches over all processes: any world size then repeats the same steps.

        Args:
            resumed_step: micro_batches_per_step of the run that is resumed, which goes on with the same steps.
        """
        total, each = self.micro_batches_per_step, self.gradient_accumulation_steps
        if resumed_step and total is None:
            total, each = resumed_step, None
        together = self.processes_per_row
        problems = []
        if world_size % together:
            name = "tensor_parallel_size" if self.tensor_parallel_size > 1 else "sequence_parallel_size"
            problems.append(f"{name}: {world_size} processes are not groups of {together} → a divisor of {world_size}")
        readers, who = max(world_size // together, 1), "processes" if together == 1 else "groups of processes"
        product = (each or 1) * readers
        if total and each and total != product:
            problems.append(
                f"micro_batches_per_step: {total} is not gradient_accumulation_steps × {who} = {each} × "
                f"{readers} → give only one of them, or --micro_batches_per_step {product}")
        elif total and total < readers:
            problems.append(f"micro_batches_per_step: {total} leaves some of {world_size} processes idle → "
                            f"set at least {readers}, or start at most {total * together}")
        if self.backend == "none" and world_size > 1:
            problems.append(f"backend: none is one process, not {world_size} → set it to deepspeed or fsdp")
        if world_size % self.fsdp_replicas:
            problems.append(f"fsdp_replicas: {world_size} processes cannot hold {self.fsdp_replicas} equal "
                            f"copies → a divisor of {world_size}")
        _fail_on(problems, f"the settings cannot be used with world size {world_size}")
        unlimited = self.max_tokens_per_micro_batch is None and self.per_device_train_batch_size is None
        return dataclasses.replace(
            self,
            bf16=has_gpu and self.backend != "none" if self.bf16 is None else self.bf16,
            max_tokens_per_micro_batch=8192 if unlimited else self.max_tokens_per_micro_batch,
            micro_batches_per_step=total or product,
            fsdp_reduce_once=self.use_lora if self.fsdp_reduce_once is None else self.fsdp_reduce_once,
            gradient_accumulation_steps=None,
        )

    def to_yaml(self, path: str | os.PathLike) -> None:
        """Write every setting such that `--config path` alone repeats the run; whole or not at all."""
        blocks = ["# Every setting of a run: give this file as --config to repeat it.\n"]
        for group, group_fields in groupby(FIELDS.values(), key=lambda field: field.metadata["group"]):
            values = {field.name: getattr(self, field.name) for field in group_fields}
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=math.inf)
            blocks.append(f"# {group}: {GROUPS[group]}\n{text}")
        draft = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        draft.write_text("\n".join(blocks), encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> "Settings":
        """The settings of a finished run; its model and data may be elsewhere by now: no path is checked."""
        reading = Reading(SCHEMA)
        reading.read_yaml(os.fspath(path))
        settings = cls(**reading.values)
        _fail_on([*reading.problems, *value_problems(settings, SCHEMA)])
        return settings


SCHEMA = Schema.of(Settings)
FIELDS = SCHEMA.fields


def parse(argv: list[str], prog: str = "higgs-engine train", optional: Collection[str] = ()) -> Settings:
    """Checked settings from `argv` (without the program's name); `--help` prints every setting and exits.

    Args:
        optional: settings that training requires and this command does without.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(prog), end="")
        raise SystemExit(0)
    reading = Reading(SCHEMA)
    reading.read_arguments(argv)
    settings = Settings(**reading.values)
    settings.check(reading.problems, {*reading.failed, *optional})
    return settings


def prepare_output_dir(settings: Settings) -> None:
    """Create `output_dir` if absent and prove that files can be written there."""
    try:
        os.makedirs(settings.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.output_dir):
            pass
    except OSError as error:
        problem = f"output_dir: {settings.output_dir}: {error.strerror} → give a writable folder"
        raise ConfigError("the output folder cannot be used", [problem]) from error


def help_text(prog: str) -> str:
    """`--help`: every setting once, under its group, with its unit, limits and default."""
    return config_sources.help_text(prog, SCHEMA, GROUPS)


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _fail_on(problems: list[str], heading: str = "the settings cannot be used") -> None:
    if problems:
        raise ConfigError(heading, problems)
