"""Facts of a sound cluster, for judgements to be tested on what one change makes of them."""

import copy

GIB = 2**30


def rank_facts(rank: int, local_size: int, size: int) -> dict:
    node = rank // local_size
    address = f"10.0.0.{node + 1}"
    return {
        "rank": rank,
        "host": f"node-{'abcdefgh'[node]}",
        "software": {
            "versions": {"higgs-engine": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
            "environment": {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": f"eth{node}"},
            "settings": {"seed": 7}, "problems": [], "code": "c0de" if rank % local_size == 0 else None,
            "content": {"train_data_file: /data": "da7a"} if rank % local_size == 0 else None,
        },
        "machine": {
            "local_rank": rank % local_size, "local_size": local_size, "world_size": size, "cores": 64.0,
            "memory": 500 * GIB, "shared_memory": 100 * GIB, "infiniband": True, "trouble": None,
            "limits": {"nofile": 1048576, "memlock": -1, "nproc": -1},
            "gpu": {
                "name": "NVIDIA H200", "uuid": f"GPU-{rank}", "total": 140 * GIB, "free": 139 * GIB,
                "visible": local_size,
            },
        },
        "clock": {"times": [1000.0012, 1000.5011, 1001.0013], "round_trip": 0.001},
        "network": {
            "interfaces": {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": [address]}, "own": [address],
            "master": "node-a", "master_at": ["10.0.0.1"], "gloo": None, "nccl": None,
        },
        "files": {
            "output_dir": "/out", "place": "/out", "name": ".doctor-1", "error": None, "there": True, "sight": 0.01,
            "free": 900 * GIB, "seen": True, "checkpoint": 60 * GIB, "kept": 3,
        } if rank % local_size == 0 else None,
        "disk": {"readings": 100, "wrong": {}, "error": None, "fsync": 0.01, "rate": 1e9},
        "ports": [] if rank % local_size == 0 else None,
        "compute": 700e12,
    }  # fmt: skip


def cluster(size: int = 4, local_size: int = 2) -> list[dict]:
    """`size` ranks on machines of `local_size`; rank 0 sent the words that the others heard at `times`."""
    everyone = [copy.deepcopy(rank_facts(rank, local_size, size)) for rank in range(size)]
    everyone[0]["clock"]["times"] = [1000.0, 1000.5, 1001.0]
    return everyone
