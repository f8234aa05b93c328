"""report.html of a run, written at every save and at its end."""

from engine.callbacks import Callback
from engine.report.page import write_report


class ReportWriter(Callback):
    """The main process writes; what goes wrong is said, and training goes on."""

    _unfinished = None

    def on_start(self, run, step):
        self._unfinished = run  # until it has come to its end

    def on_save(self, run, step, folder):
        self._write(run)

    def on_end(self, run, step, code):
        self._write(run)
        self._unfinished = None

    def close(self):
        """One that fails has a report too: of what it came to, up to its last line."""
        if self._unfinished is not None:
            self._write(self._unfinished)

    def _write(self, run) -> None:
        if not run.world.is_main:
            return
        try:
            write_report(run.output_dir)
        except Exception as error:
            run.say(f"note: report.html could not be written: {type(error).__name__}: {error}")
