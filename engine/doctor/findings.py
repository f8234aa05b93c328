"""What a check found, and words for who has it.

A check is two functions. `probe` runs on a rank and returns its facts, plain JSON. `judge` gets the facts of all ranks
in their order and returns findings; it looks at nothing else, so that every verdict can be tested without a cluster.
A rank's facts carry `rank` and `host`, and one entry for each file of this package that adds to them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

OK, WARNING, FAILURE = "ok", "warning", "failure"
NAMED_HOSTS = 4
"""Machines that one line names; more are counted."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        section: what was looked at, as the report's headings say.
        level: OK, WARNING (it works, but badly or perhaps not for long) or FAILURE (training would fail or go wrong).
        text: what, with rank and host.
        remedy: what to do about it.
    """

    section: str
    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text} → {self.remedy}" if self.remedy else self.text


def who(some: Sequence[Facts], everyone: Sequence[Facts]) -> str:
    """`rank 1 (node-b)`, `ranks 0-7 (node-a), 9 (node-b)`, `all 16 ranks`."""
    if len(some) == len(everyone) > 1:
        return f"all {len(some)} ranks"
    by_host: dict[str, list[int]] = {}
    for facts in some:
        by_host.setdefault(facts["host"], []).append(facts["rank"])
    parts = [f"{ranges(ranks)} ({host})" for host, ranks in list(by_host.items())[:NAMED_HOSTS]]
    more = len(by_host) - NAMED_HOSTS
    return f"rank{'s' * (len(some) > 1)} {', '.join(parts)}" + (f" and {more} more machines" if more > 0 else "")


def named(hosts: Sequence[Facts]) -> str:
    """`node-a, node-b and 7 more machines`."""
    more = len(hosts) - NAMED_HOSTS
    names = ", ".join(facts["host"] for facts in hosts[:NAMED_HOSTS])
    return names + (f" and {more} more machines" if more > 0 else "")


def ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def machines(everyone: Sequence[Facts]) -> list[Facts]:
    """The facts of the first rank of each machine."""
    return list({facts["host"]: facts for facts in reversed(everyone)}.values())[::-1]


def deviants(
    everyone: Sequence[Facts], value: Callable[[Facts], Any], among: Sequence[Facts] | None = None
) -> tuple[Any, Iterator[tuple[Any, str]]]:
    """The value that most ranks have (of equally many, that of the lowest), and each other one with who has it.

    Args:
        among: the ranks that know; default: all.
    """
    groups: dict[str, list[Facts]] = {}
    among = everyone if among is None else among
    for facts in among:
        groups.setdefault(json.dumps(value(facts), sort_keys=True), []).append(facts)
    usual = max(groups, key=lambda key: len(groups[key]))  # the first of equals: dicts keep their order
    others = ((json.loads(key), who(group, everyone)) for key, group in groups.items() if key != usual)
    return json.loads(usual), others


def worst(findings: Sequence[Finding]) -> str:
    levels = {finding.level for finding in findings}
    return next((level for level in (FAILURE, WARNING) if level in levels), OK)
