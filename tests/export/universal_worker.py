"""One rank of a DeepSpeed program that knows nothing of this engine: loads universal checkpoints, saves its own.

    universal_worker.py WEIGHTS UNIVERSAL OUT

For ZeRO 1, 2 and 3: a module with the parameters of the safetensors file WEIGHTS, all zero, loads UNIVERSAL. What it
holds then goes into OUT/zeroN.pt (main process), and a checkpoint of DeepSpeed's own into OUT/zeroN.
"""

import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors import safe_open
from torch import nn

RATES = (1e-3, 2e-3)
DECAYS = (0.5, 0.0)


def module_of(weights: str) -> nn.Module:
    root = nn.Module()
    with safe_open(weights, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no dict)
            *path, last = name.split(".")
            module = root
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_parameter(last, nn.Parameter(torch.zeros(opened.get_slice(name).get_shape())))
    return root


def start(module: nn.Module, stage: int):
    groups = [
        {"params": [p for p in module.parameters() if (p.ndim > 1) == matrices], "lr": rate, "weight_decay": decay}
        for matrices, rate, decay in zip((True, False), RATES, DECAYS, strict=True)
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": True},
    }
    optimizer = torch.optim.AdamW(groups)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def held(engine) -> dict[str, torch.Tensor]:
    """Every master weight and moment, whole."""
    state = {}
    for name, parameter in engine.module.named_parameters():
        state[f"model.{name}"] = safe_get_full_fp32_param(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    groups = engine.optimizer.optimizer.param_groups
    state["rates"] = torch.tensor([(group["lr"], group["weight_decay"]) for group in groups])
    steps = [float(moments["step"]) for moments in engine.optimizer.optimizer.state.values() if "step" in moments]
    state["steps"] = torch.tensor(steps)
    return state


def main() -> None:
    weights, universal, out = sys.argv[1:]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one that only inference uses
    deepspeed.init_distributed("gloo", verbose=False)
    for stage in (1, 2, 3):
        engine = start(module_of(weights), stage)
        path, client = engine.load_checkpoint(universal)
        assert path is not None and engine.global_steps == client["higgs_engine"]["step"]
        state = held(engine)
        if torch.distributed.get_rank() == 0:
            torch.save(state | {"client": client["higgs_engine"]}, Path(out) / f"zero{stage}.pt")
        engine.save_checkpoint(str(Path(out) / f"zero{stage}"))
        engine.destroy()
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
