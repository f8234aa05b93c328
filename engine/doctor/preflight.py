"""The cheap part of the doctor's checks, which every training run makes first: software, machine, names, files.

Each rank gathers its own facts without asking anybody, in a tenth of a second. All facts go to rank 0 through the
rendezvous store, once; it judges, and tells all the verdict. No collective: a rank that is missing is named, not
awaited for half an hour.
"""

import dataclasses
import itertools
import socket
from collections.abc import Sequence

import torch.distributed as dist

from engine.config import Settings
from engine.doctor import clocks, filesystem, machine, network, software
from engine.doctor.filesystem import Traces
from engine.doctor.findings import FAILURE, Facts, Finding
from engine.doctor.meeting import Meeting
from engine.errors import ConfigError
from engine.runtime.distributed import World, shared_store

PATIENCE_S = 120.0
"""Ranks have met a moment ago; what can hold one up now is a file system that does not answer."""
SIGHT_S = 30.0
"""So long a new file may take to be seen on another machine."""

_calls = itertools.count()


def preflight(settings: Settings, world: World, patience_s: float = PATIENCE_S) -> list[Finding]:
    """Findings, the same on all ranks; every rank of an initialised run calls it, before anything is loaded.

    Raises:
        EngineError: a rank did not take part in `patience_s`.
    """
    store = dist.PrefixStore(f"preflight/{next(_calls)}", shared_store()) if world.size > 1 else None
    meeting = Meeting(store, world, min(patience_s, settings.timeout_s))
    traces = Traces(meeting)
    try:
        everyone = collect(traces, settings, own_facts(world, settings))
        findings = judge(everyone, connected=True) if everyone else []
        return [Finding(**found) for found in meeting.tell([dataclasses.asdict(f) for f in findings])]
    finally:
        traces.clear()


def require(findings: Sequence[Finding]) -> None:
    """Raises ConfigError if the run cannot succeed."""
    if failures := [str(finding) for finding in findings if finding.level == FAILURE]:
        raise ConfigError("these machines cannot run this training (higgs-engine doctor looks closer):", failures)


def own_facts(
    world: World, settings: Settings | None, problems: Sequence[str] = (), trouble: str | None = None
) -> Facts:
    """What a rank knows by itself.

    Args:
        problems: what is wrong with its settings.
        trouble: why it has no device.
    """
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "software": software.probe(world, settings, problems),
        "machine": machine.probe(world, trouble),
        "network": network.probe(),
    }


def collect(traces: Traces, settings: Settings | None, mine: Facts) -> list[Facts] | None:
    """Facts of all ranks, with their clocks and what they see of each other's files, on rank 0; None elsewhere."""
    meeting = traces.meeting
    sight_s = min(SIGHT_S, meeting.patience_s / 2)  # else those who wait for a file would be called missing
    meeting.greet()
    traces.start(settings)
    mine["clock"] = clocks.probe(meeting)
    mine["files"] = traces.probe(sight_s)
    if mine["files"] and meeting.world.is_main:
        kept = settings.save_total_limit
        mine["files"] |= {"checkpoint": filesystem.checkpoint_bytes(settings), "kept": kept}
    everyone = meeting.gather("facts", mine)
    traces.look_back(everyone, sight_s)
    return everyone


def judge(everyone: Sequence[Facts], connected: bool) -> list[Finding]:
    """`connected`: the ranks' process group works already."""
    return [
        *software.judge(everyone),
        *machine.judge(everyone),
        *clocks.judge(everyone),
        *network.judge(everyone, connected),
        *filesystem.judge(everyone),
    ]
