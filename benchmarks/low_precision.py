"""What low precision does to the loss: the demo's model overfits the demo's clips in each of them, on the same steps.

Runs are those of `higgs-engine train`: the same weights, data and order, so that a curve differs from its default by
rounding alone. Yardstick is the default with adam_epsilon 1e-7 instead of 1e-8: a change that nobody would mind, and
what a difference of such curves is worth. float8 is emulated (the same roundings, products in fp32), which says what
becomes of the loss and nothing of the speed; its default computes in bf16, which float8 starts from.

    python -m benchmarks.low_precision
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from benchmarks.low_precision_plot import svg
from benchmarks.stopwatch import hardware, slug, versions
from engine import cli
from engine.data.demo import Demo, make_demo
from engine.model import float8
from engine.plan.states import MOMENTS

FP32 = {"backend": "none"}
BF16 = {"backend": "fsdp", "bf16": True}
RUNS = {
    "fp32": ("fp32, the default on a CPU", FP32, None),
    "fp32_epsilon": ("… adam_epsilon 1e-7: the yardstick", FP32 | {"adam_epsilon": 1e-7}, "fp32"),
    "bf16_states": ("… optimizer_state_dtype bf16", FP32 | {"optimizer_state_dtype": "bf16"}, "fp32"),
    "int8_states": ("… optimizer_state_dtype int8", FP32 | {"optimizer_state_dtype": "int8"}, "fp32"),
    "bf16": ("bf16 compute, the default on a GPU", BF16, "fp32"),
    "float8": ("… float8 (emulated)", BF16 | {"float8": True}, "bf16"),
}
"""Name -> title, settings, the run that it is compared with."""

SMOOTHED = 20
"""Steps whose losses are averaged: a pass over the demo's clips is some four."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=150, metavar="N", help="of each run (%(default)s)")
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=f"of {', '.join(RUNS)}")
    add("--out", type=Path, metavar="FILE", help="JSON to write, beside it an SVG; none: named after device and day")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo = make_demo(Path(folder) / "demo")
        curves = {name: train(name, demo, args.steps, Path(folder)) for name in args.runs}
    report = summarise(curves, args.steps)
    name = f"low_precision_{slug(report['hardware']['device'])}_{report['date'][:10]}.json"
    out = args.out or Path(__file__).parent / "results" / name
    out.write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".svg").write_text(svg({RUNS[n][0]: smoothed(curve) for n, curve in curves.items()}, SMOOTHED))
    print(table(report))
    print(out)


def train(name: str, demo: Demo, steps: int, folder: Path) -> list[float]:
    """The loss of each step."""
    out = folder / name
    settings = {
        "model_path": demo.model_path, "audio_tokenizer_path": demo.audio_tokenizer_path,
        "train_data_file": demo.data_file, "output_dir": out, "codes_cache_dir": folder / "codes",
        "max_tokens_per_micro_batch": 1024, "micro_batches_per_step": 1, "drop_long_samples": True,
        "learning_rate": 3e-3, "lr_scheduler_type": "constant", "warmup_steps": 10, "num_train_epochs": 10_000,
        "max_steps": steps, "save_steps": steps, "logging_steps": 1, "dataloader_num_workers": 0,
        "gradient_checkpointing": "none",
    } | RUNS[name][1]  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    said = io.StringIO()
    emulated = {"install": partial(float8.install, emulate=True), "problems": lambda *_: ()}
    with mock.patch.multiple(float8, **emulated):
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(["train", *words])
    if code:
        raise SystemExit(f"{name}: {said.getvalue()[-2000:]}")
    print(f"{name}: {steps} steps", flush=True)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def smoothed(curve: list[float]) -> list[float]:
    """Means of SMOOTHED steps after each other."""
    return [statistics.fmean(curve[i : i + SMOOTHED]) for i in range(len(curve) - SMOOTHED + 1)]


def summarise(curves: dict[str, list[float]], steps: int) -> dict:
    results = {}
    for name, curve in curves.items():
        title, settings, default = RUNS[name]
        differences = []
        if default in curves:
            pairs = zip(smoothed(curve), smoothed(curves[default]), strict=True)
            differences = [ours - wanted for ours, wanted in pairs]
        results[name] = {
            "title": title,
            "compared_with": default if differences else None,
            "first_loss": curve[0],
            "final_loss": statistics.fmean(curve[-SMOOTHED:]),
            "largest_difference": max(differences, key=abs) if differences else None,
            "final_difference": differences[-1] if differences else None,
            "moment_bytes_per_parameter": MOMENTS[settings.get("optimizer_state_dtype", "fp32")],
            "losses": [float(f"{loss:.6g}") for loss in curve],
        }
    starts = [curve[0] for curve in curves.values()]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "settings": {"steps": steps, "smoothed_steps": SMOOTHED, "threads": os.environ.get("OMP_NUM_THREADS")},
        # the first losses are those of the same weights on the same row, rounded
        "check": {"passed": max(starts) / min(starts) < 1.02, "first_losses": starts},
        "results": results,
    }


def table(report: dict) -> str:
    lines = [
        "| | final loss | largest difference | at the end | moments, bytes a parameter |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["results"].values():
        differences = (row["largest_difference"], row["final_difference"])
        shown = ["" if value is None else f"{value:+.4f}" for value in differences]
        size = row["moment_bytes_per_parameter"]
        lines.append(f"| {row['title']} | {row['final_loss']:.4f} | {shown[0]} | {shown[1]} | {size:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
