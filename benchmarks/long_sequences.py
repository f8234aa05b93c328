"""Memory of long samples: does a token of a row of 32k take more than one of a row of 4k, and what do pieces save?

    OMP_NUM_THREADS=1 python -m benchmarks.long_sequences        a CPU, some ten minutes; --lengths 3072 4096: one

Planned: what the memory plan counts of a row that is one sample, of the released geometry in bf16, by checkpointing
mode and by the number of processes that share the row (`sequence_parallel_size`). Measured: what a step of a small
geometry holds at its peak (resident, Linux) in one process and in two that share the row, less what it holds for a row
of `SHORTEST` tokens, so that what does not grow (gradients, a chunk of logits) is not in what a token takes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from transformers import HiggsAudioV2Config

from benchmarks.random_weights import RandomWeights, configuration
from benchmarks.stopwatch import PeakMemory, hardware, slug, versions
from engine.config import Settings
from engine.higgs_engine import HiggsEngine, Targets
from engine.model.recompute import MODES
from engine.plan.activations import Row, count, fake_row
from engine.runtime.distributed import exit_cleanly, init_process_group, shutdown

LENGTHS, PIECES, MEASURED_PIECES, SHORTEST = (4096, 8192, 16384, 32768), (1, 2, 4, 8), (1, 2), 2048
LIMIT = 0.1
"""How much more a token of any row may take than one of the row before it in the list: flat is what is promised."""


def row_of(tokens: int) -> Row:
    """Speech in the usual shares; few text positions have a label."""
    return Row(tokens, round(0.9 * tokens), tokens // 256, round(0.5 * tokens))


def settings_of(pieces: int, mode: str, bf16: bool) -> Settings:
    return Settings(
        backend="fsdp", sequence_parallel_size=pieces, gradient_checkpointing=mode, bf16=bf16,
        whisper_conditioning="off",
    ).with_resolved(pieces, has_gpu=False)  # fmt: skip


def planned(lengths: list[int]) -> dict[str, dict]:
    """`MODE, pieces N` -> tokens of the row -> activations and logits of one process at the peak, over those tokens."""
    config, found = configuration("released"), {}
    for mode in MODES:
        for pieces in PIECES:
            settings = settings_of(pieces, mode, bf16=True)
            found[f"{mode}, pieces {pieces}"] = {n: count(config, settings, mode, row_of(n)).peak / n for n in lengths}
    return found


def measure(lengths: list[int]) -> dict[int, float] | None:
    """tokens of the row -> bytes of a token, in this process of those that share it; None on all but the first."""
    torch.set_num_threads(1)
    world = init_process_group()
    config = HiggsAudioV2Config(
        vocab_size=4096, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, codebook_size=130, pad_token_id=1,
    )  # fmt: skip
    engine = HiggsEngine(settings_of(world.size, "none", bf16=False), world, RandomWeights(config, world.device, 0), 1)
    held = {}
    for tokens in (SHORTEST, SHORTEST, *lengths):  # the first makes the optimizer's state
        row = row_of(tokens)
        targets = Targets(row.text_targets, (row.audio_targets,) * config.num_codebooks)
        batch = fake_row(row.piece(world.size), config.num_codebooks, world.size)
        memory = PeakMemory(world.device)
        memory.restart()
        engine.train_step([batch], targets, 1e-5)
        held[tokens] = memory.added()
    shutdown(world)
    least = held.pop(SHORTEST)
    return {n: (bytes - least) / (n - SHORTEST) for n, bytes in held.items()} if world.is_main else None


def in_processes(number: int, lengths: list[int]) -> dict[int, float]:
    # 64 KiB and more straight from the system and back to it
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "-m"]
        words = ["benchmarks.long_sequences", "--measure", "--lengths", *map(str, lengths), "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, *words], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{number} processes failed:\n{done.stdout[-3000:]}")
        return {int(n): bytes for n, bytes in json.loads(out.read_text()).items()}


def flat(of_a_token: dict[int, float]) -> bool:
    values = [of_a_token[n] for n in sorted(of_a_token)]
    return all(after <= (1 + LIMIT) * before for before, after in zip(values, values[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row that is one sample")
    parser.add_argument("--out", type=Path, help="JSON to write; default: results/long_sequences_HARDWARE_DATE.json")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        if found := measure(args.lengths):
            args.out.write_text(json.dumps(found))
        exit_cleanly(0)
    results = {f"measured, pieces {n}": in_processes(n, args.lengths) for n in MEASURED_PIECES}
    results |= {f"planned, {name}": found for name, found in planned(args.lengths).items()}
    print("| KiB of a process for each token of the row | " + " | ".join(f"{n:,}" for n in args.lengths) + " |")
    print("|---|" + "---:|" * len(args.lengths))
    for name, of_a_token in results.items():
        print(f"| {name} | " + " | ".join(f"{bytes / 1024:,.1f}" for bytes in of_a_token.values()) + " |")
    passed, machine = all(map(flat, results.values())), hardware(torch.device("cpu"))
    report = {
        "date": date.today().isoformat(), "hardware": machine, "versions": versions(),
        "settings": {"lengths": args.lengths, "shortest": SHORTEST},
        "check": {"passed": passed, "limit": LIMIT}, "results": results,
    }  # fmt: skip
    name = f"long_sequences_{slug(machine['device'])}_{report['date']}.json"
    out = args.out or Path(__file__).parent / "results" / name
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{'flat' if passed else 'NOT flat'} within {LIMIT:.0%}; {out}")


if __name__ == "__main__":
    main()
