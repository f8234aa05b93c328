"""One rank of the backend comparison: the same ten steps through each backend named, results of rank 0 to a file.

    parity_worker.py MODEL OUT CASE...      CASE: none, fsdp, zero0 … zero3_offload, with -lora (with it -dora,
                                            and -on from an adapter), -bf16, -whisper, and -tower for a trained
                                            encoder; fsdp with -hybrid, -once (reduces once a step) or -whole
                                            (keeps weights after the forward); -selective recomputation, -compiled;
                                            -sp2: two processes a row; -brief: three steps

The micro-batches of a step are chosen to be awkward: one has text only, one has audio only, and one alone is heard
through Whisper, so that of two processes one never is. The Whisper model and the adapter lie beside MODEL.
"""

import gc
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Settings
from engine.data.packing import pack
from engine.higgs_engine import HiggsEngine, Targets
from engine.model import compiled
from engine.model.weights import WeightFiles
from engine.plan.states import Sizes, states
from engine.runtime.distributed import World, exit_cleanly, init_process_group, shutdown
from tests.model.whisper_tiny import heard_sample
from tests.tiny import random_sample

STEPS, MICRO_BATCHES = 10, 4


class Collectives(TorchDispatchMode, Counter):
    """Counts the collectives that run inside, by name."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        if operation.namespace == "c10d":
            self[operation.name().split("::")[1].strip("_")] += 1
        return operation(*arguments, **(named or {}))


def micro_batches(step: int, whisper: bool = False) -> list[list]:
    rng = np.random.default_rng(step)
    kinds = [[(9, 0), (14, 0)], [(0, 21)], [(12, 18), (5, 9)], [(7, 11)]]
    batches = [[random_sample(rng, *sizes) for sizes in kind] for kind in kinds]
    if whisper:
        batches[2] = [heard_sample(rng, 12, 18, frames=90), heard_sample(rng, 5, 9, frames=33)]
    return batches


def settings_for(case: str, model: str, world_size: int) -> Settings:
    backend, *variants = case.split("-")
    lora = "lora" in variants
    settings = Settings(
        model_path=model,
        audio_tokenizer_path=model,
        train_data_file=model,
        backend="deepspeed" if backend.startswith("zero") else backend,
        ds_config=backend if backend.startswith("zero") else "zero2",
        fsdp_replicas=world_size if "hybrid" in variants else 1,
        fsdp_reduce_once="once" in variants or None,
        fsdp_reshard_after_forward="whole" not in variants,
        tensor_parallel_size=2 if "tp2" in variants else 1,
        sequence_parallel_size=2 if "sp2" in variants else 1,
        torch_compile="compiled" in variants,
        bf16="bf16" in variants,
        whisper_conditioning=str(Path(model).parent / "whisper") if "whisper" in variants else "off",
        freeze_audio_tower="tower" not in variants,
        gradient_checkpointing="selective" if "selective" in variants else "none" if "compiled" in variants else "full",
        micro_batches_per_step=MICRO_BATCHES,
        max_grad_norm=0.5,
        learning_rate=3e-3,
        weight_decay=0.01,
        use_lora=lora,
        lora_rank=4,
        lora_dropout=0.0,
        use_dora="dora" in variants,
        lora_adapter_path=str(Path(model).parent / "adapter") if "on" in variants else None,
        lora_modules_to_save=["audio_lm_head"] if lora else [],
    )
    return settings.with_resolved(world_size, has_gpu=False)


@contextmanager
def never_waiting():
    """In no micro-batch DeepSpeed waits for the device, which on a CPU would not show."""
    from deepspeed.accelerator import get_accelerator

    accelerator, waits = get_accelerator(), []
    accelerator.synchronize = lambda *_: waits.append("waited")
    try:
        yield
    finally:
        del accelerator.synchronize
    assert not waits


def piece_of(settings: Settings, world: World) -> tuple[int, int]:
    return world.rank % settings.sequence_parallel_size, settings.sequence_parallel_size


def run(case: str, model: str, world) -> dict[str, np.ndarray]:
    files = WeightFiles(model)
    settings = settings_for(case, model, world.size)
    reader, readers = world.in_groups(of=settings.processes_per_row)
    engine = HiggsEngine(settings, world, files, rounds=MICRO_BATCHES // readers)
    buffers = {name.split(".")[-1]: b.dtype for name, b in engine.backend.model.named_buffers()}
    assert buffers["inv_freq"] == torch.float32 and buffers["audio_tokens_offsets"] == torch.int64, buffers
    require_exact_masters(engine, files)
    results: dict[str, list] = {"losses": [], "grad_norms": []}
    steps = 3 if "-brief" in case else STEPS
    for step in range(steps):
        samples = micro_batches(step, "-whisper" in case)
        everything = [s for batch in samples for s in batch]
        audio = tuple(int(n) for n in sum(s.audio_targets for s in everything))
        targets = Targets(sum(s.text_targets for s in everything), audio)
        piece = piece_of(settings, world)
        mine = [pack(batch, files.config.audio_token_id, piece) for batch in samples[reader::readers]]
        # counted once, for it takes time; never compiled, for the compiler refuses to work where operations are counted
        counts = step == steps - 1 and "-compiled" not in case
        with Collectives() if counts else nullcontext({}) as collectives, never_waiting():
            sums = engine.accumulate(mine, targets)
        if case.startswith("zero1-bf16"):
            require_planned_gradients(engine)
        for name, gradient in engine.gradients():
            if step in (0, steps - 1):
                results[f"gradient {step} {name}"] = gradient.detach().float().clone().cpu().numpy()
        results["grad_norms"].append(float(engine.backend.step(1e-3 * (step + 1))))
        if world.size > 1:
            torch.distributed.all_reduce(sums)
        results["losses"].append((sums / torch.tensor([targets.text, *audio])).tolist())
    if hasattr(engine.backend, "engine"):
        engine.backend.engine.destroy()
    results |= {f"collectives of a step: {name}": number for name, number in collectives.items()}
    return {name: np.array(value) for name, value in results.items()}


def require_exact_masters(engine: HiggsEngine, files: WeightFiles) -> None:
    """What is trained starts as it is in the (fp32) files, also where the forward computes in bf16."""
    for key, fragment in engine.backend.state().items():
        name = key.removeprefix("model.")
        if name != key and name in files.shapes:
            wanted = files.read(name).reshape(-1)[fragment.start : fragment.start + len(fragment.local)]
            assert torch.equal(fragment.local, wanted), f"{name} starts rounded"


def require_planned_gradients(engine: HiggsEngine) -> None:
    """ZeRO 1 in bf16 holds as many bytes of gradients as the memory plan says, once in bf16 and once in fp32."""
    model, kept = engine.backend.model, engine.backend.engine.optimizer.fp32_groups_gradients_flat
    planned = states(Sizes.of(model, model), engine.settings, engine.world.size, on_gpu=True)
    assert sum(flat.nbytes for flat in kept) == pytest.approx(planned.lasting, rel=0.01)
    made = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert made == pytest.approx(planned.gradients - planned.lasting)


def main() -> None:
    torch.set_num_threads(1)
    # the compiler's front only, which needs no C++ compiler and is quick: tests/model/test_compiled.py has the rest
    compiled.compile_layers = partial(compiled.compile_layers, backend="aot_eager")
    model, out, *cases = sys.argv[1:]
    world = init_process_group(timeout_s=60)
    for case in cases:
        results = run(case, model, world)
        if world.is_main:
            np.savez(Path(out) / f"{case}-world{world.size}.npz", **results)
        gc.collect()
    shutdown(world)
    exit_cleanly(0)


if __name__ == "__main__":
    main()
