"""A round of generated speech as trackers show it: recordings with captions, and curves over the rounds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.observe.trackers.tracker import Sound

SHOWN = ("wer", "cer", "speaker_similarity", "spectral_distance_db", "silence_share", "clipped_share")
"""Scores that a caption has, and of which a round has a curve."""


def recordings(samples: Sequence[dict], output_dir: Path, with_prompts: bool) -> list[Sound]:
    """What can be listened to.

    Args:
        samples: lines of `samples/samples.jsonl`.
        with_prompts: also the voice to speak with, and the recording of the same text, where there are such.
    """
    found = []
    for sample in samples:
        tag = f"samples/{sample['prompt']:02d}"
        if with_prompts:
            for kind in ("reference", "target"):
                if file := sample.get(kind):
                    found.append(Sound(f"{tag}/{kind}", output_dir / file, _name(sample)))
        if sample["file"]:
            found.append(Sound(f"{tag}/generated", output_dir / sample["file"], caption(sample)))
    return found


def caption(sample: dict) -> str:
    """`anna: "Hello there." 4.8 s of 5.0 s, stopped by itself, wer 0.10, ...`"""
    target = f" of {sample['target_seconds']:.1f} s" if sample.get("target_seconds") else ""
    ended = "stopped by itself" if sample["stopped"] else "cut"
    parts = [f"{sample['seconds']:.1f} s{target}", ended]
    scores = sample.get("scores") or {}
    parts += [f"{name} {scores[name]:.2f}" for name in SHOWN if scores.get(name) is not None]
    return f"{_name(sample)} {', '.join(parts)}"


def _name(sample: dict) -> str:
    return f'{sample["name"]}: "{sample["text"]}"'


def curves(samples: Sequence[dict]) -> Iterator[tuple[str, float]]:
    """(tag, number) of a round; what no sample has is left out."""
    from engine.evaluate.scores import ratio, summary  # here, for only runs that speak need it

    heard = [sample for sample in samples if sample["file"]]
    yield "samples/made_share", len(heard) / len(samples)
    if not heard:
        return
    yield "samples/stopped_share", sum(bool(sample["stopped"]) for sample in heard) / len(heard)
    scores = summary(sample.get("scores") or {} for sample in heard)
    numbers = {name: scores[name] for name in SHOWN}
    numbers["length_of_target"] = ratio(heard, "seconds", "target_seconds")
    numbers["real_time_factor"] = ratio(heard, "generation_seconds", "seconds")
    yield from ((f"samples/{name}", number) for name, number in numbers.items() if number is not None)
