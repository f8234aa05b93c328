"""How a training process ends, as its launcher and a batch system see it (README: exit codes)."""

DONE = 0
FAILED = 1
"""Something unforeseen; a traceback says what. Started again where restarts are allowed."""
MISTAKE = 2
"""What its reader has to mend: settings, data, model, checkpoint. The same start would fail again."""
DIVERGED = 3
"""Too many steps in a row whose numbers went wrong (skipped_steps.jsonl in the output folder)."""
HUNG = 4
"""No progress in `timeout_s`; the message names the process that held up the others. Started again."""
STOPPED = 75
"""A signal asked for it: saved, if there was anything to save, and `--resume auto` goes on. The code of batch systems
for "try again later"."""
TIME_IS_UP = 76
"""`max_train_hours` are over: saved, and `--resume auto` goes on."""

FINAL = frozenset({DONE, MISTAKE, DIVERGED, TIME_IS_UP})
"""After these a restart would be of no use."""
