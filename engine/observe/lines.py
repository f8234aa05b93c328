"""Metrics in one line: of a logged step, of an evaluation. What is null is left out."""

from collections.abc import Sequence

WIDTH = 160
"""Columns of a line; if it is longer, it leaves out the losses of the codebooks in the middle, then `DISPENSABLE`."""
DISPENSABLE = ("eos_accuracy", "learning_rate", "audio_seconds_per_second")
WAITS = {"data": "data_share", "communication": "communication_share"}
NOTABLE_WAIT = 0.05
"""Share of the time, waiting for data or for other processes, from which on a line tells it."""


def format_step(values: dict, total_steps: int) -> str:
    """A logged step's, with the metrics of engine/observe/schema.py.

    `step 120/4000 | loss 4.812 | text 2.31 (41%) audio 4.71 (12%) [3.9 4.6 … 5.2] eos 0.80 | lr 1.9e-05 gnorm 0.820 |
    25.3k tok/s 910 audio-s/s mfu 41% | 61.2 GiB | waits for data 7% | eta 2h03m`: accuracies are in parentheses, losses
    of codebooks in brackets.
    """
    line = _of_step(values, total_steps)
    for name in (None, *DISPENSABLE):
        if len(line) > WIDTH:
            values = {key: value for key, value in values.items() if key != name}
            line = _of_step(values, total_steps, shortened=True)
    return line


def format_evaluation(values: dict, step: int, total_steps: int) -> str:
    """`step 120/4000 | eval loss 4.9011 | text 2.31 (41%) audio 4.71 (12%) [3.9 4.6 …] eos 0.80 (75%)`"""
    loss = "is not finite" if values["loss"] is None else f"{values['loss']:.4f}"
    return _joined([f"step {step}/{total_steps}"], [f"eval loss {loss}"], _heads(values))


def duration(seconds: float) -> str:
    """`45s`, `3m12s`, `2h03m`, `5d07h`"""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if not minutes:
        return f"{seconds}s"
    if not hours:
        return f"{minutes}m{seconds % 60:02d}s"
    return f"{days}d{hours % 24:02d}h" if days else f"{hours}h{minutes % 60:02d}m"


def thousands(number: float) -> str:
    """`910`, `25.3k`, `1.20M`"""
    if number < 999.5:
        return f"{number:.0f}"
    return f"{number / 1e3:.1f}k" if number < 999950 else f"{number / 1e6:.2f}M"


def _of_step(values: dict, total_steps: int, shortened: bool = False) -> str:
    tokens, left, skipped = (values.get(name) for name in ("tokens_per_second", "eta_seconds", "skipped_since"))
    speed = [] if tokens is None else [f"{thousands(tokens)} tok/s"]
    waits = [f"{what} {values[name]:.0%}" for what, name in WAITS.items() if (values.get(name) or 0) >= NOTABLE_WAIT]
    return _joined(
        [f"step {values['step']}/{total_steps}"],
        [f"loss {values['loss']:.3f}" if values["loss"] is not None else "loss -"],
        _heads(values, shortened),
        _known(values, learning_rate="lr {:.1e}", grad_norm="gnorm {:#.3g}"),
        speed + _known(values, audio_seconds_per_second="{:,.0f} audio-s/s", mfu="mfu {:.0%}"),
        _known(values, memory_gib="{:.1f} GiB"),
        ["waits for", *waits] if waits else [],
        [f"{skipped} skipped ({values['skipped_steps']} in all)"] if skipped else [],
        [] if left is None else [f"eta {duration(left)}"],
    )


def _heads(values: dict, shortened: bool = False) -> list[str]:
    """Loss, and accuracy if that is known, of text, audio with its codebooks, and ends of clips."""
    parts = []
    for head in ("text", "audio", "eos"):
        loss, accuracy = values.get(f"{head}_loss"), values.get(f"{head}_accuracy")
        if loss is not None:
            parts.append(f"{head} {loss:.2f}" + ("" if accuracy is None else f" ({accuracy:.0%})"))
            if head == "audio":
                parts.append(_codebooks(values["codebook_losses"], shortened))
    return parts


def _codebooks(losses: Sequence[float | None], shortened: bool) -> str:
    words = ["-" if loss is None else f"{loss:.1f}" for loss in losses]
    if shortened and len(words) > 4:
        words = [*words[:2], "…", words[-1]]
    return f"[{' '.join(words)}]"


def _known(values: dict, **templates: str) -> list[str]:
    return [text.format(values[name]) for name, text in templates.items() if values.get(name) is not None]


def _joined(*groups: list[str]) -> str:
    return " | ".join(" ".join(group) for group in groups if group)
