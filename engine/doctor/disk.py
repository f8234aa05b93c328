"""Two things that checkpoints rely on, tried out: renaming is atomic for all machines, and fsync takes reasonable time.

Rank 0 renames one file over another again and again while others read it: each reading has to be one whole content.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.doctor.filesystem import Traces
from engine.doctor.findings import FAILURE, OK, WARNING, Facts, Finding, who

RENAMES_S = 0.3
SIZE = 1 << 16
CONTENTS = (b"a" * SIZE, b"b" * SIZE)
SYNCS = 5
BULK = 32 << 20
SLOW_SYNC_S = 0.5
SLOW_BYTES_PER_S = 50e6


def probe(traces: Traces) -> dict | None:
    """All ranks call it; those that look at files take part. Leaves nothing behind."""
    if traces.word is None:
        return None
    place, name = Path(traces.word["place"]), traces.word["name"]
    target, draft = place / f"{name}-renamed", place / f"{name}-draft"
    meeting, world = traces.meeting, traces.world
    error = None
    try:
        if world.is_main:
            error = _attempt(lambda: target.write_bytes(CONTENTS[0]))
        if meeting.tell(error):
            return None  # cannot be written, which has been said
        found = {}
        if world.is_main:
            error = _attempt(lambda: found.update(renames=_rename(target, draft)))
        elif traces.sees or not traces.looks and world.rank == 1:
            found = _read(target)
        meeting.gather("renamed", None)
        meeting.tell(None)
        if traces.sees:
            error = _attempt(lambda: found.update(_speed(place / f"{name}-bulk-{world.rank}")))
        return found | {"error": error}
    finally:
        if world.is_main:
            for file in (target, draft):
                with contextlib.suppress(OSError):
                    file.unlink()


def _attempt(work) -> str | None:
    try:
        work()
    except OSError as error:
        return str(error)
    return None


def _rename(target: Path, draft: Path) -> int:
    began, count = time.monotonic(), 0
    while time.monotonic() - began < RENAMES_S:
        count += 1
        draft.write_bytes(CONTENTS[count % 2])
        os.replace(draft, target)
    return count


def _read(target: Path) -> dict:
    """How often it was read, and what was wrong with how many readings."""
    began, count, wrong = time.monotonic(), 0, {}
    while time.monotonic() - began < RENAMES_S:
        count += 1
        try:
            content = target.read_bytes()
            what = None if content in CONTENTS else "a mixture" if len(content) == SIZE else "a part of a file"
        except FileNotFoundError:
            what = "no file"
        except OSError as error:
            what = error.strerror or str(error)
        if what:
            wrong[what] = wrong.get(what, 0) + 1
    return {"readings": count, "wrong": wrong}


def _speed(file: Path) -> dict:
    """Median seconds of an fsync after a small write, and bytes a second of a larger file brought to the disk."""
    block, taken = os.urandom(1 << 20), []
    try:
        with open(file, "wb") as opened:
            for _ in range(SYNCS):
                opened.write(block[:4096])
                began = time.perf_counter()
                opened.flush()
                os.fsync(opened.fileno())
                taken.append(time.perf_counter() - began)
            began = time.perf_counter()
            for _ in range(BULK // len(block)):
                opened.write(block)
            opened.flush()
            os.fsync(opened.fileno())
        return {"fsync": sorted(taken)[SYNCS // 2], "rate": BULK / (time.perf_counter() - began)}
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def judge(everyone: Sequence[Facts]) -> Iterator[Finding]:
    readers = [facts for facts in everyone if (facts["disk"] or {}).get("readings")]
    for facts in readers:
        for what, times in facts["disk"]["wrong"].items():
            yield Finding(
                "files", FAILURE,
                f"rename: is not atomic: {who([facts], everyone)} found {what} in {times} of "
                f"{facts['disk']['readings']} readings while {who(everyone[:1], everyone)} renamed",
                "put output_dir on another file system, or mount this one without caching of names",
            )  # fmt: skip
    if readers and not any(facts["disk"]["wrong"] for facts in readers):
        renames, readings = everyone[0]["disk"].get("renames", 0), sum(facts["disk"]["readings"] for facts in readers)
        yield Finding("files", OK, f"rename: atomic ({renames} renames, {readings} whole readings)")
    for facts in everyone:
        if (facts["disk"] or {}).get("error"):
            text = f"output_dir: {who([facts], everyone)}: {facts['disk']['error']}"
            yield Finding("files", FAILURE, text, "mend the file system, or give another output_dir")
    timed = [facts for facts in everyone if (facts["disk"] or {}).get("fsync") is not None]
    slow = [f for f in timed if f["disk"]["fsync"] > SLOW_SYNC_S or f["disk"]["rate"] < SLOW_BYTES_PER_S]
    if timed:
        longest, least = max(f["disk"]["fsync"] for f in timed), min(f["disk"]["rate"] for f in timed)
        text = f"write: {least / 1e6:,.0f} MB/s for each machine at once, fsync {longest * 1e3:.1f} ms"
        if slow:
            remedy = "saves will be slow: a faster file system, or async_save"
            yield Finding("files", WARNING, f"{text} ({who(slow, everyone)})", remedy)
        else:
            yield Finding("files", OK, text)
