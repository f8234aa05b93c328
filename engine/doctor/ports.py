"""Whether machines reach each other's ports: one rank of each listens where gloo would, and calls the others.

gloo and NCCL take ports from the whole range that the system hands out, so a firewall must leave it open.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.doctor.findings import FAILURE, OK, Facts, Finding, machines
from engine.doctor.meeting import Meeting
from engine.doctor.network import is_loopback, of_gloo

CALLED = 16
"""Machines that each calls, the next ones in order; with up to 16 others, all of them."""
ANSWER_S = 3.0


def probe(meeting: Meeting, network: dict) -> list[dict] | None:
    """Calls that found nobody, as rank, address and error; None on a rank that does not call. All ranks call it."""
    looks = meeting.world.local_rank == 0
    address = own_address(network) if looks else None
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(listening(address)) if address else None
        doors = meeting.tell(meeting.gather("door", door))
        others = [(rank, *place) for rank, place in enumerate(doors) if place and rank != meeting.world.rank]
        after = [place for place in others if place[0] > meeting.world.rank]
        before = [place for place in others if place[0] < meeting.world.rank]
        called = (after + before)[:CALLED] if looks else []
        with ThreadPoolExecutor(CALLED) as pool:
            failed = [found for found in pool.map(call, called) if found]
        meeting.gather("called", None, meeting.patience_s + ANSWER_S)
        meeting.tell(None)  # nobody stops listening before all have called
    return failed if door else None


def own_address(network: dict) -> str | None:
    """Where gloo would listen for other machines; None if nowhere, as the checks of names say."""
    known = network["interfaces"].get(of_gloo(network) or "", [])
    usable = [address for address in known if not is_loopback(address)]
    return next((address for address in usable if ":" not in address), usable[0] if usable else None)


@contextlib.contextmanager
def listening(address: str) -> Iterator[tuple[str, int] | None]:
    """Address and port of a door at which callers are greeted; None if there can be none."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, 0), family=family, backlog=64)
    except OSError:
        yield None
        return

    def greet() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                server.accept()[0].close()

    threading.Thread(target=greet, daemon=True).start()
    try:
        yield address, server.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        server.close()


def call(door: tuple[int, str, int]) -> dict | None:
    rank, address, port = door
    try:
        socket.create_connection((address, port), timeout=ANSWER_S).close()
    except OSError as error:
        return {"rank": rank, "address": address, "error": error.strerror or str(error)}
    return None


def judge(everyone: Sequence[Facts]) -> Iterator[Finding]:
    hosts = machines(everyone)
    if len(hosts) == 1:
        return
    host_of = {facts["rank"]: facts["host"] for facts in everyone}
    calls = [(facts, failed) for facts in everyone for failed in facts["ports"] or ()]
    for facts, failed in calls:
        yield Finding(
            "network", FAILURE,
            f"ports: {facts['host']} (rank {facts['rank']}) does not reach {host_of[failed['rank']]} (rank "
            f"{failed['rank']}) at {failed['address']}: {failed['error']}",
            "open all ports between the machines, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to a network where "
            "they are open",
        )  # fmt: skip
    if not calls and all(facts["ports"] is not None for facts in hosts):
        yield Finding("network", OK, f"ports: {len(hosts)} machines reach each other")
