"""The output folder: one place for all machines, writable by each, where what one writes the others see.

Rank 0 writes a small hidden file in the output folder, or above it where there is none yet; the first rank of each
machine looks for it and writes one of its own, which rank 0 looks for. Everything is removed again.
"""

import contextlib
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from engine.config import Settings
from engine.doctor.findings import FAILURE, OK, WARNING, Facts, Finding, who
from engine.doctor.meeting import Meeting
from engine.errors import ModelError
from engine.model.tensor_files import weight_files

GIB = 2**30
SMALLEST = 256 * 2**20
"""Room for what any run writes: adapters, metrics, logs."""
SLOW_SIGHT_S = 1.0
MOMENT_BYTES = {"fp32": 8.0, "bf16": 4.0, "int8": 2.1}


class Traces:
    """Files of this rank in the place that is looked at; `clear` leaves nothing behind.

    Attributes:
        word: what rank 0 said of the place, None without settings.
        looks: whether this rank stands for its machine.
        sees: whether it has seen rank 0's file.
    """

    def __init__(self, meeting: Meeting):
        self.meeting, self.world = meeting, meeting.world
        self.word: dict | None = None
        self.looks = self.world.local_rank == 0 or self.world.is_main
        self.sees = self.world.is_main
        self._mine: list[Path] = []

    def start(self, settings: Settings | None) -> dict | None:
        """Where all will look and for what, as rank 0 says; None without settings."""
        word = None
        if self.world.is_main and settings is not None:
            place = existing(Path(settings.output_dir))
            word = {"output_dir": settings.output_dir, "place": str(place), "name": f".doctor-{secrets.token_hex(8)}"}
            word["error"] = self._write(place / f"{word['name']}-0", word["name"])
        self.word = self.meeting.tell(word)
        return self.word

    def probe(self, patience_s: float) -> dict | None:
        """What this rank sees of rank 0's file, and whether it can write."""
        if self.word is None or not self.looks:
            return None
        place, name = Path(self.word["place"]), self.word["name"]
        error, sight = self.word["error"], 0.0
        if not self.world.is_main:
            error = self._write(place / f"{name}-{self.world.rank}", name)
            sight = _sight(place / f"{name}-0", name, patience_s) if not self.word["error"] else None
            self.sees = sight is not None
        free = None
        with contextlib.suppress(OSError):
            free = psutil.disk_usage(str(place)).free
        return {**self.word, "there": os.path.isdir(place), "error": error, "sight": sight, "free": free}

    def look_back(self, everyone: Sequence[Facts] | None, patience_s: float) -> None:
        """Rank 0: which of the others' files it sees, added to their facts as `seen`."""
        deadline = time.monotonic() + patience_s
        for facts in everyone or ():
            if facts["files"] and not facts["files"]["error"] and facts["rank"]:
                file = Path(self.word["place"]) / f"{self.word['name']}-{facts['rank']}"
                facts["files"]["seen"] = _sight(file, self.word["name"], deadline - time.monotonic()) is not None

    def _write(self, file: Path, text: str) -> str | None:
        """What went wrong, if it did."""
        try:
            with open(file, "x") as opened:
                self._mine.append(file)
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            return error.strerror or str(error)
        return None

    def clear(self) -> None:
        while self._mine:
            with contextlib.suppress(OSError):
                self._mine.pop().unlink()


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there and may be looked into."""
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))


def _sight(file: Path, text: str, patience_s: float) -> float | None:
    """Seconds until the file is there with its text; None: not in time. Network file systems take a while."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                return time.monotonic() - began
        if time.monotonic() - began >= patience_s:
            return None
        time.sleep(0.02)


# ---------------------------------------------------------------- what a run will write


def checkpoint_bytes(settings: Settings) -> int | None:
    """Of a full run's checkpoint: fp32 weights and moments; None: unknown, or adapters only.

    Where parts are frozen, only that all weights are there in 16 bits is sure.
    """
    if settings.use_lora or not settings.model_path:
        return None
    parameters = stored_parameters(Path(settings.model_path))
    if parameters is None:
        return None
    if settings.train_modules or settings.freeze_llm:
        return 2 * parameters
    return int(parameters * (4 + MOMENT_BYTES[settings.optimizer_state_dtype]))


def stored_parameters(folder: Path) -> int | None:
    """Numbers in a model folder's safetensors files, from their headers alone; None without any that can be read."""
    total = 0
    try:
        for file in weight_files(folder, "see the model folder"):
            with safe_open(str(file), framework="pt") as opened:
                total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())
    except (ModelError, OSError, SafetensorError):
        return None
    return total or None


# ---------------------------------------------------------------- judged, over all ranks


def judge(everyone: Sequence[Facts]) -> Iterator[Finding]:
    looked = [facts for facts in everyone if facts["files"]]
    if not looked:
        return
    about = looked[0]["files"]
    where = f"output_dir: {about['output_dir']}"
    where += "" if about["place"] == about["output_dir"] else f" (not there yet; looked at {about['place']})"
    absent = [facts for facts in looked if not facts["files"]["there"]]
    if absent:
        yield Finding(
            "files", FAILURE, f"{where} does not exist for {who(absent, everyone)}",
            "mount the shared file system there too, under the same path",
        )  # fmt: skip
    refused: dict[str, list[Facts]] = {}
    for facts in looked:
        if facts["files"]["error"] and facts not in absent:
            refused.setdefault(facts["files"]["error"], []).append(facts)
    for error, ranks in refused.items():
        yield Finding(
            "files", FAILURE, f"{where}: {who(ranks, everyone)} cannot write there: {error}",
            "give a folder that all machines may write to",
        )  # fmt: skip
    shared = yield from _seen([facts for facts in looked if facts not in absent], everyone, where)
    if not absent and not refused and shared:
        slowest = max(facts["files"]["sight"] or 0.0 for facts in looked)
        seen = f", seen by {len(looked)} machines within {slowest * 1e3:.0f} ms" if len(looked) > 1 else ""
        yield Finding("files", OK, f"{where}: writable{seen}")
    yield from _room(looked, where)


def _seen(looked: Sequence[Facts], everyone: Sequence[Facts], where: str) -> Iterator[Finding]:
    """Returns whether every machine sees what rank 0 writes, and rank 0 what they write."""
    blind, unseen, slow = [], [], []
    for facts in looked:
        about = facts["files"]
        if not facts["rank"] or everyone[0]["files"]["error"]:
            continue
        if about["sight"] is None:
            blind.append(facts)
        elif about.get("seen") is False:
            unseen.append(facts)
        elif about["sight"] > SLOW_SIGHT_S:
            slow.append(facts)
    remedy = "put output_dir on a file system that all machines share (NFS, Lustre, ...), under the same path"
    writer = who([everyone[0]], everyone)
    if blind:
        text = f"{where} is not shared: what {writer} wrote is not seen by {who(blind, everyone)}"
        yield Finding("files", FAILURE, text, remedy)
    if unseen:
        text = f"{where} is not shared: {writer} does not see what was written by {who(unseen, everyone)}"
        yield Finding("files", FAILURE, text, remedy)
    if slow:
        longest = max(facts["files"]["sight"] for facts in slow)
        yield Finding(
            "files", WARNING, f"{where}: {who(slow, everyone)} saw a new file after {longest:.1f} s only",
            "saves wait for that; mount it with a shorter attribute cache (NFS: actimeo=1, lookupcache=positive)",
        )  # fmt: skip
    return not blind and not unseen


def _room(looked: Sequence[Facts], where: str) -> Iterator[Finding]:
    """Free space against the size of a checkpoint, where that is known."""
    free = [facts["files"]["free"] for facts in looked if facts["files"]["free"] is not None]
    if not free:
        return
    least, needed = min(free), looked[0]["files"].get("checkpoint")
    kept = looked[0]["files"].get("kept") or 1  # beside them the best one, and the one being written
    size = f"a checkpoint takes about {needed / GIB:,.1f} GiB" if needed else f"any run needs {SMALLEST / GIB:,.2f} GiB"
    if least < (needed or SMALLEST):
        text = f"{where}: {least / GIB:,.2f} GiB are free, {size}"
        yield Finding("files", FAILURE, text, "make room, or give another output_dir")
    elif needed and least < needed * (kept + 2):
        yield Finding(
            "files", WARNING, f"{where}: {least / GIB:,.1f} GiB are free, {size}, up to {kept + 2} are there at once",
            "make room, or lower save_total_limit",
        )  # fmt: skip
    else:
        yield Finding("files", OK, f"free: {least / GIB:,.1f} GiB, {size}")
