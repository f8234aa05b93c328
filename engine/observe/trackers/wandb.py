"""Weights & Biases. Its own environment variables count: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_DIR, ..."""

import os
from collections.abc import Mapping, Sequence

from engine.observe.trackers.tracker import PROJECT, NullTracker, Sound, Start


class WandB(NullTracker):
    """
    Steps are an axis of ours: W&B's own never goes back, as a run does that resumes from its last checkpoint.
    """

    def __init__(self, start: Start):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or start.name,
            id=os.environ.get("WANDB_RUN_ID") or start.known_as,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(start.output_dir),
        )
        self.run.config.update(dict(start.settings), allow_val_change=True)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.known_as = self.run.id
        self.where = self.run.url or f"wandb sync {os.path.dirname(self.run.dir)}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def sounds(self, step: int, sounds: Sequence[Sound]) -> None:
        import wandb

        audio = {sound.tag: wandb.Audio(str(sound.file), caption=sound.caption) for sound in sounds}
        self.run.log({**audio, "step": step})

    def close(self, code: int) -> None:
        self.run.finish(exit_code=code)
