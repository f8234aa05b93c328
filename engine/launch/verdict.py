"""How the ranks of this machine ended, and the exit code that follows; launchers garble codes, torchrun to 1 always.

The ranks' own records tell (engine/runtime/activity.py): one with a code ended by itself, one without was ended.
"""

import signal
from collections.abc import Mapping, Sequence

from engine.exit_codes import DIVERGED, DONE, FAILED, HUNG, MISTAKE, STOPPED, TIME_IS_UP
from engine.runtime.activity import describe

TELLING = (MISTAKE, DIVERGED, HUNG, FAILED)
"""Of several codes the first of these: what its reader has to know before anything else."""
NAMES = {
    DONE: "done",
    FAILED: "failed",
    MISTAKE: "a mistake that its reader can mend",
    DIVERGED: "diverged",
    HUNG: "no progress",
    STOPPED: "left, as asked",
    TIME_IS_UP: "saved and left: time is up",
}


def exit_code(records: Sequence[dict], expected: int | None, launcher: int) -> int:
    """
    Args:
        records: of the ranks of this machine, all of which have ended.
        expected: how many of them there should be; None: not known, as some may be elsewhere.
        launcher: its own code, negative for the signal that ended it.
    """
    launcher = launcher if launcher >= 0 else 128 - launcher
    if not records:
        return launcher
    codes = [record["code"] for record in records]
    for code in TELLING:
        if code in codes:
            return code
    if None in codes:
        return FAILED  # killed, whatever the launcher makes of that
    if len(set(codes)) == 1 and (expected == len(codes) or codes[0] != DONE):
        return codes[0]
    return next(filter(None, codes), launcher)


def killed(records: Sequence[dict], ended: Mapping[int, float]) -> list[dict]:
    """The ranks that something killed; not those that a launcher ended because another rank had ended badly.

    Args:
        ended: rank -> time.time() when it ended.
    """
    bad = [ended[record["rank"]] for record in records if record["code"] != DONE and record["rank"] in ended]
    first = [
        record for record in records if record["rank"] in ended and ended[record["rank"]] == min(bad, default=None)
    ]
    return first if all(record["code"] is None for record in first) else []


def table(records: Sequence[dict], ended: Mapping[int, float]) -> list[str]:
    """What killed ranks were doing, then a line for each rank."""
    by_whom = killed(records, ended)
    rows = [("rank", "host", "step", "phase", "ended")]
    for record in records:
        step = "" if record["step"] is None else str(record["step"])
        how = how_it_ended(record["code"], record in by_whom)
        rows.append((str(record["rank"]), record["host"], step, record["phase"], how))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[4]]) for row in rows]
    ages = [max(ended[record["rank"]] - record["since"], 0.0) for record in by_whom]
    return [f"killed from outside: {describe(*found)}" for found in zip(by_whom, ages, strict=True)] + lines


def how_it_ended(code: int | None, was_killed: bool) -> str:
    if code is None:
        return (
            "killed from outside (kill -9, out of memory, ...)" if was_killed else "ended from outside, after another"
        )
    return f"exit code {code}, {meaning(code)}"


def meaning(code: int) -> str:
    if code > 128 and code - 128 in set(signal.Signals):
        return f"by {signal.Signals(code - 128).name}"
    return NAMES.get(code, "not one of the engine's codes")
