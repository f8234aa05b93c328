"""GPUs and what joins them: datasheets, the fitted constants, and how long a collective takes.

A collective over n GPUs, bytes b, `local` GPUs of each of N nodes, is a ring:

    wire = max(b (n - 1)/n / NVLink, b (N - 1)/N / (cards x network)) + pieces x hops x latency
"""

from dataclasses import dataclass

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """Of the datasheets: dense bf16 FLOP/s and memory bandwidth in bytes/s."""

    name: str
    flops: float
    memory: float


H100 = Gpu("H100", 989e12, 3.35e12)
H200 = Gpu("H200", 989e12, 4.8e12)
# torchtitan's: HBM2e, held at 500 W; their own footnote puts its peak between SXM's and NVL's 835
H100_500W = Gpu("H100, 500 W", 835e12, 2.4e12)


@dataclass(frozen=True)
class Constants:
    """What the datasheets do not say; where each comes from is in benchmarks/README.md.

    Attributes:
        gemm, attention: share of the peak that matmuls and FlashAttention reach, forward and backward.
        eager: how often unfused operations move what a compiled layer moves once.
        nvlink, network: bytes/s of a large collective, per GPU.
        nvlink_hop, network_hop: seconds per hop of a ring.
        contention: seconds that a second of hidden communication adds to the computation.
    """

    gemm: float = 0.68
    attention: float = 0.22
    eager: float = 4.0
    nvlink: float = 350e9
    network: float = 35e9
    nvlink_hop: float = 1.5e-6
    network_hop: float = 6e-6
    contention: float = 0.5


def collective(
    size: float, gpus: int, pieces: int, constants: Constants, per_node: int = GPUS_PER_NODE, shared: int = 1
) -> float:
    """Seconds to gather `size` bytes on every one of the GPUs, or to reduce and scatter them.

    Args:
        pieces: it is done in so many collectives.
        per_node: of its GPUs in each node; fewer than 8 where groups lie across.
        shared: groups that send through the same network cards at the same time.
    """
    if gpus == 1 or not size:
        return 0.0
    local = min(gpus, per_node)
    nodes = gpus // local
    inside = size * (gpus - 1) / gpus / constants.nvlink if local > 1 else 0.0
    outside = size * (nodes - 1) / nodes * shared / (GPUS_PER_NODE * constants.network)
    hops = (gpus - nodes) * constants.nvlink_hop + (nodes * constants.network_hop if nodes > 1 else 0)
    return max(inside, outside) + hops * pieces


def hidden(compute: float, wire: float, pieces: int, constants: Constants) -> float:
    """What communication adds to a pass that it runs beside."""
    return max(constants.contention * wire, wire - compute) + wire / pieces
