"""An exception in the middle of a run, in words: on which rank, at which step, in which phase, and what to do.

What was foreseen becomes an Interrupted, which a restart may mend: memory is fragmented, disks and networks stumble.
What nobody foresaw stays as it is, with its traceback, after a line that says where it happened.
"""

import re

import torch
import torch.distributed as dist

from engine.errors import EngineError, Interrupted
from engine.exit_codes import FAILED
from engine.runtime import activity
from engine.runtime.beats import Beats, silent
from engine.runtime.watchdog import say

LOST_PEER = re.compile(r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|socket timeout", re.I)
OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory", re.I)
LOADER_WORKER = "DataLoader worker (pid"
ENDED_BY_LAUNCHER = re.compile(r"DataLoader worker \(pid.*killed by signal: Terminated")
"""A launcher that gives up tells a rank's own processes too, of which torch then complains."""
LESS_MEMORY = (
    "lower max_tokens_per_micro_batch, set gradient_checkpointing to full, or see `higgs-engine plan` for what fits; "
    "then resume with --resume auto"
)


def in_words(error: Exception, beats: Beats) -> Exception:
    """The error to end the run with; the other processes are told, if it is ours alone."""
    where = activity.describe(activity.current.record(), activity.current.idle_s)
    told = _translated(error, where, beats)
    if told is error and not isinstance(error, EngineError):
        say([f"{where}: {type(error).__name__}"])
    try:
        _announce(told, beats)
    except dist.DistError:
        pass  # then nobody is left to be told
    return told


def _announce(told: Exception, beats: Beats) -> None:
    try:
        beats.announce(getattr(told, "code", FAILED), str(told).splitlines())
    except RuntimeError as error:
        if LOADER_WORKER not in str(error):
            raise
        # torch's signal handler says once, wherever the process is, that a worker has died; that is told already
        beats.announce(getattr(told, "code", FAILED), str(told).splitlines())


def _translated(error: Exception, where: str, beats: Beats) -> Exception:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, EngineError):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(text):
        return Interrupted(f"{where}: out of memory → {LESS_MEMORY}", [first])
    if ENDED_BY_LAUNCHER.search(text):
        return Interrupted(f"{where}: the launcher ends this process → --resume auto", _gone(beats))
    cut_off = isinstance(error, (ConnectionError, EOFError)) and activity.current.phase == "data"
    if LOADER_WORKER in text or cut_off:
        remedy = "where the machine is short of memory, lower dataloader_num_workers"
        return Interrupted(f"{where}: a process that makes batches was killed → {remedy}; --resume auto", [first])
    if isinstance(error, OSError):
        return Interrupted(f"{where}: {error} → mend the disk or the network, then --resume auto")
    if isinstance(error, dist.DistError) or LOST_PEER.search(text):
        if gone := _gone(beats):
            return Interrupted(f"{where}: another process is gone → --resume auto", [*gone, first])
    return error


def _gone(beats: Beats) -> list[str]:
    """Who no longer answers, now that a collective has failed."""
    try:
        if over := beats.over():
            return over["lines"]
        gone = silent(*beats.all_twice())
        return [f"no sign of life of {activity.describe(record, record['idle'])} when last heard" for record in gone]
    except dist.DistError:
        return ["rank 0 or its launcher, which keeps the rendezvous store, has ended"]
