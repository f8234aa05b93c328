"""`backend: deepspeed`: ZeRO 0 to 3 and offload, through DeepSpeed's own engine.

The JSON file of `ds_config` holds the choices of ZeRO; batch, precision and clipping follow from the settings and
are filled in here, and a file that says otherwise is refused. What DeepSpeed gets wrong by default is set right:
gradients are summed, not averaged; clipping is written out (its default is 1.0, not off); gradients accumulate and
travel in fp32; checkpoints are the engine's own (tensors.py), not pickles that only the same processes can read.
With `tensor_parallel_size` its AutoTP cuts the layers' matrices (tensor_parallel.py).
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups as process_groups
from deepspeed.utils import safe_get_full_grad

from engine.backends.base import Backend, Blueprint
from engine.backends.guard import Guard
from engine.backends.moments import CompactAdamW
from engine.backends.tensor_parallel import CutWeights, add_up_once, autotp_section
from engine.backends.tensors import State
from engine.backends.torch_optimizer import clip_, global_norm, make_adamw, set_learning_rate, share_counters, state_of
from engine.backends.zero_state import weight_of, zero_restored, zero_state
from engine.config import Settings
from engine.errors import ConfigError
from engine.model.cut import require_divisible
from engine.model.initial import fill, fill_module, rebuild_buffers
from engine.model.trainable import optimizer_groups
from engine.runtime.distributed import World


def complete_config(settings: Settings, processes: int, rounds: int) -> dict:
    """The JSON of `ds_config` with everything in it that follows from the settings.

    Raises:
        ConfigError: the file is not JSON, or contradicts the settings or the processes (all of it is listed).
    """
    try:
        given = json.loads(Path(settings.ds_config).read_text())
    except ValueError as error:
        raise ConfigError(f"{settings.ds_config}: not valid JSON: {error}.") from None
    filled = _filled(given, settings, rounds)
    problems = list(_contradictions(given, filled, settings, processes))
    if problems:
        raise ConfigError(f"ds_config {settings.ds_config}:", problems)
    parts = settings.tensor_parallel_size
    return given | filled | ({"tensor_parallel": autotp_section(parts)} if parts > 1 else {})


def _stage(config: dict) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def _filled(given: dict, settings: Settings, rounds: int) -> dict:
    """What the settings say, in DeepSpeed's words; a file may repeat it."""
    filled = {
        "train_micro_batch_size_per_gpu": 1,  # one packed row
        "gradient_accumulation_steps": rounds,
        # without ZeRO the engine clips itself, with a norm as exact as ZeRO's
        "gradient_clipping": settings.max_grad_norm if _stage(given) else 0.0,
        "bf16": {"enabled": bool(settings.bf16)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves offloaded states too, and needs no compiler
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # else the host waits for the GPU twice in every micro-batch, to measure what is never printed
        "timers": {"throughput": {"enabled": False}},
    }
    if settings.bf16:
        filled |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return filled


def _contradictions(given: dict, filled: dict, settings: Settings, processes: int) -> Iterator[str]:
    """Problems of a file: with the settings, with the processes, with what the engine can do."""
    zero, stage, parts = given.get("zero_optimization", {}), _stage(given), settings.tensor_parallel_size
    for key, value in filled.items():
        if key in given and given[key] != value:
            yield f"{key}: {given[key]!r} contradicts {value!r} of the settings → remove it from the file"
    instead = {"optimizer": "", "scheduler": "", "fp16": "", "tensor_parallel": ", and set tensor_parallel_size"}
    for key, more in instead.items():
        if key in given:
            yield f"{key}: the engine sets it itself → remove it{more}"
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            yield f"zero_optimization.{key}.device: nvme cannot be checkpointed → cpu"
    in_node = zero.get("zero_hpz_partition_size", 1)
    if in_node > 1 and processes % min(in_node, processes):
        yield (
            f"zero_optimization.zero_hpz_partition_size: {in_node} does not divide {processes} processes "
            "→ the number of GPUs of a node, the same in each"
        )
    if parts > 1 and stage == 3:
        yield f"tensor_parallel_size: {parts}, but stage 3 wants whole matrices → zero1 or zero2, or size 1"
    if settings.torch_compile and stage == 3:
        yield "torch_compile: stage 3 fetches weights inside the layers → backend fsdp, or zero2"
    if settings.bf16 and stage == 0:
        yield "stage 0 keeps no fp32 master weights in bf16 → use zero1, or bf16: false"


class DeepSpeedBackend(Backend):
    def __init__(self, blueprint: Blueprint, settings: Settings, world: World, rounds: int):
        self.world, self.max_norm = world, settings.max_grad_norm
        self.guard, self._judged = Guard(settings.skip_spikes_sigma, world.device), True
        self.config = complete_config(settings, world.size, rounds)
        self.parts = settings.tensor_parallel_size
        require_divisible(blueprint.core.config, self.parts)
        self.stage = _stage(self.config)
        self.dtype = torch.bfloat16 if settings.bf16 else torch.float32
        self.adapters_only = settings.use_lora
        self.shapes = blueprint.shapes
        if get_accelerator().device_name() == "cpu":
            # DeepSpeed would compile a shared-memory all-reduce that only inference uses
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
        # DeepSpeed 0.19 calls all_gather_into_tensor, which torch 2.13 calls deprecated, once a process
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        self._materialise(blueprint)
        groups = optimizer_groups(blueprint.model, blueprint.decayed, settings.weight_decay)
        self.optimizer = make_adamw(groups, settings)
        self.engine, *_ = deepspeed.initialize(
            model=blueprint.model, optimizer=self.optimizer, config=self.config, dist_init_required=False
        )
        self.optimizer.register_step_pre_hook(self._judge_before_update)
        self.model = self.engine.module
        self.cuts = self._after_cutting() if self.parts > 1 else None
        if settings.bf16:
            self._fill_masters(blueprint)
        compute = "bf16 compute, fp32 master weights and reduction" if settings.bf16 else "fp32"
        over = f"{world.size} process(es)"
        if self.cuts:
            over = f"{world.size // self.parts} group(s) of {self.parts} processes (tensor parallel)"
        self.precision = f"{compute}; ZeRO stage {self.stage} over {over}"

    def _materialise(self, blueprint: Blueprint) -> None:
        if self.stage < 3:
            fill(blueprint.model, blueprint.weights, self.world.device, self.dtype)
            rebuild_buffers(blueprint.core, self.world.device)
            return
        # Init makes ZeRO++'s group of a node at its first call and must be given it at the others
        in_node = self.config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        # one layer exists whole at a time; the rest of the model comes last
        prefixes = {module: name for name, module in blueprint.model.named_modules()}
        for unit in [*blueprint.layers, blueprint.model]:
            for module in unit.modules():
                if any(p.is_meta for p in module.parameters(recurse=False)):
                    fill_module(module, prefixes[module], blueprint.weights, self.world.device, self.dtype)
            group = process_groups._get_zero_param_intra_parallel_group() if in_node else None
            deepspeed.zero.Init(
                module=unit, config_dict_or_path=self.config, dtype=self.dtype, zero_param_parallel_group=group
            )
        rebuild_buffers(blueprint.core, self.world.device)

    def _after_cutting(self) -> CutWeights:
        # it would pickle the first row and send it through the group; the batch plan gives a group the same rows
        self.engine.first_dataloader_check.remove()
        group = process_groups.get_tensor_model_parallel_group()
        add_up_once(self.model, group)
        split = self._trained() if self.stage else set()
        return CutWeights(self.model, self.shapes, self.world, self.parts, group, split)

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _fill_masters(self, blueprint: Blueprint) -> None:
        """DeepSpeed makes the fp32 masters of weights already rounded; they start as exact as the files are."""
        trained, state = self._trained(), self.state()
        for key, fragment in state.items():
            kind, _, name = key.partition(".")
            if kind != "model" or name not in trained or not len(fragment.local):
                continue
            shape, stop = self.shapes[name], fragment.start + len(fragment.local)
            row = shape[1:].numel()
            first = fragment.start // row
            rows = blueprint.weights.read(name, shape, first, -(-stop // row)).reshape(-1)
            fragment.local.copy_(rows[fragment.start - first * row : stop - first * row])
        self.restored(state)

    def forward(self, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.engine(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed averages over groups of processes and, unless told not to, over accumulation rounds; the engine sums
        self.engine.backward(loss * (self.world.size // self.parts), scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self, learning_rate: float) -> torch.Tensor:
        set_learning_rate(self.optimizer, learning_rate)
        if self.stage:
            self._judged = False
            self.engine.step()
            if not self._judged:  # in fp32, and always in stage 3, DeepSpeed leaves out what is not finite by itself
                self._judge(self._norm_of_zero())
                if isinstance(self.optimizer, CompactAdamW):
                    self.optimizer.skip()
            return self._norm_of_zero()
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        gradients = list(named.values())
        norm = self.cuts.norm(named) if self.cuts else global_norm(gradients, self.world.device)
        self._judge(norm)
        clip_(gradients, norm, self.max_norm)
        self.engine.step()
        return norm

    def _norm_of_zero(self) -> torch.Tensor:
        """Which DeepSpeed finds within its step, before the update."""
        return torch.as_tensor(self.engine.optimizer._global_grad_norm, dtype=torch.float32, device=self.world.device)

    def _judge(self, norm: torch.Tensor) -> None:
        self.optimizer.found_inf = self.guard.judge(norm)
        self._judged = True

    def _judge_before_update(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """ZeRO updates one group of weights after the other; the first of a step asks for all."""
        if not self._judged:
            self._judge(self._norm_of_zero())
        # where masters are in host memory, AdamW would copy without waiting for the copy
        updated = next(p for group in optimizer.param_groups for p in group["params"])
        optimizer.found_inf = optimizer.found_inf.to(updated.device)

    def discard(self) -> None:
        # DeepSpeed clears what it has gathered in a step of its own, in which AdamW has to do nothing
        self.optimizer.step = lambda closure=None: None
        try:
            self.engine.step()
        finally:
            del self.optimizer.step

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = safe_get_full_grad(parameter)
            if self.cuts:
                yield name, self.cuts.whole(name, gradient.view(parameter.shape))
            else:
                yield name, gradient.view(self.shapes[name])

    @property
    def is_whole(self) -> bool:
        return self.stage < 3 and self.cuts is None

    def full_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            if self.cuts:
                yield name, self.cuts.whole(name, parameter.detach()).to(dtype)
            elif self.stage < 3 or parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones always are
                yield name, parameter.detach().to(dtype)
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach().to(dtype)

    def local_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight_of(p, p.numel()).local) for name, p in self.model.named_parameters())

    def state(self) -> State:
        state = self._own_state()
        return self.cuts.widened(state) if self.cuts else state

    def _own_state(self) -> State:
        """Fragments of what this process has, as views."""
        if not self.stage:
            return state_of(self.stored(), self.optimizer, self.guard)
        shapes = self.cuts.shapes if self.cuts else self.shapes
        return zero_state(self.stored(), shapes, self.engine.optimizer, self.optimizer, self.guard)

    def restored(self, state: State) -> None:
        if self.cuts:
            self.cuts.write_back(state, self._own_state())
        if self.stage:
            zero_restored(self.engine.optimizer, self.optimizer, self.guard)
        else:
            share_counters(self.optimizer, self.guard)
