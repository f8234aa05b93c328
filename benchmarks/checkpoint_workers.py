"""One process of the checkpoint benchmark: trains a little and saves, or writes a checkpoint of random tensors.

    python -m benchmarks.checkpoint_workers save|make FOLDER JSON       started N times, as a launcher would

`save` measures how long training stands still, and writes its numbers to FOLDER/save.json; `make` leaves
FOLDER/checkpoint-1. JSON holds the arguments of benchmarks.checkpoint.
"""

import argparse
import gc
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import HiggsAudioV2Config

from benchmarks.length_mix import make_samples
from engine.backends.tensors import Fragment, State
from engine.checkpoint.lifecycle import checkpoints
from engine.checkpoint.manifest import Manifest, versions
from engine.checkpoint.saver import Saver
from engine.config import Settings
from engine.data.packing import pack
from engine.export.model_folder import MAX_SHARD_BYTES, generation_defaults
from engine.export.shards import write_shards
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.initial import build_on_meta
from engine.model.safetensors_writer import Spec
from engine.model.weights import WeightFiles
from engine.runtime.distributed import World, exit_cleanly, init_process_group, shutdown, wait_for_all

STD = 0.02
WRITTEN_BESIDE = 3
"""Steps that are timed while a save is being written."""


def random_model(folder: Path, config: HiggsAudioV2Config) -> None:
    """A native model folder of random bf16 weights, a tensor in memory at a time."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    specs = {name: Spec(tuple(p.shape), torch.bfloat16) for name, p in build_on_meta(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        shape = specs[name].shape
        return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * STD

    write_shards(folder, specs, read, MAX_SHARD_BYTES)


def _manifest(settings: Settings, world: World, step: int, shapes: dict[str, list[int]]) -> Manifest:
    return Manifest(
        step=step, epoch=0, tokens_seen=0, backend=settings.backend, world_size=world.size, use_lora=False, base="",
        plan={}, settings=asdict(settings), versions=versions(), shapes=shapes,
    )  # fmt: skip


# ---------------------------------------------------------------- how long training stands still


def save(args: argparse.Namespace, config: HiggsAudioV2Config, folder: Path, world: World) -> None:
    if world.is_main:
        random_model(folder / "model", config)
    wait_for_all("model")
    measured = {}
    for backend in args.backends:
        measured[backend] = _measured(args, folder, world, backend)
        gc.collect()
    if world.is_main:
        (folder / "save.json").write_text(json.dumps(measured))


def _measured(args: argparse.Namespace, folder: Path, world: World, backend: str) -> dict:
    """Seconds of every save of a backend, first in the foreground and then behind the training."""
    model = str(folder / "model")
    settings = Settings(
        model_path=model, audio_tokenizer_path=model, train_data_file=model, backend=backend, ds_config=args.ds_config,
        micro_batches_per_step=world.size,
    ).with_resolved(world.size, world.device.type == "cuda")  # fmt: skip
    files = WeightFiles(model)
    engine = HiggsEngine(settings, world, files, rounds=1)
    sample = make_samples(files.config, 1, seconds=6.0, seed=world.rank)[0]
    targets = Targets(1000, (1000,) * files.config.num_codebooks)  # what the loss is, does not matter here

    def step() -> float:
        began = time.perf_counter()
        engine.train_step([pack([sample], files.config.audio_token_id)], targets, 1e-5).grad_norm.item()
        return time.perf_counter() - began

    step()  # AdamW's moments are made in the first
    measured = {"undisturbed": [step() for _ in range(WRITTEN_BESIDE)]}
    for mode in ("sync", "async"):
        measured[mode] = _saves(args, folder / f"{backend}-{mode}", world, settings, engine, step, mode == "async")
    if hasattr(engine.backend, "engine"):
        engine.backend.engine.destroy()
    return measured


def _saves(args, out: Path, world: World, settings: Settings, engine: HiggsEngine, step, background: bool) -> dict:
    """One save more than is asked for: the first of a run also makes the buffers of the copy."""
    if world.is_main:
        out.mkdir()
    wait_for_all(out.name)
    saved, stalls, beside = [], [], []
    saver = Saver(
        out, world, limit=1, keep_every=None, background=background, say=lambda line: sys.exit(line), done=saved.append
    )
    for number in range(args.repeats + 1):
        manifest = _manifest(settings, world, number + 1, engine.stored_shapes())
        saver.save(manifest, engine.state(), lambda folder, manifest: None)
        stalls.append(saver.waited)
        beside += [step() for _ in range(WRITTEN_BESIDE)] if background else []
        saver.wait()
    saver.finish()
    shutil.rmtree(out) if world.is_main else None
    return {
        "first_stall": stalls[0], "stall": stalls[1:], "total": [s.seconds for s in saved[1:]],
        "bytes": saved[-1].bytes if saved else 0, "step": statistics.median(beside) if beside else None,
    }  # fmt: skip


# ---------------------------------------------------------------- a checkpoint to consolidate


def make(args: argparse.Namespace, config: HiggsAudioV2Config, folder: Path, world: World) -> None:
    """Every process writes its even share of every weight: stretches of one and the same random block."""
    shapes = {name: p.shape for name, p in build_on_meta(config).named_parameters()}
    longest = max(-(-shape.numel() // world.size) for shape in shapes.values())
    block = torch.randn(longest, generator=torch.Generator().manual_seed(world.rank)).mul_(STD)
    state: State = {"step": Fragment.whole(torch.ones(()))}
    for name, shape in shapes.items():
        start, stop = (shape.numel() * rank // world.size for rank in (world.rank, world.rank + 1))
        state[f"model.{name}"] = Fragment(block[: stop - start], start, shape.numel())
    settings = Settings(bf16=True, backend="fsdp")

    def write_once(draft: Path, manifest: Manifest) -> None:
        settings.to_yaml(draft / "config.yaml")
        (draft / "model_files").mkdir()
        config.save_pretrained(draft / "model_files")
        generation_defaults(config).save_pretrained(draft / "model_files")

    saver = Saver(folder, world, limit=None, keep_every=None, background=False, say=lambda line: sys.exit(line))
    saver.save(_manifest(settings, world, 1, {name: list(shape) for name, shape in shapes.items()}), state, write_once)
    saver.finish()
    assert not world.is_main or checkpoints(folder)


def main() -> None:
    role, folder = {"save": save, "make": make}[sys.argv[1]], Path(sys.argv[2])
    args = argparse.Namespace(**json.loads(sys.argv[3]))
    world = init_process_group(timeout_s=1800)
    role(args, HiggsAudioV2Config(**args.config), folder, world)
    shutdown(world)
    exit_cleanly(0)


if __name__ == "__main__":
    main()
