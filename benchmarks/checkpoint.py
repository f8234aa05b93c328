"""Checkpoints: how long training stands still for one, and what it takes to turn one into a model.

    save         N processes train a little and save, first in the foreground and then behind the training: seconds
                 that training waited, seconds until the checkpoint had its name, and the ratio of the two waits
    consolidate  a checkpoint of random fp32 weights, written by N processes, becomes a bf16 model by `higgs-engine
                 consolidate` in a process of its own: seconds, and its peak memory against a bound

Both write real checkpoints through the engine's own Saver, hashes and flushes to the disk included. The processes
are started here, on the CPU by gloo or one on each GPU. The defaults take a minute and 2 GB of disk.
"""

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

import engine
from benchmarks.measured import Result, table_line
from benchmarks.stopwatch import hardware
from engine.model.initial import build_on_meta

GEOMETRIES = {
    "tiny": dict(hidden_size=64, intermediate_size=96, layers=1, heads=1),
    "small": dict(hidden_size=128, intermediate_size=352, layers=4, heads=2),
    "released": dict(hidden_size=3072, intermediate_size=8192, layers=28, heads=24),
}
"""Vocabulary and codebooks are the real ones in each: 128256 and 8 x 1026."""

EXAMPLES = """
The released size:
  python -m benchmarks.checkpoint save --geometry released --processes 8           8 GPUs, 200 GB of disk
  python -m benchmarks.checkpoint consolidate --geometry released --processes 4    CPU, 35 GB of disk
"""


def parse_arguments() -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=Formatter)
    add = parser.add_argument
    add("part", choices=("save", "consolidate"), help="what is measured")
    add("--geometry", choices=GEOMETRIES, default="small", help="size of the model")
    add("--processes", type=int, default=2, metavar="N", help="that write together")
    add("--repeats", type=int, default=3, metavar="N", help="timed saves of each kind; consolidate: runs")
    add("--backends", nargs="+", choices=("fsdp", "deepspeed"), default=["fsdp", "deepspeed"], help="of save")
    add("--ds_config", default="zero2", metavar="NAME", help="of the backend deepspeed")
    add("--folder", type=Path, metavar="DIR", help="disk that is written to; none: the system's temporary folder")
    add("--out", type=Path, metavar="FILE", help="JSON to write; none: named after device and day in results/")
    args = parser.parse_args()
    size = GEOMETRIES[args.geometry]
    args.config = {
        "hidden_size": size["hidden_size"], "intermediate_size": size["intermediate_size"],
        "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
        "num_key_value_heads": max(1, size["heads"] // 3), "head_dim": size["hidden_size"] // size["heads"],
        "codebook_size": 1026,
    }  # fmt: skip
    return args


def start(role: str, folder: Path, args: argparse.Namespace) -> None:
    """Runs benchmarks.checkpoint_workers on N processes, with what a launcher would tell them, to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "out")}
    command = [sys.executable, "-m", "benchmarks.checkpoint_workers", role, str(folder), json.dumps(settings)]
    processes = []
    for rank in range(args.processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(args.processes))
        output = None if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=os.environ | place, stdout=output))
    if any([process.wait() for process in processes]):
        raise SystemExit(f"{role}: a process failed (see above)")


# ---------------------------------------------------------------- save


def measure_save(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Result], dict[str, bool]]:
    start("save", folder, args)
    results, checks = {}, {}
    for backend, found in json.loads((folder / "save.json").read_text()).items():
        for mode in ("sync", "async"):
            one, title = found[mode], f"{backend}, {mode}"
            results[f"{backend}_{mode}_stall"] = Result(f"{title}: training waits", "s", one["stall"])
            results[f"{backend}_{mode}_first"] = Result(f"{title}: likewise for the first", "s", [one["first_stall"]])
            results[f"{backend}_{mode}_total"] = Result(f"{title}: until it has its name", "s", one["total"])
            speed = [one["bytes"] / 1e6 / seconds for seconds in one["total"]]
            results[f"{backend}_{mode}_speed"] = Result(f"{title}: written", "MB/s", speed)
            checks[f"{backend}_{mode}_published"] = len(one["total"]) == args.repeats
        stalls = [results[f"{backend}_{mode}_stall"].median for mode in ("async", "sync")]
        results[f"{backend}_ratio"] = Result(
            f"{backend}: async waits, of what sync does", "%", [100 * stalls[0] / stalls[1]]
        )
        results[f"{backend}_bytes"] = Result(f"{backend}: a checkpoint", "MB", [found["sync"]["bytes"] / 1e6])
        undisturbed = Result(f"{backend}: a step, nothing being written", "s", found["undisturbed"])
        results |= {f"{backend}_step": undisturbed}
        beside = found["async"]["step"]
        results[f"{backend}_step_beside"] = Result(f"{backend}: a step beside a save", "s", [beside])
    return results, checks


# ---------------------------------------------------------------- consolidate


def measure_consolidate(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Result], dict[str, bool]]:
    config = transformers.HiggsAudioV2Config(**args.config)
    sizes = [4 * p.numel() for p in build_on_meta(config).parameters()]
    began = time.perf_counter()
    start("make", folder, args)
    print(f"{sum(sizes) / 1e9:,.2f} GB of weights written in {time.perf_counter() - began:,.0f} s", flush=True)
    runs = [_consolidate(folder / "checkpoint-1", folder / f"model-{number}") for number in range(args.repeats)]
    bound = (3 * max(sizes) + 2**30) / 2**20
    seconds, peaks = zip(*runs, strict=True)
    results = {
        "tensors": Result("tensors", "", [len(sizes)]),
        "weights": Result("weights, fp32", "GB", [sum(sizes) / 1e9]),
        "largest": Result("largest tensor, fp32", "MiB", [max(sizes) / 2**20]),
        "seconds": Result("consolidate, verified", "s", list(seconds)),
        "speed": Result("of the checkpoint", "GB/s", [sum(sizes) / 1e9 / s for s in seconds]),
        "peak": Result("peak resident memory", "MiB", list(peaks), ("<", bound)),
    }
    return results, {"consolidated": True}


def _consolidate(checkpoint: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak resident size, in MiB, of the command in a process of its own."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "engine", "consolidate", str(checkpoint), "--out", str(out)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("consolidate failed (see above)")
    seconds = time.perf_counter() - began
    for file in out.iterdir():  # the next run needs its place
        file.unlink()
    return seconds, usage.ru_maxrss / 1024


# ---------------------------------------------------------------- report


def print_table(report: dict) -> None:
    settings, machine = report["settings"], report["hardware"]
    print(f"\n{machine['device']}; {settings['geometry']} geometry, {settings['processes']} processes\n")
    print("| what | median (min – max) | unit | target | |")
    print("|---|---:|---|---:|---|")
    for result in report["results"].values():
        print(table_line(result))


def main() -> None:
    args = parse_arguments()
    measure = {"save": measure_save, "consolidate": measure_consolidate}[args.part]
    with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=args.folder) as folder:
        results, checks = measure(args, Path(folder))
    machine = hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": machine,
        "versions": {
            "engine": engine.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "folder")},
        "check": {"passed": all(checks.values()), **checks},
        "results": {name: result.as_dict() for name, result in results.items()},
    }  # fmt: skip
    print_table(report)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower().replace("(r)", "")).strip("-")
    name = f"checkpoint_{args.part}_{args.geometry}_{slug}_{report['date']}.json"
    out = args.out or Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
