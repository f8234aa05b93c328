"""What a user sees while a run goes on: one line a logged step, and a bar where there is a terminal."""

import sys

from tqdm import tqdm

from engine.runtime.distributed import World


def format_step(values: dict, total_steps: int) -> str:
    """`step 120/4000 | loss 4.812 | text 2.31 audio 4.71 [3.9 4.6 …] | lr 1.9e-05 | gnorm 0.82 | …`"""
    left = int((total_steps - values["step"]) * values["seconds_per_step"])
    books = " ".join(_number(b, 2) for b in values["codebook_losses"])
    parts = [
        f"step {values['step']}/{total_steps}",
        f"loss {_number(values['loss'], 4)}",
        f"text {_number(values['text_loss'], 3)} audio {_number(values['audio_loss'], 3)} [{books}]",
        f"lr {values['learning_rate']:.2e}",
        f"gnorm {_number(values['grad_norm'], 3)}",
        f"{values['tokens_per_second']:,.0f} tok/s",
        f"{values['audio_seconds_per_second']:,.0f} audio-s/s",
        f"eta {left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s",
    ]
    if values["skipped_since"]:
        parts.append(f"{values['skipped_since']} skipped ({values['skipped_steps']} in all)")
    return " | ".join(parts)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


class Progress:
    """The main process's voice; silent on all others."""

    def __init__(self, world: World):
        self.speaks = world.is_main
        self.bar: tqdm | None = None

    def say(self, line: str = "") -> None:
        if self.speaks:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def start(self, done: int, total: int) -> None:
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=not (self.speaks and terminal))

    def step(self) -> None:
        self.bar.update()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
