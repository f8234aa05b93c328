"""The metrics of a run, described once: for the console, `metrics.jsonl`, the trackers, the report and the README.

A record is one line of `metrics.jsonl`: `step`, and values under these names. Evaluations write the same names with
`eval_` before them. A list has one value a codebook. A value that is not known (no targets, no GPU) is null.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """
    Attributes:
        group: heading under which trackers and the report show it.
        unit: "" for a plain number; "share" is between 0 and 1.
        higher_is_better: None where neither is.
        meaning: one sentence.
    """

    name: str
    group: str
    unit: str
    higher_is_better: bool | None
    meaning: str


GROUPS = {
    "loss": "what is minimised, and its parts",
    "accuracy": "share of targets that the model finds most likely, the answers before given (teacher forcing)",
    "optimisation": "the optimizer's steps",
    "throughput": "how fast",
    "time": "where the time of a step goes",
    "memory": "of the GPU; of the process on a CPU",
    "progress": "how far",
}

METRICS = (
    Metric("loss", "loss", "nats", False, "text and audio loss with their weights, as it is minimised"),
    Metric("text_loss", "loss", "nats", False, "mean cross-entropy of text targets"),
    Metric("audio_loss", "loss", "nats", False, "mean of the codebooks' losses, by codebook_weights"),
    Metric("codebook_losses", "loss", "nats", False, "mean cross-entropy of each codebook; chance is ln 1026 = 6.93"),
    Metric("eos_loss", "loss", "nats", False, "mean cross-entropy of the targets that end a clip"),
    Metric("text_accuracy", "accuracy", "share", True, "of text targets"),
    Metric("audio_accuracy", "accuracy", "share", True, "mean of the codebooks' accuracies, by codebook_weights"),
    Metric("codebook_accuracies", "accuracy", "share", True, "of each codebook's targets"),
    Metric("eos_accuracy", "accuracy", "share", True, "of the targets that end a clip: will the model stop?"),
    Metric("learning_rate", "optimisation", "", None, "of the last step"),
    Metric("grad_norm", "optimisation", "", None, "before clipping, of the last step that counted"),
    Metric("skipped_steps", "optimisation", "steps", False, "left out since the run began: not finite, or a spike"),
    Metric("tokens_per_second", "throughput", "tokens/s", True, "text and audio positions, of all processes"),
    Metric("tokens_per_second_per_gpu", "throughput", "tokens/s", True, "of one process"),
    Metric("audio_seconds_per_second", "throughput", "s/s", True, "seconds of speech trained on, of all processes"),
    Metric("audio_seconds_per_second_per_gpu", "throughput", "s/s", True, "of one process"),
    Metric("tflops_per_gpu", "throughput", "TFLOP/s", True, "of the model; unknown with train_modules or freeze_llm"),
    Metric("mfu", "throughput", "share", True, "model FLOPs utilisation: of the dense bf16 peak, where that is known"),
    Metric("hfu", "throughput", "share", True, "the same, layers that the backward computes again counted too"),
    Metric("padding_share", "throughput", "share", False, "of computed positions that belong to no sample"),
    Metric("seconds_per_step", "time", "s", False, "without evaluations, samples and saves"),
    Metric("data_share", "time", "share", False, "of the time, waiting for the loader; the slowest process"),
    Metric("communication_share", "time", "share", False, "in collectives, overlapped ones too; the slowest process"),
    Metric("memory_gib", "memory", "GiB", False, "now, of the process that has most"),
    Metric("memory_peak_gib", "memory", "GiB", False, "the most since the last line, of the process that had most"),
    Metric("epoch", "progress", "", None, "passes over the training data so far, with a fraction"),
    Metric("tokens_seen", "progress", "tokens", None, "text and audio positions trained on so far"),
    Metric("audio_hours_seen", "progress", "h", None, "hours of speech trained on so far"),
    Metric("eta_seconds", "progress", "s", None, "until the last step, at the speed since the last line, all included"),
)
BY_NAME = {metric.name: metric for metric in METRICS}

BESIDE = ("step", "text_targets", "audio_targets", "eos_targets", "skipped_since")
"""Numbers of a record that say what is behind the others."""


def scalars(values: dict) -> Iterator[tuple[str, float]]:
    """(`group/name`, number) of each metric of a record, for trackers; a list gives `group/name/0`, ...

    A number that is no metric of ours (a callback has added it) is in the group `other`.
    """
    for name, value in values.items():
        prefix = "eval_" if name.startswith("eval_") else ""
        short = name.removeprefix("eval_")
        group = BY_NAME[short].group if short in BY_NAME else "other"
        numbers = {f"/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {"": value}
        if short not in BESIDE:
            for place, number in numbers.items():
                if isinstance(number, (int, float)):
                    yield f"{prefix}{group}/{short}{place}", number
