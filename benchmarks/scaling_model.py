"""How long one optimizer step takes on many GPUs, from its FLOPs, the bytes it moves and what hides what.

    step = rounds x (forward + backward) x (1 + bubble) + what nothing hides + optimizer

A pass computes for `compute` seconds (matmuls, attention, and the traffic of everything between them) while its
collectives take `wire` seconds. They run beside each other: the longer one counts, but a collective takes
multiprocessors and memory bandwidth from the matmuls, and its first or last piece has nothing to hide behind.

    pass = max(compute + CONTENTION x wire, wire) + wire / pieces

Only what is named in Constants (scaling_hardware.py) is chosen; the rest is arithmetic on geometry, datasheets and
layout.
"""

import math
from dataclasses import dataclass

from benchmarks.scaling_hardware import GPUS_PER_NODE, Constants, Gpu, collective, hidden

BUCKET = 200e6
"""Elements that ZeRO 0 to 2 reduce or gather at a time: ds_configs/."""


@dataclass(frozen=True)
class Model:
    """A transformer as the step sees it.

    Attributes:
        layers, hidden: of the decoder.
        ffn: width of the feed-forward layer; `gated` has two matmuls into it.
        attention: query heads x head size.
        active: parameters of the linear layers that a position runs, heads included where they run.
        total: all parameters, which are gathered.
        trained: those that are reduced and updated.
        adapters: of the trained, LoRA parameters that a position runs; None where all is trained.
        permuted: hidden widths that a forward layer moves to sort positions by modality (two FFNs) and back.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    gated: bool
    attention: int
    active: float
    total: float
    trained: float
    adapters: float | None = None
    permuted: float = 0

    def linear_flops(self) -> float:
        """Of one position, forward and backward: LoRA needs no weight gradients of the base."""
        return 6 * self.active if self.adapters is None else 4 * self.active + 6 * self.adapters

    def attention_flops(self, length: int) -> float:
        """Of one position in a document of that length, causal."""
        return 6 * self.layers * self.attention * length

    def layer_bytes(self) -> float:
        """Moved between matmuls by a compiled layer for one position, in bf16, forward and backward.

        Forward: two norms, rotary embedding and two residuals read and write 10 hidden widths; SwiGLU reads two
        feed-forward widths and writes one (GELU: one and one). Backward twice that.
        """
        return 2 * 3 * ((10 + self.permuted) * self.hidden + (3 if self.gated else 2) * self.ffn)


def dense(name: str, layers: int, hidden: int, ffn: int, kv: int, vocabulary: int, *, gated=True, tied=False) -> Model:
    """One with a head at every position; `kv` is the width of keys."""
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv + (3 if gated else 2) * hidden * ffn)
    head = vocabulary * hidden
    total = linear + head * (1 if tied else 2)
    return Model(name, layers, hidden, ffn, gated, hidden, linear + head, total, total)


@dataclass(frozen=True)
class Layout:
    """How the step is spread.

    Attributes:
        method: fsdp, zero0 to zero3.
        gpus, replicas: hybrid sharding has more than one replica.
        tokens: positions of one micro-batch on one GPU (or group of tensor-parallel GPUs).
        length: of the documents.
        rounds: micro-batches a step.
        recompute: share of the forward's matmuls that the backward runs again: full checkpointing 1.
        reshard: FSDP gathers again for the backward.
        gather_bytes, reduce_bytes: per element on the wire.
        node_gathers: the backward's gathers stay in the node (ZeRO++ hpZ).
        compiled: torch.compile fuses what lies between the matmuls.
        overlapped: gradients travel beside the backward.
        summed_whole: ZeRO 1 as DeepSpeed does it in bf16: every GPU gets all gradients, twice what its part would take.
        tensor, pipeline: further splits, to reproduce what others published.
    """

    method: str
    gpus: int
    tokens: int
    length: int
    rounds: int = 1
    replicas: int = 1
    recompute: float = 0.0
    reshard: bool = True
    gather_bytes: float = 2
    reduce_bytes: float = 4
    node_gathers: bool = False
    compiled: bool = True
    overlapped: bool = True
    summed_whole: bool = False
    tensor: int = 1
    pipeline: int = 1

    @property
    def positions(self) -> float:
        """A step's, per GPU."""
        return self.tokens * self.rounds / self.tensor / self.pipeline


@dataclass(frozen=True)
class Step:
    """Seconds of one step by what they are spent on, and what follows from them."""

    matmuls: float
    attention: float
    between: float
    optimizer: float
    communication: float
    bubble: float
    positions: float
    flops: float

    @property
    def seconds(self) -> float:
        return self.matmuls + self.attention + self.between + self.optimizer + self.communication + self.bubble

    @property
    def tokens_per_second(self) -> float:
        """Per GPU."""
        return self.positions / self.seconds

    @property
    def limit(self) -> str:
        """What takes the most time beside the matmuls that there have to be."""
        terms = ("attention", "between", "optimizer", "communication", "bubble")
        return max(terms, key=lambda term: getattr(self, term))

    def mfu(self, gpu: Gpu) -> float:
        return self.flops / self.seconds / gpu.flops


@dataclass(frozen=True)
class Wires:
    """Seconds of collectives in one round's passes, in the last round's backward, and after it."""

    forward: float
    backward: float
    last: float
    after: float


def collectives(model: Model, layout: Layout) -> int:
    """In how many pieces a pass's weights or gradients travel: layers, or ZeRO's buckets."""
    if layout.method in ("fsdp", "zero3"):
        return model.layers // layout.pipeline + 1
    return math.ceil(model.trained / (layout.tensor * layout.pipeline) / BUCKET)


def wires(model: Model, layout: Layout, constants: Constants) -> Wires:
    split = layout.tensor * layout.pipeline
    ranks = layout.gpus // split
    shards = ranks // layout.replicas
    pieces = collectives(model, layout)

    def over(size: float, gpus: int) -> float:
        return collective(size / split, gpus, pieces, constants, max(1, GPUS_PER_NODE // split), split)

    gather = over(layout.gather_bytes * model.total, shards)
    again = over(layout.gather_bytes * model.total, min(shards, GPUS_PER_NODE)) if layout.node_gathers else gather
    reduce, copies = over(layout.reduce_bytes * model.trained, shards), 0.0
    if layout.replicas > 1:  # every GPU of a node reduces its own shard over the replicas, all at once, once a step
        own = layout.reduce_bytes * model.trained / shards
        local = max(1, GPUS_PER_NODE // shards)
        copies = 2 * collective(own, layout.replicas, pieces, constants, local, GPUS_PER_NODE // local)
    updated = over(layout.gather_bytes * model.trained, ranks)
    if layout.method in ("fsdp", "zero3"):
        # hpZ's copy lasts until the optimizer's step, and so do weights that are kept after the forward
        later = again if layout.node_gathers else gather if layout.reshard else 0
        forward = (gather + (layout.rounds - 1) * later) / layout.rounds
        return Wires(forward, (again if layout.reshard else 0) + reduce, copies, 0)
    if layout.method == "zero2":
        return Wires(0, reduce, 0, updated)
    both = 2 * reduce if layout.method == "zero0" or layout.summed_whole else reduce
    after = 0 if layout.method == "zero0" else updated
    return Wires(0, 0, both, after) if layout.overlapped else Wires(0, 0, 0, both + after)


def passes(model: Model, layout: Layout, gpu: Gpu, constants: Constants) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of computation in one round's forward and in its backward, by kind."""
    tokens = layout.tokens / (layout.tensor * layout.pipeline)
    again = 2 * model.active * layout.recompute
    full, any_again = layout.recompute >= 1, layout.recompute > 0
    moved = model.layers * model.layer_bytes() * (1 if layout.compiled else constants.eager)

    def of(matmuls: float, attention: float, between: float) -> dict[str, float]:
        return {
            "matmuls": matmuls * tokens / (gpu.flops * constants.gemm),
            "attention": attention * model.attention_flops(layout.length) * tokens / (gpu.flops * constants.attention),
            "between": between * moved * tokens / gpu.memory,
        }

    forward = of(2 * model.active, 1 / 3, 1 / 3)
    # FlashAttention computes the scores anew: five matmuls in the backward, of which FLOPs count four
    return forward, of(model.linear_flops() - 2 * model.active + again, 5 / 6 + full / 3, 2 / 3 + any_again / 3)


def step(model: Model, layout: Layout, gpu: Gpu, constants: Constants) -> Step:
    """The time of one optimizer step on every GPU."""
    forward, backward = passes(model, layout, gpu, constants)
    ahead, back = sum(forward.values()), sum(backward.values())
    times, pieces = wires(model, layout, constants), collectives(model, layout)
    communication = layout.rounds * (
        hidden(ahead, times.forward, pieces, constants) + hidden(back, times.backward, pieces, constants)
    )
    communication += hidden(back, times.last, pieces, constants) + times.after
    if layout.tensor > 1:  # two gathers and two scatters of the activations a layer and pass, none of them hidden
        moved = 8 * model.layers / layout.pipeline * layout.tokens * model.hidden * 2
        communication += layout.rounds * collective(moved, layout.tensor, 8 * model.layers, constants)
    return Step(
        **{kind: layout.rounds * (forward[kind] + backward[kind]) for kind in forward},
        optimizer=update(model, layout, gpu),
        communication=communication,
        bubble=(layout.pipeline - 1) * (ahead + back),
        positions=layout.positions,
        flops=(model.linear_flops() + model.attention_flops(layout.length)) * layout.positions,
    )


def update(model: Model, layout: Layout, gpu: Gpu) -> float:
    """Seconds of accumulation, clipping and AdamW, which memory bandwidth bounds."""
    split = layout.tensor * layout.pipeline
    ranks = layout.gpus // split
    held = model.trained / split / (1 if layout.method == "zero0" else ranks // layout.replicas)
    summed = model.trained / split if layout.method in ("zero0", "zero1") else held
    # norm 4, scaling 8; weight and two moments read and written 24, gradient read 4, bf16 weight written 2
    return (held * 42 + layout.rounds * summed * 12) / gpu.memory
