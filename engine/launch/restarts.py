"""Attempt after attempt, until the run is through, cannot be, or was told to stop."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.exit_codes import FINAL, STOPPED
from engine.launch import environment as forwarding
from engine.launch import verdict
from engine.launch.attempt import Attempt, say
from engine.launch.commands import MEETING_TIMEOUT_S, full_command
from engine.launch.meeting import OldMeetingPlace
from engine.launch.plan import LaunchPlan, environment
from engine.launch.signals import Signals
from engine.runtime.activity import FOLDER

RESTART = "HIGGS_ENGINE_RESTART"
"""Tells the ranks that they go on with a run, from its newest checkpoint, and for which time."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class Restarts:
    """
    Args:
        make_plan: made anew for each attempt, with the machines that the hostfile then names.
        env: the environment of this process.
        script, arguments: what the ranks run.
        limit: restarts that are allowed.
        latest: file whose content changes with each checkpoint; None: there are none.
        patience: of an attempt with ranks that are stopped.
    """

    def __init__(
        self, make_plan: Callable[[], LaunchPlan], env: Mapping[str, str], script: str, arguments: Sequence[str],
        limit: int, latest: Path | None = None, patience: float | None = None,
    ):  # fmt: skip
        self.make_plan, self.env = make_plan, env
        self.script, self.arguments, self.limit, self.latest = script, arguments, limit, latest
        self.patience = patience
        self._of_an_earlier_run = self._checkpoint()

    def run(self) -> int:
        """The exit code of the last attempt."""
        pause, number = FIRST_PAUSE_S, 0
        with Signals().listening() as signals:
            while True:
                before = self._checkpoint()
                plan = self.make_plan()
                place = OldMeetingPlace(plan.host, plan.port) if plan.meets_others else None
                code = self._attempt(number, plan, signals)
                if place:
                    place.attempt_is_over()
                if number == self.limit or signals.first or not _is_worth_another(code, plan):
                    return code
                number += 1
                pause = pause if self._checkpoint() == before else FIRST_PAUSE_S
                say(f"restart {number} of {self.limit} in {pause:.0f} s, after {code}, {verdict.meaning(code)}")
                if not self._pause(pause, place, signals):
                    return STOPPED
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _checkpoint(self) -> str | None:
        """The newest one's name. An attempt that made one got further: the pause after it is short again."""
        return self.latest.read_text() if self.latest and self.latest.is_file() else None

    def _attempt(self, number: int, plan: LaunchPlan, signals: Signals) -> int:
        with tempfile.TemporaryDirectory(prefix="higgs-engine-launch-") as folder:
            records = Path(folder, "records")
            records.mkdir()
            own = {name: value for name, value in self.env.items() if name != RESTART}
            own[FOLDER] = str(records)
            if number and (self._of_an_earlier_run is None or self._checkpoint() != self._of_an_earlier_run):
                own[RESTART] = str(number)
            env = environment(own, plan)
            if plan.by_ssh:
                file = Path(folder, "environment")
                lines = forwarding.own_lines(self.env, Path.cwd())
                forwarding.write_file(file, forwarding.forwarded(own), lines)
                env["DS_ENV_FILE"] = str(file)
            command = full_command(plan, self.script, self.arguments)
            return Attempt(command, env, records, plan.here, signals, self.patience).run()

    def _pause(self, seconds: float, place: OldMeetingPlace | None, signals: Signals) -> bool:
        """Waits, also for the end of the attempt on the first machine; False: a signal came."""
        now = time.monotonic()
        earliest, latest = now + seconds, now + MEETING_TIMEOUT_S
        while (now := time.monotonic()) < earliest or place and not place.is_gone() and now < latest:
            if signals.first:
                return False
            time.sleep(0.1)
        if place:
            place.close()
        return True


def _is_worth_another(code: int, plan: LaunchPlan) -> bool:
    """Told to stop, but not by us: by another machine, which then does not come again, or only one rank was told."""
    return code not in FINAL and not (code == STOPPED and plan.meets_others)
