"""What a profile says in numbers: operators or kernels by their own time, and what of communication nothing hides."""

from collections.abc import Iterable, Sequence

from torch.autograd import DeviceType
from torch.profiler import profile

from engine.observe.communication import covered

TOP = 30
NAME_WIDTH = 90


def kernel_table(profiled: profile, on_gpu: bool, steps: int) -> list[str]:
    """The TOP kernels of a GPU, or operators of a CPU; a phase is there with its Python between the operators."""
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spent = []
    for row in profiled.key_averages():
        if row.device_type != kind or row.key.startswith("ProfilerStep") or on_gpu and row.is_user_annotation:
            continue
        microseconds = row.self_device_time_total if on_gpu else row.self_cpu_time_total
        spent.append((row.key, row.count, microseconds))
    return ranking(spent, "kernel" if on_gpu else "operator", steps)


def ranking(spent: Iterable[tuple[str, int, float]], what: str, steps: int) -> list[str]:
    """Lines for people, by time.

    Args:
        spent: name, calls and microseconds of its own, in `steps` steps.
    """
    rows = sorted(spent, key=lambda row: -row[2])
    whole = sum(microseconds for *_, microseconds in rows) or 1.0
    lines = [f"{'ms a step':>12}{'share':>8}{'calls a step':>14}  {what}"]
    for name, calls, microseconds in rows[:TOP]:
        milliseconds, share = microseconds / 1000 / steps, microseconds / whole
        lines.append(f"{milliseconds:>12,.3f}{share:>8.1%}{calls / steps:>14,.1f}  {name[:NAME_WIDTH]}")
    if len(rows) > TOP:
        rest = sum(microseconds for *_, microseconds in rows[TOP:])
        lines.append(f"{rest / 1000 / steps:>12,.3f}{rest / whole:>8.1%}{'':>14}  {len(rows) - TOP} others")
    return lines


def exposed_communication(profiled: profile) -> float:
    """Seconds in which the GPU ran kernels of NCCL and nothing else."""
    return exposed(
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )


def exposed(kernels: Iterable[tuple[str, float, float]]) -> float:
    """Seconds of NCCL kernels while no other runs, from (name, begin, end) in microseconds."""
    both: tuple[Sequence, Sequence] = ([], [])
    for name, began, ended in kernels:
        both[name.startswith("nccl")].append((began, ended))
    computing, communicating = both
    return (covered([*computing, *communicating]) - covered(computing)) / 1e6
