"""How far the machines' clocks are apart, measured while rank 0 tells all ranks something at one moment.

Rank 0 sends a word and notes its clock; a rank that hears it notes its own. What the word took is half of each one's
round trip to the store. Of several words the one that took least counts. Good to a few milliseconds: logs of machines
are to be compared by eye, and certificates and tickets have to be valid.
"""

import time
from collections.abc import Iterator, Sequence

from engine.doctor.findings import OK, WARNING, Facts, Finding, machines
from engine.doctor.meeting import Meeting

WORDS = 3
BETWEEN_S = 0.01
TOLERATED_S = 1.0


def probe(meeting: Meeting) -> dict:
    """`times`: this clock at each word, sent by rank 0, heard by the others; `round_trip`: to the store, seconds."""
    times = []
    for _ in range(WORDS):
        if meeting.world.is_main:
            time.sleep(BETWEEN_S)
            times.append(time.time())
        meeting.tell(None)
        if not meeting.world.is_main:
            times.append(time.time())
    return {"times": times, "round_trip": _round_trip(meeting)}


def _round_trip(meeting: Meeting) -> float:
    if meeting.store is None:
        return 0.0
    taken = []
    for _ in range(WORDS):
        began = time.perf_counter()
        meeting.store.check(["no such key"])
        taken.append(time.perf_counter() - began)
    return min(taken)


def skews(everyone: Sequence[Facts]) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's."""
    first = everyone[0]["clock"]
    found = [0.0]
    for facts in everyone[1:]:
        clock = facts["clock"]
        lag = min(heard - sent for heard, sent in zip(clock["times"], first["times"], strict=True))
        found.append(lag - (clock["round_trip"] + first["round_trip"]) / 2)
    return found


def judge(everyone: Sequence[Facts]) -> Iterator[Finding]:
    ahead = {facts["rank"]: skew for facts, skew in zip(everyone, skews(everyone), strict=True)}
    hosts = machines(everyone)
    wrong = [facts for facts in hosts if abs(ahead[facts["rank"]]) > TOLERATED_S]
    for facts in wrong:
        skew = ahead[facts["rank"]]
        yield Finding(
            "machine", WARNING,
            f"clock: that of {facts['host']} (rank {facts['rank']}) is {abs(skew):,.1f} s "
            f"{'ahead of' if skew > 0 else 'behind'} that of {everyone[0]['host']} (rank 0)",
            "set them by NTP or chrony: logs and file times cannot be compared",
        )  # fmt: skip
    if len(hosts) > 1 and not wrong:
        largest = max(abs(ahead[facts["rank"]]) for facts in hosts)
        yield Finding("machine", OK, f"clocks: {largest * 1e3:.1f} ms apart at most, over {len(hosts)} machines")
