"""TensorBoard: event files in a folder, read by `tensorboard --logdir FOLDER`."""

from collections.abc import Mapping, Sequence

import soundfile
import yaml

from engine.observe.trackers.tracker import NullTracker, Sound, Start, in_words

CHARTS = {
    "training and held-out": {
        name: ["Multiline", [rf"^(eval_)?loss/{name}$"]] for name in ("loss", "text_loss", "audio_loss")
    },
    "codebooks": {
        "losses": ["Multiline", [r"^loss/codebook_losses/\d+$"]],
        "accuracies": ["Multiline", [r"^accuracy/codebook_accuracies/\d+$"]],
        "held-out losses": ["Multiline", [r"^eval_loss/codebook_losses/\d+$"]],
    },
}
"""For the tab Custom Scalars: curves that belong together, in one chart."""
COMPARED = ("loss/loss", "eval_loss/loss")
"""What the tab HParams shows beside the settings of runs."""


class TensorBoard(NullTracker):
    """What an earlier run, or the part of this one after the checkpoint, left in the folder is hidden (purge_step)."""

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {start.folder}"
        self.writer = SummaryWriter(start.folder, purge_step=start.step + 1)
        self.writer.add_custom_scalars(CHARTS)
        settings = yaml.safe_dump(dict(start.settings), sort_keys=False)
        self.writer.add_text("settings", f"```yaml\n{settings}```", start.step)
        self._as_hyperparameters(start.settings)
        self.writer.flush()  # a folder that cannot be written to is told now

    def _as_hyperparameters(self, settings: Mapping[str, object]) -> None:
        """In this run's own files; the writer's add_hparams would make another run of it."""
        from torch.utils.tensorboard.summary import hparams

        words = {name: in_words(value) for name, value in settings.items()}
        experiment, session, _ = hparams(words, dict.fromkeys(COMPARED, 0.0))
        self.writer.file_writer.add_summary(experiment)
        self.writer.file_writer.add_summary(session)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()  # a disk that is full is told here, and nothing waits for an end that may not come

    def sounds(self, step: int, sounds: Sequence[Sound]) -> None:
        for sound in sounds:
            wave, rate = soundfile.read(sound.file, dtype="float32", always_2d=True)
            self.writer.add_audio(sound.tag, wave.mean(axis=1), step, sample_rate=rate)
            self.writer.add_text(f"{sound.tag}/text", sound.caption, step)
        self.writer.flush()

    def close(self, code: int) -> None:
        self.writer.close()
