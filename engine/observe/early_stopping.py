"""Ends a run whose held-out loss has stopped falling (`early_stopping_patience`)."""

import math

from engine.callbacks import Callback
from engine.observe import journal
from engine.observe.metrics import FILE
from engine.runtime.distributed import on_main


class EarlyStopping(Callback):
    """Asks the run to stop after `patience` evaluations in a row that were not better than the best before.

    A resumed run goes on counting from the evaluations in `metrics.jsonl`.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.best, self.best_step, self.worse = math.inf, 0, 0

    def on_start(self, run, step):
        def earlier() -> list[tuple[int, float | None]]:
            lines = journal.read(run.output_dir / FILE)
            return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line and line["step"] <= step]

        for at, loss in on_main(run.world, earlier):
            self._count(at, loss)

    def _count(self, step: int, loss: float | None) -> None:
        if loss is not None and loss < self.best:
            self.best, self.best_step, self.worse = loss, step, 0
        else:
            self.worse += 1

    def on_evaluate(self, run, step, values):
        self._count(step, values["loss"])
        if self.worse >= self.patience:
            run.ask_to_stop(
                f"the held-out loss has not fallen for {self.worse} evaluation(s); the best was {self.best:.4f} at "
                f"step {self.best_step} (early_stopping_patience)"
            )
