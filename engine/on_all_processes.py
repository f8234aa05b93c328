"""What every long command does around its work on all processes: group, watchdog, signals, errors told together."""

from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_log

from engine.config import Settings
from engine.runtime.distributed import World, init_process_group, raise_together, shutdown
from engine.runtime.faults import in_words
from engine.runtime.signals import Response, StopRequests
from engine.runtime.watchdog import GOES_FIRST_S, Watchdog


def on_all_processes(settings: Settings, work: Callable[[World, StopRequests], int]) -> int:
    """Runs `work`, one process's part; every process of the launcher calls it with the same settings.

    Returns:
        The exit code that `work` returns (engine/exit_codes.py).

    Raises:
        EngineError: what any process raised, on all of them.
    """
    transformers_log.disable_progress_bar()
    world = init_process_group(settings.timeout_s + GOES_FIRST_S)
    stop = StopRequests(settings.max_train_hours)
    watchdog = Watchdog(world, settings.timeout_s, Path(settings.output_dir) / "stacks")
    with stop.listening():
        try:
            with watchdog.watching():
                code = work(world, stop)
        except Exception as error:
            stop.response = Response.NONE
            raise_together(world, in_words(error, watchdog.beats))
    shutdown(world)
    return code
