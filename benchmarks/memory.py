"""The memory plan against what training holds at its peak.

    python -m benchmarks.memory                     a small geometry on a CPU, about three minutes
    python -m benchmarks.memory --geometry released --backends fsdp zero2 --tokens 16384      one GPU

Each case is a process of its own, which builds the engine with random weights and takes three steps of two rows.
Measured is what it holds at the peak beyond what it held before the engine was made: allocated on a GPU, resident on a
CPU (Linux). There every block is mapped by itself, so that what is freed is given back and the peak is not the
allocator's. The plan is asked for exactly that row; the reserve for CUDA's own memory is left out of both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.random_weights import GEOMETRIES, RandomWeights, configuration
from benchmarks.stopwatch import PeakMemory, hardware, slug, versions
from engine.config import Settings
from engine.data.packing import PackedBatch
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.recompute import MODES
from engine.plan.activations import Row
from engine.plan.memory import Planner
from engine.runtime.distributed import exit_cleanly, init_process_group, shutdown

STEPS, ROWS = 3, 2
LIMIT = 0.1
"""What the plan may be off by."""


def settings_of(args: argparse.Namespace, backend: str, mode: str, on_gpu: bool) -> Settings:
    zero = backend.startswith("zero")
    return Settings(
        backend="deepspeed" if zero else backend, ds_config=backend if zero else "zero2", gradient_checkpointing=mode,
        bf16=on_gpu if args.bf16 is None else args.bf16, use_lora=args.use_lora, micro_batches_per_step=ROWS,
        max_tokens_per_micro_batch=args.tokens, whisper_conditioning="off",
    ).with_resolved(1, on_gpu)  # fmt: skip


def row_of(tokens: int) -> Row:
    """Speech in the usual shares; few text positions have a label."""
    return Row(tokens, round(0.9 * tokens), max(tokens // 256, 1), round(0.5 * tokens))


def batch_of(row: Row, config, seed: int) -> PackedBatch:
    """Random ids in random order, four samples."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, shape, generator=generator)

    order = torch.randperm(row.tokens, generator=generator)
    lengths = tuple(len(part) for part in np.array_split(np.arange(row.tokens), 4))
    text, codebooks = row.tokens - row.audio, config.num_codebooks
    return PackedBatch(
        text_ids=draw(config.vocab_size, text), audio_ids=draw(config.codebook_size, row.audio, codebooks),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[order],
        to_sequence=torch.argsort(order), to_modality=order, sample_lengths=lengths,
        sample_ends=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        text_target_rows=draw(text, row.text_targets), text_targets=draw(config.vocab_size, row.text_targets),
        audio_target_rows=text + draw(row.audio, row.audio_targets),
        audio_targets=draw(config.codebook_size, row.audio_targets, codebooks),
        mels=torch.zeros(0, 0, 0), mel_frames=draw(1, 0), whisper_index=draw(1, 0), whisper_rows=draw(1, 0),
    )  # fmt: skip


def measure(args: argparse.Namespace, backend: str, mode: str) -> dict[str, float]:
    """One case, in this process."""
    torch.set_num_threads(1)
    world, config = init_process_group(), configuration(args.geometry)
    on_gpu, row = world.device.type == "cuda", row_of(args.tokens)
    settings = settings_of(args, backend, mode, on_gpu)
    plan = Planner(config, on_gpu).plan(settings, 1, row, mode)
    peak = PeakMemory(world.device)
    files = RandomWeights(config, world.device, seed=0)
    engine = HiggsEngine(settings, world, files, ROWS, row)
    peak.restart()
    targets = Targets(ROWS * row.text_targets, (ROWS * row.audio_targets,) * config.num_codebooks)
    for step in range(STEPS):
        engine.train_step([batch_of(row, config, ROWS * step + i) for i in range(ROWS)], targets, 1e-5)
    found = {"planned": plan.peak - plan.overhead, "measured": peak.added(), "parts": plan.parts}
    shutdown(world)
    return found


def in_a_process(arguments: list[str], case: str) -> dict[str, float]:
    # 64 KiB and more straight from the system and back to it; one thread
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        command = [sys.executable, "-m", "benchmarks.memory", *arguments, "--case", case, "--out", str(out)]
        done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"{case} failed:\n{done.stdout[-3000:]}")
        return json.loads(out.read_text())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--geometry", choices=GEOMETRIES, default="small")
    add("--tokens", type=int, default=4096, help="of a row")
    add("--backends", nargs="+", default=["none", "fsdp"], help="none, fsdp, zero1, zero2, zero3")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--use_lora", action="store_true")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    add("--out", type=Path, help="JSON to write; default: benchmarks/results/memory_HARDWARE_DATE.json")
    add("--case", help=argparse.SUPPRESS)
    return made


def main() -> None:
    args = parser().parse_args()
    if args.case:
        args.out.write_text(json.dumps(measure(args, *args.case.split("/"))))
        exit_cleanly(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    print("| backend, checkpointing | planned, MiB | measured, MiB | plan / measured |\n|---|---:|---:|---:|")
    for case in (f"{backend}/{mode}" for backend in args.backends for mode in args.modes):
        found = results[case] = in_a_process(sys.argv[1:], case)
        found["ratio"] = found["planned"] / found["measured"]
        planned, measured = (found[name] / 2**20 for name in ("planned", "measured"))
        print(f"| {case.replace('/', ', ')} | {planned:,.0f} | {measured:,.0f} | {found['ratio']:.2f} |", flush=True)
    passed = all(abs(found["ratio"] - 1) <= LIMIT for found in results.values())
    machine = hardware(device)
    report = {
        "date": date.today().isoformat(), "hardware": machine, "versions": versions(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "case")},
        "check": {"passed": passed, "limit": LIMIT}, "results": results,
    }  # fmt: skip
    out = args.out or Path(__file__).parent / "results" / f"memory_{slug(machine['device'])}_{report['date']}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{'within' if passed else 'NOT within'} {LIMIT:.0%}; {out}")


if __name__ == "__main__":
    main()
