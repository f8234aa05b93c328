"""What facts of all ranks are judged to be: each trouble is named once, with who has it, and sound ones pass."""

import json

import pytest

from engine.doctor import clocks, disk, filesystem, findings, machine, network, ports, software, speed
from engine.doctor.findings import FAILURE, OK, WARNING, deviants, machines, ranges, who
from tests.doctor.facts import GIB, cluster

JUDGES = {
    "software": software.judge, "machine": machine.judge, "clocks": clocks.judge, "network": network.judge,
    "files": filesystem.judge, "disk": disk.judge, "ports": ports.judge, "compute": speed.judge_compute,
}  # fmt: skip


def put(everyone: list[dict], ranks, path: str, value) -> list[dict]:
    """The same facts with one of some ranks changed."""
    for rank in ranks:
        place = everyone[rank]
        *way, last = path.split("/")
        for key in way:
            place = place[key]
        place[last] = value
    return everyone


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("size, local_size", [(1, 1), (2, 2), (4, 2), (16, 8)])
def test_a_sound_cluster_has_no_finding_but_good_ones(name, size, local_size):
    found = list(JUDGES[name](cluster(size, local_size)))
    assert [finding for finding in found if finding.level != OK] == []


CASES = [
    # judge, who, fact, value, level, text of the only finding that is not good
    ("software", [3], "software/versions/torch", "2.12.0", FAILURE, "torch is 2.13.0, but 2.12.0 on rank 3 (node-b)"),
    ("software", [0], "software/versions/torch", None, FAILURE, "torch is 2.13.0, but absent on rank 0 (node-a)"),
    ("software", [2, 3], "software/versions/python", "3.11.7", WARNING, "3.11.7 on ranks 2-3 (node-b)"),
    ("software", [2], "software/code", "beef", FAILURE, "c0de, but beef on rank 2 (node-b)"),
    ("software", [1], "software/settings/seed", 8, FAILURE, "seed is 7, but 8 on rank 1 (node-a)"),
    ("software", [1], "software/settings/max_steps", 9, FAILURE, "max_steps is None, but 9 on rank 1 (node-a)"),
    ("software", [2], "software/content", {"train_data_file: /data": "beef"}, FAILURE, "(da7a) is other content"),
    ("software", [2], "software/content", {"train_data_file: /data": None}, FAILURE, "cannot be read on rank 2"),
    ("software", [1], "software/problems", ["model_path: no → do"], FAILURE, "model_path: no (rank 1 (node-a))"),
    ("software", range(4), "software/problems", ["model_path: no → do"], FAILURE, "settings: model_path: no"),
    ("software", [1], "software/environment/NCCL_DEBUG", "INFO", WARNING, "NCCL_DEBUG is WARN, but INFO on rank 1"),
    ("software", [3], "software/environment/NCCL_ALGO", "Ring", WARNING, "not set, but Ring on rank 3 (node-b)"),
    ("machine", [2], "machine/local_rank", 1, WARNING, "several ranks are number 1 of node-b"),
    ("machine", [2, 3], "machine/cores", 1.0, WARNING, "cores: 1 for 2 ranks: node-b"),
    ("machine", [0, 2], "machine/memory", 3 * GIB, WARNING, "3.0 GiB are free for 2 ranks on node-a, node-b"),
    ("machine", [2], "machine/shared_memory", 64 << 20, WARNING, "/dev/shm: 64 MiB are free for 2 ranks on node-b"),
    ("machine", [2], "machine/shared_memory", 0, WARNING, "/dev/shm: 0 MiB"),
    ("machine", [3], "machine/limits/nofile", 70, FAILURE, "nofile is 70 for rank 3 (node-b), 72 are needed"),
    ("machine", [3], "machine/limits/nproc", 100, WARNING, "nproc is 100 for rank 3 (node-b)"),
    ("machine", range(4), "machine/limits/memlock", 65536, WARNING, "memlock is bounded for all 4 ranks"),
    ("machine", [1], "machine/gpu", None, FAILURE, "no GPU for rank 1 (node-a), while others have one"),
    ("machine", [1], "machine/gpu/uuid", "GPU-0", WARNING, "ranks 0-1 (node-a) all got the same GPU"),
    ("machine", [3], "machine/gpu/free", 100 * GIB, WARNING, "40.0 GiB of the GPUs of rank 3 (node-b) are taken"),
    ("machine", [3], "machine/gpu/name", "NVIDIA H100", WARNING, "NVIDIA H100 with 140 GiB for rank 3 (node-b)"),
    ("machine", [2], "machine/gpu/visible", 8, WARNING, "8 GPUs are visible, 2 used on node-b"),
    ("clocks", [2], "clock/times", [1090.3, 1090.8, 1091.3], WARNING, "node-b (rank 2) is 90.3 s ahead of that of"),
    ("clocks", [2], "clock/times", [991.7, 992.3, 992.9], WARNING, "node-b (rank 2) is 8.3 s behind"),
    ("network", [2, 3], "network/gloo", "eth7", FAILURE, "GLOO_SOCKET_IFNAME=eth7 is not there for ranks 2-3 (node-b)"),
    ("network", [2], "network/nccl", "=ib", FAILURE, "NCCL_SOCKET_IFNAME==ib is not there for rank 2 (node-b)"),
    ("network", [2], "network/own", ["127.0.1.1", "10.0.0.2"], FAILURE, "node-b takes itself for 127.0.1.1"),
    ("network", [2], "network/own", [], FAILURE, "node-b does not know its own name"),
    ("network", [2], "network/master_at", ["127.0.1.1"], FAILURE, "MASTER_ADDR=node-a is 127.0.1.1 for rank 2"),
    ("network", [2], "network/nccl", "docker", WARNING, "NCCL on node-b would take docker0"),
    ("files", [2], "files/there", False, FAILURE, "/out does not exist for rank 2 (node-b)"),
    ("files", [2], "files/error", "Read-only file system", FAILURE, "rank 2 (node-b) cannot write there: Read-only"),
    ("files", [2], "files/sight", None, FAILURE, "what rank 0 (node-a) wrote is not seen by rank 2 (node-b)"),
    ("files", [2], "files/seen", False, FAILURE, "rank 0 (node-a) does not see what was written by rank 2 (node-b)"),
    ("files", [2], "files/sight", 12.0, WARNING, "rank 2 (node-b) saw a new file after 12.0 s only"),
    ("files", [0, 2], "files/free", 50 * GIB, FAILURE, "50.00 GiB are free, a checkpoint takes about 60.0 GiB"),
    ("files", [0, 2], "files/free", 290 * GIB, WARNING, "60.0 GiB, up to 5 are there at once"),
    ("disk", [2], "disk/wrong", {"a mixture": 3}, FAILURE, "rank 2 (node-b) found a mixture in 3 of 100 readings"),
    ("disk", [2], "disk/fsync", 2.0, WARNING, "fsync 2000.0 ms (rank 2 (node-b))"),
    ("disk", [2], "disk/error", "No space left", FAILURE, "rank 2 (node-b): No space left"),
    ("ports", [2], "ports", [{"rank": 0, "address": "10.0.0.1", "error": "timed out"}], FAILURE,
     "node-b (rank 2) does not reach node-a (rank 0) at 10.0.0.1: timed out"),
    ("compute", [3], "compute", 500e12, WARNING, "500 TFLOP/s in a matrix product for rank 3 (node-b)"),
]  # fmt: skip


@pytest.mark.parametrize("name, ranks, fact, value, level, text", CASES, ids=[f"{c[0]} {c[2]} {c[5]}" for c in CASES])
def test_trouble_is_named_once_with_who_has_it(name, ranks, fact, value, level, text):
    found = [f for f in JUDGES[name](put(cluster(), ranks, fact, value)) if f.level != OK]
    assert [f.level for f in found] == [level], found
    assert text in found[0].text
    assert found[0].remedy and " → " in str(found[0]), "what is to be done?"


def test_half_of_both_round_trips_is_no_skew():
    assert clocks.skews(cluster()) == [0.0, *[pytest.approx(0.0001, abs=1e-6)] * 3]


def test_ranks_that_are_connected_have_no_trouble_with_names():
    everyone = put(cluster(), [2], "network/own", [])
    everyone[2]["network"]["master_at"] = ["127.0.1.1"]
    everyone[3]["network"]["gloo"] = "nosuch0"
    assert [f for f in network.judge(everyone, connected=True) if f.level != OK] == []
    everyone[3]["network"]["nccl"] = "nosuch0"  # which nobody has tried yet
    assert [f.level for f in network.judge(everyone, connected=True) if f.level != OK] == [FAILURE]


def test_the_first_machine_may_take_itself_for_loopback():
    everyone = put(cluster(), [0, 1], "network/master_at", ["127.0.1.1"])
    assert [f for f in network.judge(everyone) if f.level != OK] == []


def test_interfaces_are_chosen_as_gloo_and_nccl_do():
    mine = cluster()[0]["network"]
    mine["interfaces"] = {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]}
    assert network.of_gloo(mine) == "eth0"
    chosen = {None: "ib0", "eth": "eth0", "=eth": None, "=eth0": "eth0", "^lo,docker": "eth0", "^docker": "lo"}
    assert {given: network.of_nccl(mine | {"nccl": given}) for given in chosen} == chosen


def test_adapters_need_little_room_and_an_unknown_model_none_that_is_known():
    everyone = put(cluster(), [0], "files/checkpoint", None)
    assert [f.level for f in filesystem.judge(everyone)] == [OK, OK]
    levels = [f.level for f in filesystem.judge(put(everyone, [2], "files/free", 1 << 20))]
    assert levels == [OK, FAILURE]


def test_slow_nccl_is_told_and_slow_gloo_is_a_fact():
    rows = [
        {"operation": "all-reduce", "group": "all", "ranks": 4, "bytes": n, "seconds": n / 1e9} for n in (1024, 1 << 26)
    ]
    assert [f.level for f in speed.judge_collectives(rows, nccl=True)] == [WARNING]
    assert [f.level for f in speed.judge_collectives(rows, nccl=False)] == [OK]
    lines = speed.table(rows)
    assert len(lines) == 3 and "1.000 GB/s" in lines[-1] and "67,108,864" in lines[-1]


def test_many_are_counted():
    everyone = cluster(16, 2)
    assert who(everyone, everyone) == "all 16 ranks"
    assert who(everyone[:1], everyone) == "rank 0 (node-a)"
    assert who([everyone[i] for i in (0, 1, 3)], everyone) == "ranks 0-1 (node-a), 3 (node-b)"
    assert who(everyone[:-1], everyone).endswith("6-7 (node-d) and 4 more machines")
    assert [facts["rank"] for facts in machines(everyone)] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert ranges([0, 1, 2, 7, 9, 10]) == "0-2, 7, 9-10"


def test_what_most_have_is_right_and_of_equals_what_rank_0_has():
    everyone = cluster()
    usual, others = deviants(everyone, lambda facts: facts["rank"] == 0)
    assert usual is False and [whose for _, whose in others] == ["rank 0 (node-a)"]
    usual, others = deviants(everyone, lambda facts: facts["host"])
    assert usual == "node-a" and [whose for _, whose in others] == ["ranks 2-3 (node-b)"]


def test_findings_are_plain_data():
    for judge in JUDGES.values():
        for finding in judge(cluster()):
            assert findings.Finding(**json.loads(json.dumps(vars(finding)))) == finding
