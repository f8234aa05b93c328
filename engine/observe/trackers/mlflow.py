"""MLflow. Its own environment variables count: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_ID, ...

Without MLFLOW_TRACKING_URI it is an SQLite file, with artifacts beside it, in the output folder.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.exit_codes import DONE, STOPPED, TIME_IS_UP
from engine.observe.trackers.tracker import PROJECT, NullTracker, Sound, Start, in_words

STATUS = {DONE: "FINISHED", STOPPED: "KILLED", TIME_IS_UP: "KILLED"}
MOST_PARAMS = 100
"""That MLflow takes in one request."""
LONGEST_PARAM = 6000
"""Characters, its limit."""
RETRIES, FIRST_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"
"""Seven, as MLflow has it, take four minutes: good while training goes on, long to wait for "no such server"."""


class MLflow(NullTracker):
    def __init__(self, start: Start):
        from mlflow import MlflowClient

        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            start.folder.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{start.folder}/mlflow.db", (start.folder / "artifacts").as_uri()
        self.where = f"mlflow ui --backend-store-uri {uri}"
        self.client = MlflowClient(uri)
        with _few_retries():
            self.known_as = self._open(os.environ.get("MLFLOW_RUN_ID") or start.known_as, start, artifacts)

    def _open(self, known_as: str | None, start: Start, artifacts: str | None) -> str:
        """The run's id: of one that goes on, or of a new one with its parameters, which MLflow lets nobody change."""
        from mlflow.entities import Param

        if known_as:
            self.client.update_run(known_as, status="RUNNING")
            return known_as
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name, artifacts)
        made = self.client.create_run(experiment, run_name=start.name).info.run_id
        params = [Param(name, str(in_words(value))[:LONGEST_PARAM]) for name, value in start.settings.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(made, params=params[first : first + MOST_PARAMS])
        return made

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.known_as, [Metric(tag, value, now, step) for tag, value in values.items()])

    def sounds(self, step: int, sounds: Sequence[Sound]) -> None:
        folder = f"samples/step-{step:06d}"
        for sound in sounds:
            place = f"{folder}/{Path(sound.tag).name}"
            self.client.log_artifact(self.known_as, str(sound.file), place)
        captions = "".join(f"{sound.tag} ({sound.file.name}): {sound.caption}\n" for sound in sounds)
        self.client.log_text(self.known_as, captions, f"{folder}/captions.txt")

    def close(self, code: int) -> None:
        self.client.set_terminated(self.known_as, STATUS.get(code, "FAILED"))


@contextmanager
def _few_retries() -> Iterator[None]:
    ours = RETRIES not in os.environ
    os.environ.setdefault(RETRIES, FIRST_RETRIES)
    try:
        yield
    finally:
        if ours:
            del os.environ[RETRIES]
