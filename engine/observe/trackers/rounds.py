"""A round of generated speech as trackers show it: recordings with captions, and curves over the rounds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.observe.trackers.tracker import Sound

MEANS = ("speaker_similarity", "spectral_distance_db", "silence_share", "clipped_share")
"""Scores whose mean over the samples is a curve."""
RATES = {"wer": ("word_errors", "words"), "cer": ("character_errors", "characters")}
"""Scores of a round that are one sum by another: a long text counts more than a short one."""


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
    parts += [f"{name} {scores[name]:.2f}" for name in (*RATES, *MEANS) if scores.get(name) is not None]
    return f"{_name(sample)} {', '.join(parts)}"


def _name(sample: dict) -> str:
    return f'{sample["name"]}: "{sample["text"]}"'


def curves(samples: Sequence[dict]) -> Iterator[tuple[str, float]]:
    """(tag, number) of a round; what no sample has is left out."""
    heard = [sample for sample in samples if sample["file"]]
    yield "samples/made_share", len(heard) / len(samples)
    if not heard:
        return
    yield "samples/stopped_share", sum(bool(sample["stopped"]) for sample in heard) / len(heard)
    scores = [sample.get("scores") or {} for sample in heard]
    for name, (errors, of) in RATES.items():
        known = [score for score in scores if score.get(errors) is not None and score.get(of)]
        if known:
            yield f"samples/{name}", sum(score[errors] for score in known) / sum(score[of] for score in known)
    for name in MEANS:
        if known := [score[name] for score in scores if score.get(name) is not None]:
            yield f"samples/{name}", sum(known) / len(known)
    if known := [s["real_time_factor"] for s in heard if s.get("real_time_factor") is not None]:
        yield "samples/real_time_factor", sum(known) / len(known)
