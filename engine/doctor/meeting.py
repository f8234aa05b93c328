"""Ranks exchange small messages over the rendezvous store, each wait bounded, and learn who is missing.

Nothing here needs gloo or NCCL: where those cannot connect, the store alone can still say why. Rank 0 asks and decides,
the others answer: a round takes each rank one or two messages, however many ranks there are.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from engine.doctor.findings import ranges
from engine.errors import EngineError
from engine.runtime.distributed import World

LONGEST_PAUSE_S = 0.05
REST_S = 5.0
"""At the end rank 0, which may hold the store, waits so long for the others to have heard it."""


class Meeting:
    """Every rank has one and makes the same calls.

    Args:
        store: of all ranks; None for a single process.
        patience_s: how long rank 0 waits for the slowest.
    """

    def __init__(self, store: dist.Store | None, world: World, patience_s: float):
        self.store, self.world, self.patience_s = store, world, patience_s
        self._words = 0
        self._hosts: dict[int, str] = {}

    def gather(self, name: str, value: Any, patience_s: float | None = None) -> list[Any] | None:
        """What all ranks give, in their order, on rank 0; None elsewhere.

        Raises:
            EngineError: ranks are missing; rank 0 raises it, and so do the others in their next `hear`.
        """
        if self.store is None:
            return [value]
        self.store.set(f"{name}/{self.world.rank}", json.dumps(value))
        if not self.world.is_main:
            return None
        keys = [f"{name}/{rank}" for rank in range(self.world.size)]
        patience = self.patience_s if patience_s is None else patience_s
        if missing := self._await(keys, patience):
            problem = self._absence(name, missing, patience)
            self._say({"failure": problem})
            raise EngineError(problem)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def _await(self, keys: Sequence[str], patience_s: float) -> list[int]:
        """Numbers of the keys that nobody has set in time. It looks again and again: a signal is heard meanwhile."""
        deadline, pause = time.monotonic() + patience_s, 0.001
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return [number for number, key in enumerate(keys) if not self.store.check([key])]
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
        return []

    def greet(self) -> None:
        """All ranks are here, and rank 0 knows the name of each one's machine.

        Raises:
            EngineError: as `gather`; it says who is here.
        """
        hosts = self.gather("here", socket.gethostname())
        self._hosts = dict(enumerate(hosts or []))
        self.tell(None)

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.store is None:
            return value
        if self.world.is_main:
            self._say({"value": value})
            return value
        return self._hear()

    def _say(self, word: dict) -> None:
        self.store.set(f"word/{self._words}", json.dumps(word))
        self._words += 1

    def _hear(self) -> Any:
        key = f"word/{self._words}"
        self._words += 1
        patience = 2 * self.patience_s + REST_S  # rank 0 may be waiting itself, and then says for whom
        try:
            self.store.wait([key], timedelta(seconds=patience))
            word = json.loads(self.store.get(key))
        except dist.DistError as lost:
            error = EngineError(
                f"rank {self.world.rank} ({socket.gethostname()}): rank 0 has ended or has not answered in "
                f"{patience:.0f} s → see what rank 0 said."
            )
            error.spokesman = self.world.rank
            raise error from lost
        if "failure" in word:
            raise EngineError(word["failure"])
        return word["value"]

    def _absence(self, name: str, missing: Sequence[int], patience: float) -> str:
        """Who is here, who is not, what to do."""
        known = self._hosts or {
            rank: json.loads(self.store.get(f"{name}/{rank}"))
            for rank in range(self.world.size)
            if rank not in missing and name == "here"
        }
        absent = f"rank{'s' * (len(missing) > 1)} {ranges(missing)}"
        if self._hosts:
            places = ", ".join(dict.fromkeys(known[rank] for rank in missing))
            return (
                f"{absent} ({places}) had come, but did not get through '{name}' in {patience:.0f} s → see what they "
                "said; is the machine alive, does its file system answer?"
            )
        by_host: dict[str, list[int]] = {}
        for rank, host in known.items():
            by_host.setdefault(host, []).append(rank)
        present = ", ".join(f"{host} (rank{'s' * (len(r) > 1)} {ranges(r)})" for host, r in by_host.items())
        return (
            f"{self.world.size} processes are expected; {absent} did not come in {patience:.0f} s. Here: {present} → "
            "were the others started, and do they reach the first machine at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}? They say so themselves if not."
        )

    def close(self) -> None:
        """Nobody leaves before all have heard the last word; without complaint about those who do not come."""
        if self.store is None:
            return
        self.store.set(f"bye/{self.world.rank}", "")
        if self.world.is_main:
            self._await([f"bye/{rank}" for rank in range(self.world.size)], REST_S)


def open_store(world: World, patience_s: float) -> dist.Store | None:
    """The store of the launcher, or of rank 0, reached in `patience_s`; None for a single process.

    torch's own rendezvous has rank 0 wait for all and then tells only how many came.

    Raises:
        EngineError: it cannot be reached, with the reason that this machine sees.
    """
    if world.size == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts_it = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = timedelta(seconds=patience_s)
    began = time.monotonic()
    try:
        if not hosts_it:
            _await_door(host, port, patience_s)
        store = dist.TCPStore(host, port, world.size, hosts_it, patience, wait_for_workers=False)
    except (OSError, dist.DistError, RuntimeError) as error:
        what = "cannot be opened here" if hosts_it else "cannot be reached"
        remedy = (
            "give another MASTER_PORT, and as MASTER_ADDR a name or address of this machine"
            if hosts_it
            else "is rank 0 started, is MASTER_ADDR its machine as seen from here, and does no firewall close the port?"
        )
        failure = EngineError(
            f"rank {world.rank} ({socket.gethostname()}): the meeting place MASTER_ADDR={host}, MASTER_PORT={port}, "
            f"which is {_address(host)} here, {what}: {error} (after {time.monotonic() - began:.0f} s) → {remedy}"
        )
        failure.spokesman = world.rank
        raise failure from None
    return dist.PrefixStore("doctor", store)


def _await_door(host: str, port: int, patience_s: float) -> None:
    """Returns when something listens there; its own error says more than the store's 'timed out'.

    Raises:
        OSError: nothing did in time, or the name means nothing.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(10.0, patience_s)):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _address(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return "no known address"
