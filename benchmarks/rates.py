"""From the laps of a throughput run to its numbers: what was done a second, at which share of the peak, and how."""

import statistics
from collections.abc import Sequence

from benchmarks.contenders import Job, Native, Packed
from benchmarks.length_mix import FRAMES_PER_SECOND
from engine.data.batches import Step
from engine.data.prompts import IGNORED
from engine.model.flops import active_adapters, step_flops


def flops_of(job: Job, contender: Packed | Native, step: Step) -> tuple[int, int]:
    """Model FLOPs of a step, and those that the contender's hardware runs for it."""
    config, settings, model, spent = job.files.config, job.settings, 0, 0
    adapters = active_adapters(config, settings.lora_rank, settings.lora_target_modules) if settings.use_lora else None
    for micro_batch in step.micro_batches:
        samples = job.chosen(micro_batch)
        heads = (
            sum(s.text_targets for s in samples),
            sum(int((s.audio_labels != IGNORED).any(1).sum()) for s in samples),
        )
        model += step_flops(config, [len(s) for s in samples], *heads, adapters)
        lengths, everywhere = contender.layout(samples)
        run = heads if everywhere is None else (everywhere, everywhere)
        spent += step_flops(config, lengths, *run, adapters, contender.recomputes)
    return model, spent


def step_seconds(turn: dict) -> float:
    return statistics.fmean(lap["step"] for lap in turn["laps"])


def summarise(job: Job, turns: dict[str, list], steps: Sequence[Step], peak: float | None) -> dict[str, dict]:
    """Medians over turns of what each row did a second; over the laps, where a step's time goes."""
    per_turn = len(steps) // len(next(iter(turns.values())))
    works = [_work(job, steps[i : i + per_turn]) for i in range(0, len(steps), per_turn)]
    first = next(iter(turns.values()))
    results = {}
    for name, mine in turns.items():
        totals = [sum(lap["step"] for lap in turn["laps"]) for turn in mine]
        laps = [lap for turn in mine for lap in turn["laps"]]
        parts = {key: statistics.median(lap.get(key, 0.0) for lap in laps) for key in laps[0] if key != "step"}
        flops = [[sum(step[kind] for step in turn["flops"]) for kind in (0, 1)] for turn in mine]
        memory = [turn["peak_memory_bytes"] for turn in mine]

        def rate(amounts: Sequence[float], seconds: Sequence[float] = totals) -> float:
            return statistics.median(a / s for a, s in zip(amounts, seconds, strict=True))

        model, spent = (rate([turn[kind] for turn in flops]) / job.world.size for kind in (0, 1))
        results[name] = {
            "seconds": [lap["step"] for lap in laps], "median_seconds": statistics.median(lap["step"] for lap in laps),
            "parts": parts,
            "tokens_per_second": rate([tokens for tokens, _ in works]),
            "audio_seconds_per_second": rate([audio for _, audio in works]),
            "model_flops_per_second": model, "mfu": peak and model / peak, "hfu": peak and spent / peak,
            "hardware_by_model_flops": spent / model,
            "ratio": statistics.median(step_seconds(a) / step_seconds(b) for a, b in zip(first, mine, strict=True)),
            "forward_backward_ratio": statistics.median(
                _forward_backward(a) / _forward_backward(b) for a, b in zip(first, mine, strict=True)
            ),
            "peak_memory_bytes": None if None in memory else max(memory),
        }  # fmt: skip
    return results


def _forward_backward(turn: dict) -> float:
    return sum(lap["forward"] + lap["backward"] for lap in turn["laps"])


def _work(job: Job, steps: Sequence[Step]) -> tuple[int, float]:
    samples = [s for step in steps for micro_batch in step.micro_batches for s in job.chosen(micro_batch)]
    return sum(len(s) for s in samples), sum(len(s.audio_ids) for s in samples) / FRAMES_PER_SECOND


def print_report(report: dict) -> None:
    mix, settings = report["samples"], report["settings"]
    print(
        f"\n{report['hardware']['device']} x {report['processes']}, {settings['geometry']} "
        f"({report['parameters'] / 1e6:,.0f} M parameters), {settings['mode']}, "
        f"{'bf16' if report['engine_settings']['bf16'] else 'fp32'}\n{mix['samples']} samples in "
        f"{mix['micro_batches']} micro-batches, {mix['tokens']:,} tokens, {mix['audio_share']:.0%} of them audio; "
        f"padded, {mix['padding_share']:.0%} would be padding\n"
    )
    print("| | tokens/s | audio s/s | ratio | ratio f+b | data, forward, backward, optimizer, s | GiB | MFU | HFU |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in report["results"].values():
        parts = ", ".join(f"{row['parts'].get(name, 0):.3g}" for name in ("data", "forward", "backward", "optimizer"))
        memory = row["peak_memory_bytes"]
        print(
            f"| {row['title']} | {row['tokens_per_second']:,.0f} | {row['audio_seconds_per_second']:,.1f} "
            f"| {row['ratio']:.2f} | {row['forward_backward_ratio']:.2f} | {parts} "
            f"| {'–' if memory is None else f'{memory / 2**30:.2f}'} "
            + "".join(f"| {'–' if row[key] is None else f'{row[key]:.1%}'} " for key in ("mfu", "hfu"))
            + "|"
        )
    if report["communication_seconds"] is not None:
        print(f"\ncollectives: {report['communication_seconds']:.3g} s a step, partly behind the compute")
