"""trackio, Hugging Face's tracker on one's own machine. Its own environment variables count: TRACKIO_DIR, ..."""

import os
from collections.abc import Mapping, Sequence

from engine.observe.trackers.tracker import PROJECT, NullTracker, Sound, Start


class Trackio(NullTracker):
    """It knows a run by its name: one that is resumed goes on with the latest of this name."""

    def __init__(self, start: Start):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        self.where = f"trackio show --project {project}"
        resume = "allow" if start.step else "never"
        self.run = trackio.init(project, start.name, config=dict(start.settings), resume=resume, embed=False)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)  # trackio.log asks for the run of its own thread

    def sounds(self, step: int, sounds: Sequence[Sound]) -> None:
        import trackio

        audio = {sound.tag: trackio.Audio(sound.file, caption=sound.caption) for sound in sounds}
        self.run.log(audio, step=step)

    def close(self, code: int) -> None:
        self.run.finish()
