"""Names, addresses and interfaces as each rank sees them: where gloo and NCCL will listen, and who can find them."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence

import psutil

from engine.doctor.findings import FAILURE, OK, WARNING, Facts, Finding, machines, who

INNER = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali", "kube", "tun", "tap")
"""Beginnings of names of interfaces that lead to no other machine."""
HOSTS_REMEDY = "give each machine its real address in DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME={}"


def probe() -> dict:
    master = os.environ.get("MASTER_ADDR", "")
    return {
        "interfaces": interfaces(),
        "own": addresses(socket.gethostname()),
        "master": master,
        "master_at": addresses(master) if master else [],
        "gloo": os.environ.get("GLOO_SOCKET_IFNAME"),
        "nccl": os.environ.get("NCCL_SOCKET_IFNAME"),
    }


def addresses(name: str) -> list[str]:
    """IPv4 and IPv6 addresses of a name, in the resolver's order; none if it is unknown."""
    with contextlib.suppress(OSError, UnicodeError):
        return list(dict.fromkeys(entry[4][0] for entry in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)))
    return []


def interfaces() -> dict[str, list[str]]:
    """Addresses of the interfaces that are up and have any."""
    state = psutil.net_if_stats()
    found = {}
    for name, known in psutil.net_if_addrs().items():
        listed = [entry.address for entry in known if entry.family in (socket.AF_INET, socket.AF_INET6)]
        if listed and name in state and state[name].isup:
            found[name] = listed
    return found


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def outward(mine: dict) -> list[str]:
    """Interfaces that may lead to another machine, by name."""
    return [
        name
        for name, known in mine["interfaces"].items()
        if not name.startswith(INNER) and not all(map(is_loopback, known))
    ]


def of_gloo(mine: dict) -> str | None:
    """The interface that gloo takes: the one named, else the one that has the address of the host's name."""
    if mine["gloo"]:
        return mine["gloo"].split(",")[0]
    return next((name for name, known in mine["interfaces"].items() if set(known) & set(mine["own"][:1])), None)


def of_nccl(mine: dict) -> str | None:
    """The interface that NCCL takes first: by its list of beginnings (`=`: whole names, `^`: not these), else ib*."""
    names, given = list(mine["interfaces"]), mine["nccl"]
    if given:
        left_out, exact = given.startswith("^"), given.lstrip("^").startswith("=")
        listed = given.lstrip("^=").split(",")
        for name in names:
            if (name in listed if exact else name.startswith(tuple(listed))) != left_out:
                return name
        return None
    for wanted in (
        lambda name: name.startswith("ib"),
        lambda name: not name.startswith(("lo", "docker")),
        lambda name: True,
    ):
        if chosen := next(filter(wanted, names), None):
            return chosen
    return None


# ---------------------------------------------------------------- judged, over all ranks


def judge(everyone: Sequence[Facts], connected: bool = False) -> Iterator[Finding]:
    """`connected`: the ranks have reached each other already, so what could only have hindered that has not."""
    yield from _given_names(everyone, connected)
    if len(machines(everyone)) == 1:
        return
    if not connected:
        yield from _own_names(everyone)
        yield from _meeting_place(everyone)
    hosts = machines(everyone)
    chosen = {facts["host"]: of_nccl(facts["network"]) for facts in hosts if facts["machine"]["gpu"]}
    for host, name in chosen.items():
        if name and name.startswith(INNER):
            yield Finding(
                "network", WARNING, f"interface: NCCL on {host} would take {name}, which leads to no other machine",
                "set NCCL_SOCKET_IFNAME to the interface of the cluster's network",
            )  # fmt: skip
    gloo = sorted({of_gloo(facts["network"]) or "none" for facts in hosts})
    nccl = sorted({name or "none" for name in chosen.values()})
    yield Finding(
        "network", OK, f"interface: gloo takes {', '.join(gloo)}" + (f"; NCCL {', '.join(nccl)}" if nccl else "")
    )


def _given_names(everyone: Sequence[Facts], connected: bool) -> Iterator[Finding]:
    """Interfaces that the environment names have to be there; NCCL connects only when it is first used."""
    wrong: dict[tuple[str, str, bool], list[Facts]] = {}
    for facts in everyone:
        mine = facts["network"]
        there = ", ".join(mine["interfaces"])
        if not connected and mine["gloo"] and not set(mine["gloo"].split(",")) <= set(mine["interfaces"]):
            wrong.setdefault((f"GLOO_SOCKET_IFNAME={mine['gloo']}", there, True), []).append(facts)
        if mine["nccl"] and of_nccl(mine) is None:
            wrong.setdefault((f"NCCL_SOCKET_IFNAME={mine['nccl']}", there, bool(facts["machine"]["gpu"])), []).append(
                facts
            )
    for (setting, there, used), ranks in wrong.items():
        yield Finding(
            "network", FAILURE if used else WARNING, f"interface: {setting} is not there for {who(ranks, everyone)}",
            f"one of those that are up: {there}; or unset it",
        )  # fmt: skip


def _own_names(everyone: Sequence[Facts]) -> Iterator[Finding]:
    """gloo tells the others the address that its own machine's name has: it must not be 127.0.1.1."""
    sound = []
    for facts in machines(everyone):
        mine, host = facts["network"], facts["host"]
        remedy = HOSTS_REMEDY.format("|".join(outward(mine)) or "NAME")
        if mine["gloo"]:
            continue
        if not mine["own"]:
            yield Finding("network", FAILURE, f"names: {host} does not know its own name", remedy)
        elif is_loopback(mine["own"][0]):
            text = f"names: {host} takes itself for {mine['own'][0]}, where no other machine finds it"
            yield Finding("network", FAILURE, text, remedy)
        else:
            sound.append(f"{host} {mine['own'][0]}")
    if sound:
        more = f" and {len(sound) - 8} more" if len(sound) > 8 else ""
        yield Finding("network", OK, f"names: {', '.join(sound[:8])}{more}")


def _meeting_place(everyone: Sequence[Facts]) -> Iterator[Finding]:
    """MASTER_ADDR is the same machine for all; on that machine itself it may be loopback."""
    first, *others = machines(everyone)
    master = first["network"]["master"]
    seen: dict[str, list[Facts]] = {}
    for facts in others:
        seen.setdefault((facts["network"]["master_at"] or ["unknown"])[0], []).append(facts)
    for address, ranks in seen.items():
        if is_loopback(address):
            yield Finding(
                "network", FAILURE, f"meeting place: MASTER_ADDR={master} is {address} for {who(ranks, everyone)}",
                "give MASTER_ADDR the address of the first machine, as the others see it",
            )  # fmt: skip
    if len(seen) > 1:
        shown = "; ".join(f"{address} for {who(ranks, everyone)}" for address, ranks in seen.items())
        yield Finding("network", WARNING, f"meeting place: MASTER_ADDR={master} is {shown}", "mend DNS or /etc/hosts")
    elif not any(map(is_loopback, seen)):
        yield Finding("network", OK, f"meeting place: MASTER_ADDR={master} is {', '.join(seen)} for the other machines")
