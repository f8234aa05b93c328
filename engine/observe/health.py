"""Watches the numbers of a run: skipped steps are counted, searched and reported, odd losses told of.

Nothing here waits for the device but at a logged step and before a save, where all processes make the same calls.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from engine.config import Settings
from engine.data.batches import Step
from engine.data.dataset import Dataset
from engine.data.packing import PackedBatch
from engine.higgs_engine import HiggsEngine, StepResult, Targets
from engine.observe import nonfinite
from engine.observe.alarms import Alarms, Sizes
from engine.observe.skipped import FILE, Skipped, SkippedSteps, describe
from engine.runtime import activity

IN_A_ROW = 2
"""Skipped steps that are no single accident any more."""


class Health:
    """Every process of a run has one.

    Args:
        data: trained on.
        share_of: this process's batches of a step, and the targets of the whole step, to run it once more.
        say: prints a line, on the main process.
        resumed_step: the report keeps nothing of later ones.
    """

    def __init__(
        self,
        settings: Settings,
        engine: HiggsEngine,
        data: Dataset,
        share_of: Callable[[Step], tuple[Iterable[PackedBatch], Targets]],
        say: Callable[[str], None],
        resumed_step: int = 0,
    ):
        self.settings, self.engine, self.data, self.share_of, self.say = settings, engine, data, share_of, say
        file = Path(settings.output_dir) / FILE if engine.world.is_main else None
        self.skipped = SkippedSteps(settings.max_skipped_steps, file, resumed_step, say)
        sizes = Sizes(engine.config.vocab_size, engine.config.codebook_size, engine.config.num_codebooks)
        self.alarms = Alarms(sizes, settings.warmup_steps, repeats=settings.data_weights is not None)

    def add(self, step: Step, learning_rate: float, result: StepResult) -> None:
        """A step was taken, or skipped."""
        self.skipped.add(step, learning_rate, result)

    def report(self) -> dict:
        """At a logged step: reports the steps skipped since the last one.

        Returns:
            skipped_steps: of the whole run.
        """
        records = [skipped.record(self.data, self._search(skipped)) for skipped in self.skipped.read()]
        self.skipped.write(records)
        for record in records:
            self.say(describe(record))
        return {"skipped_steps": self.engine.backend.guard.counts()[0]}

    def require_progress(self) -> None:
        """After `report`: raises Diverged, on all processes, if too many steps in a row were skipped."""
        self.skipped.require_progress(self.engine.backend.guard.last_good())

    def may_save(self) -> bool:
        """False while steps in a row are skipped: the weights may be what is wrong, though they are finite.

        Older checkpoints would be pruned for newer ones that hold nothing new. Waits for the device.
        """
        row = self.engine.backend.guard.counts()[1]
        if row >= IN_A_ROW:
            self.say(f"not saved: the last {row} steps were skipped, the weights are those of before")
        return row < IN_A_ROW

    def _search(self, skipped: Skipped) -> dict | None:
        if not self.skipped.searches(skipped):
            return None
        found = nonfinite.search(self.engine, *self.share_of(skipped.step))
        activity.current.enter("log")
        per_row = self.settings.processes_per_row
        return nonfinite.named(found, skipped.step, self.engine.world.size // per_row, per_row, self.data.names)

    def alarm(self, values: dict) -> dict:
        """Of a logged step's values: `alarm`, what is new, if anything is; printed as well."""
        return self._told(self.alarms.of_training(values))

    def alarm_held_out(self, values: dict, targets: int) -> dict:
        """The same of held-out losses, with the number of audio targets of each codebook behind them."""
        return self._told(self.alarms.of_evaluation(values["codebook_losses"], targets))

    def _told(self, lines: list[str]) -> dict:
        for line in lines:
            self.say(f"ALARM: {line}")
        return {"alarm": lines} if lines else {}
