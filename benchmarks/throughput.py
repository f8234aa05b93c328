"""Training throughput: tokens and audio a second, MFU and HFU, memory, and where the time of a step goes.

Trains Higgs Audio v2 with random weights on made-up voice cloning samples of log-normal lengths. Before anything is
timed, its loss and gradients are compared with those of transformers' own forward. Every switch of the engine is a
flag here too: `--backend fsdp --attention varlen --gradient_checkpointing none --ds_config zero1`.

With `--table`, one change a row: transformers padded, with and without gradient checkpointing, in the HF Trainer,
packed; then this engine and its switches. Rows take turns, each turn begins with another one, each builds its model
afresh; medians are reported.

The defaults take a minute on a CPU, the table twenty. Several processes are started by any launcher (not with --table).
"""

import argparse
import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers.utils import logging as transformers_log

from benchmarks.contenders import Job
from benchmarks.ladder import Row, ladder
from benchmarks.length_mix import describe_mix, make_samples
from benchmarks.random_weights import GEOMETRIES, RandomWeights, configuration
from benchmarks.rates import flops_of, print_report, step_seconds, summarise
from benchmarks.stopwatch import PeakMemory, Stopwatch, hardware, slug, versions
from benchmarks.throughput_plot import svg
from engine.config import FIELDS, SCHEMA, Settings
from engine.config_sources import Reading
from engine.data.batches import BatchPlan, Step
from engine.data.labels import Sample
from engine.errors import ConfigError
from engine.model.flops import Parameters, peak_flops
from engine.runtime.distributed import World, exit_cleanly, init_process_group, shutdown

CHECKED_SAMPLES = 3
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TOLERANCES = {False: (1e-5, 1e-4), True: (1e-2, 5e-2)}
"""In fp32 and in bf16: of the loss (relative) and of the gradients (norm of the difference by norm)."""

EXAMPLES = """
One GPU, the released size:
  python -m benchmarks.throughput --geometry released --gradient_checkpointing none
  python -m benchmarks.throughput --geometry released --table
Eight GPUs:
  torchrun --nproc_per_node 8 -m benchmarks.throughput --geometry released --backend deepspeed --ds_config zero2
"""


def parse_arguments(gpu: bool) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own arguments, and the rest, which are settings of the engine."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="released" if gpu else "small", help="size of the model")
    add("--mode", choices=("full", "lora"), default="full", help="what is trained")
    add("--table", action="store_true", help="measure the ladder instead of one configuration")
    add("--rows", nargs="+", metavar="NAME", help="rows of the table; none: all that run here")
    add(
        "--tokens",
        type=int,
        metavar="N",
        help="limit of a micro-batch; none: 4096 in a table, else 16384 on a GPU and 2048 on a CPU",
    )
    add("--seconds", type=float, default=4.5, metavar="S", help="median length of a clip; two clips a sample")
    add("--steps", type=int, metavar="N", help="timed steps (of each turn); none: 10 on a GPU, 3 else, 1 in a table")
    add("--warmup", type=int, default=3 if gpu else 1, metavar="N", help="steps before them (CPU: one short sample)")
    add("--turns", type=int, default=3, metavar="N", help="turns of the table")
    add("--clock", choices=CLOCKS, default="wall", help="of a CPU; processor: time that other programs do not lengthen")
    add("--out", type=Path, metavar="FILE", help="JSON to write; none: named after device and day in results/")
    args, rest = parser.parse_known_args()
    args.tokens = args.tokens or (4096 if args.table else 16384 if gpu else 2048)
    args.turns = args.turns if args.table else 1
    args.steps = args.steps or (10 if gpu else 1 if args.table else 3)
    return args, rest


def read_settings(args: argparse.Namespace, rest: Sequence[str], world: World) -> Settings:
    """The engine's settings; those of the loss make it transformers' own: all nine means added up."""
    gpu = world.device.type == "cuda"
    reading = Reading(SCHEMA)
    reading.read_arguments(rest)
    parallel = gpu or world.size > 1
    chosen = {"backend": "fsdp" if parallel else "none", "dataloader_num_workers": 2 if gpu else 0}
    chosen |= {"lora_dropout": 0.0, "whisper_conditioning": "off"} | reading.values
    fixed = {"use_lora": args.mode == "lora", "max_tokens_per_micro_batch": args.tokens, "audio_loss_weight": 8.0}
    settings = Settings(**chosen | fixed)
    settings.check(reading.problems, {*reading.failed, "model_path", "audio_tokenizer_path", "train_data_file"})
    return settings.with_resolved(world.size, gpu)


# ---------------------------------------------------------------- the work


def make_work(args: argparse.Namespace, settings: Settings, files: RandomWeights) -> tuple[list[Sample], list[Step]]:
    """Samples, and full steps of them for the timed steps of all turns.

    Of twice as many rows the fuller half: so short a plan ends with rows that found too few samples, a long one has
    hardly any.
    """
    per_step, wanted = settings.micro_batches_per_step, args.steps * args.turns
    count = per_step * wanted
    while True:
        samples = make_samples(files.config, count, args.seconds, settings.seed)
        kept = [s for s in samples if len(s) <= args.tokens]
        if not kept:
            raise SystemExit(f"--tokens {args.tokens}: every sample is longer → more tokens, or fewer --seconds")
        plan = BatchPlan(
            [len(s) for s in kept], max_tokens=args.tokens, max_samples=None, micro_batches_per_step=1, epochs=1,
            seed=settings.seed,
        )  # fmt: skip
        rows = [step.micro_batches[0] for step in plan.steps()]
        if len(rows) >= 2 * per_step * wanted:
            break
        count = count * 3 // 2 + 1
    tokens = [sum(len(kept[i]) for i in row) for row in rows]
    fuller = [row for row, filled in zip(rows, tokens, strict=True) if filled >= statistics.median(tokens)]
    starts = range(0, wanted * per_step, per_step)
    return kept, [Step(number, 0, tuple(fuller[at : at + per_step])) for number, at in enumerate(starts)]


def short_step(samples: Sequence[Sample], count: int, processes: int) -> Step:
    """The shortest samples, a micro-batch for each process: ragged lengths in a step that takes no time."""
    shortest = sorted(range(len(samples)), key=lambda i: len(samples[i]))[:count]
    return Step(0, 0, tuple(tuple(shortest[rank::processes]) for rank in range(min(processes, len(shortest)))))


# ---------------------------------------------------------------- the comparison


def check(rows: Sequence[Row], job: Job) -> dict:
    """Loss and gradients of every row against transformers' padded forward, on the shortest samples.

    Raises:
        SystemExit: a row is another function.
    """
    step = short_step(job.samples, CHECKED_SAMPLES, job.world.in_groups(of=job.settings.processes_per_row)[1])
    reference = Row("reference", "transformers, padded", native={})
    losses, differences, wanted = {}, {}, {}
    for row in (reference, *rows):
        contender = row.build(job)
        losses[row.name], gradients = contender.loss_and_gradients(step)
        square = 0.0
        for name, gradient in gradients:
            # kept on the host: next to a model in training there is no room for another's gradients
            expected = wanted.setdefault(name, gradient.detach().to("cpu", copy=True)).to(gradient.device)
            square += float((gradient - expected).double().square().sum())
        if row is reference:
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in wanted.values()))
        differences[row.name] = math.sqrt(square) / norm
        contender.close()
        del contender, gradients, gradient, expected
        gc.collect()
    wrong = []
    for row in rows:
        loss_limit, gradient_limit = row.tolerance or TOLERANCES[bool(job.settings.bf16)]
        same = abs(losses[row.name] / losses["reference"] - 1) <= loss_limit and differences[row.name] <= gradient_limit
        wrong += [] if same else [row.name]  # NaN is not the same
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: another function. Losses {losses}; gradients differ by {differences}")
    return {"losses": losses, "gradient_differences": differences, "passed": True}


# ---------------------------------------------------------------- the measurement


def measure(row: Row, job: Job, steps: Sequence[Step], warmup: int) -> dict:
    """Builds a row, warms it up and times its steps."""
    device = job.world.device
    memory = PeakMemory(device)
    contender = row.build(job)
    warm = list(steps[:1]) if device.type == "cuda" else [short_step(job.samples, 1, 1)]
    contender.train(warm * warmup)
    memory.restart()
    job.stopwatch.start()
    contender.train(steps)
    laps = job.stopwatch.read()
    flops = [flops_of(job, contender, step) for step in steps]
    found = {"laps": laps, "flops": flops, "peak_memory_bytes": memory.added()}
    contender.close()
    del contender
    gc.collect()
    return found


def measure_all(rows: Sequence[Row], job: Job, steps: Sequence[Step], args: argparse.Namespace) -> dict[str, list]:
    """The turns of every row that the GPU has the memory for, each turn with other steps and another row first."""
    turns: dict[str, list] = {row.name: [] for row in rows}
    for turn in range(args.turns):
        first = turn % len(rows)
        mine = steps[turn * args.steps : (turn + 1) * args.steps]
        for row in (*rows[first:], *rows[:first]):
            if row.name not in turns:
                continue
            try:
                turns[row.name].append(measure(row, job, mine, args.warmup))
                said = f"{step_seconds(turns[row.name][-1]):.3g} s a step"
            except torch.OutOfMemoryError:
                del turns[row.name]
                said = "out of memory, left out"
            if args.table and job.world.is_main:
                print(f"turn {turn + 1} of {args.turns}, {row.name}: {said}", flush=True)
    if not turns:
        raise SystemExit("out of memory → fewer --tokens, or a smaller --geometry")
    return turns


def communication(row: Row, job: Job, steps: Sequence[Step]) -> float | None:
    """Seconds of collectives in a step by torch's profiler, hidden behind compute or not; None for one process."""
    if job.world.size == 1:
        return None
    gpu = job.world.device.type == "cuda"
    contender = row.build(job)
    contender.train(steps[:1])
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if gpu else activity.CPU]) as profiler:
        contender.train(steps[:1])
    contender.close()
    marks = ("ncclDevKernel",) if gpu else ("gloo:",)
    events = [event for event in profiler.key_averages() if event.key.startswith(marks)]
    return sum(event.device_time_total if gpu else event.cpu_time_total for event in events) / 1e6


# ---------------------------------------------------------------- the whole


def main() -> None:
    transformers_log.disable_progress_bar()
    args, rest = parse_arguments(torch.cuda.is_available())
    world = init_process_group()
    if args.table and world.size > 1:
        raise SystemExit("--table: transformers' rows are one process → start it without a launcher")
    try:
        report = run(args, read_settings(args, rest, world), world)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    if world.is_main:
        print_report(report)
        kind = "table_" if args.table else ""
        name = f"throughput_{kind}{args.geometry}_{slug(report['hardware']['device'])}_{report['date']}.json"
        out = args.out or Path(__file__).parent / "results" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
        if args.table:
            out.with_suffix(".svg").write_text(svg(report["results"]))
    shutdown(world)
    exit_cleanly(0)


def _published(settings: Settings) -> dict:
    """The settings without the paths of the machine."""
    values = {name: value for name, value in dataclasses.asdict(settings).items() if not FIELDS[name].metadata["path"]}
    return values | {"ds_config": Path(settings.ds_config).stem}


def run(args: argparse.Namespace, settings: Settings, world: World) -> dict:
    files = RandomWeights(configuration(args.geometry), world.device, settings.seed)
    samples, steps = make_work(args, settings, files)
    job = Job(settings, world, files, samples, Stopwatch(world.device, CLOCKS[args.clock]))
    rows = ladder(job, args.rows) if args.table else [Row("packed", f"this engine, {settings.backend}", engine="")]
    checked = check(rows, job)
    turns = measure_all(rows, job, steps, args)
    machine = hardware(world.device)
    results = summarise(job, turns, steps, peak_flops(machine["device"]) if settings.bf16 else None)
    for row in rows:
        if row.name in results:
            results[row.name] = {"title": row.title, "engine": row.settings} | results[row.name]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": machine, "processes": world.size, "versions": versions(),
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "engine_settings": _published(settings), "parameters": Parameters.of(files.config).total,
        "samples": describe_mix([job.chosen(m) for step in steps for m in step.micro_batches]),
        "check": checked, "results": results, "out_of_memory": [row.name for row in rows if row.name not in results],
        "communication_seconds": communication(rows[0], job, steps),
    }  # fmt: skip


if __name__ == "__main__":
    main()
