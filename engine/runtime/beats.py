"""Signs of life of all processes in the rendezvous store, and the word that the run is over.

A process is judged by whether its number of beats grows, never by its clock, which may differ from ours.
"""

import json
import time
from datetime import timedelta

from engine.runtime import activity
from engine.runtime.distributed import World, shared_store

INTERVAL_S = 1.0
ANSWER = timedelta(seconds=10)
OVER = "over"
PHASES = ("data", "forward", "backward", "optimizer")
"""In the order of a step; others come after them."""


class Beats:
    """One process's view of all; alone, of itself.

    Its methods raise dist.DistError when the store's host, rank 0 or a launcher, is gone.
    """

    def __init__(self, world: World):
        self.world, self.count = world, 0
        self._store = shared_store()
        self._store.set_timeout(ANSWER)
        self.publish()

    def publish(self) -> None:
        self.count += 1
        beat = activity.current.record() | {"beats": self.count, "idle": activity.current.idle_s}
        self._store.set(f"beat/{self.world.rank}", json.dumps(beat))

    def of(self, rank: int) -> dict | None:
        key = f"beat/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def all_twice(self) -> tuple[list[dict], list[dict]]:
        """All records, and again when whoever lives has given another sign of life."""
        first = self._all()
        deadline = time.monotonic() + 2.5 * INTERVAL_S
        while time.monotonic() < deadline:
            self.publish()
            time.sleep(INTERVAL_S / 2)
        return first, self._all()

    def _all(self) -> list[dict]:
        beats = map(self.of, range(self.world.size))
        return [beat for beat in beats if beat is not None]

    def announce(self, code: int, lines: list[str]) -> bool:
        """Says that the run is over, with which exit code and why; whether nobody has said so before."""
        if self._store.add(f"{OVER}/count", 1) > 1:
            return False
        self._store.set(OVER, json.dumps({"code": code, "lines": lines}))
        return True

    def over(self) -> dict | None:
        """What somebody announced: code and lines."""
        return json.loads(self._store.get(OVER)) if self._store.check([OVER]) else None


def silent(first: list[dict], second: list[dict]) -> list[dict]:
    """Of two looks at all records those without a sign of life in between."""
    beats = {record["rank"]: record["beats"] for record in first}
    return [record for record in second if record["beats"] == beats.get(record["rank"])]


def hanging(first: list[dict], second: list[dict], shown: int = 8) -> list[str]:
    """Who holds up the run, and what the others are doing.

    Held up it is by those that give no sign of life; else by who is furthest behind, since all the others wait for
    that one in a collective.
    """
    gone = silent(first, second)
    lines = [f"no sign of life of {activity.describe(record, record['idle'])} when last heard" for record in gone]
    alive = sorted((record for record in second if record not in gone), key=_place)
    if not gone and len(alive) > 1 and _place(alive[0])[:2] < _place(alive[1])[:2]:
        lines.append(f"held up by {activity.describe(alive[0], alive[0]['idle'])}")
        alive = alive[1:]
    lines += [activity.describe(record, record["idle"]) for record in alive[:shown]]
    return lines + [f"and {len(alive) - shown} more"] * (len(alive) > shown)


def _place(record: dict) -> tuple[float, int, int]:
    """How far a process has come: step, phase; its rank, so that all name the same one."""
    step = float("inf") if record["step"] is None else record["step"]
    phase = PHASES.index(record["phase"]) if record["phase"] in PHASES else len(PHASES)
    return step, phase, record["rank"]
