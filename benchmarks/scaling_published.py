"""Published throughput of dense models, with the settings that its sources state, for scaling_model.py to meet.

Sources: llm-foundry `scripts/train/benchmarking/README.md`; torchtitan `benchmarks/llama3_h100_202412_torchtitan.md`;
nanotron `docs/benchmark_summary.svg` (texts of its cells) with `scripts/scaling_benchmarks.py` (geometries, 4,096
tokens a sequence). All in bf16 on nodes of eight H100 with 400 Gbit/s of network a GPU.
"""

from dataclasses import dataclass

from benchmarks.scaling_hardware import H100, H100_500W, Constants, Gpu
from benchmarks.scaling_model import Layout, Model, dense, step


@dataclass(frozen=True)
class Point:
    """One published number: tokens per second and GPU, or the MFU that the source computes (attention not halved)."""

    source: str
    setting: str
    model: Model
    layout: Layout
    gpu: Gpu
    tokens_per_second: float | None = None
    mfu: float | None = None

    def modelled(self, constants: Constants) -> float:
        """In the unit that was published."""
        speed = step(self.model, self.layout, self.gpu, constants).tokens_per_second
        return speed if self.mfu is None else speed * self.flops_per_token() / H100.flops

    def flops_per_token(self) -> float:
        return 6 * self.model.active + 2 * self.model.attention_flops(self.layout.length)

    @property
    def published(self) -> float:
        return self.tokens_per_second if self.mfu is None else self.mfu


def mpt(name: str, layers: int, hidden: int) -> Model:
    return dense(name, layers, hidden, 4 * hidden, hidden, 50368, gated=False, tied=True)


MPT_1B, MPT_3B, MPT_7B = mpt("MPT-1B", 24, 2048), mpt("MPT-3B", 32, 2560), mpt("MPT-7B", 32, 4096)
MPT_13B = mpt("MPT-13B", 40, 5120)
LLAMA_8B = dense("Llama-3.1-8B", 32, 4096, 14336, 1024, 128256)
SMALL = dense("3.57B", 28, 3072, 8192, 3072, 131072, tied=True)
LARGE = dense("8.86B", 32, 4096, 14336, 4096, 131072)


def foundry(model: Model, gpus: int, length: int, samples: int, rounds: int, speed: float, recompute: float = 0):
    """Fully sharded, no compilation, gradients reduced in fp32 in every micro-batch."""
    layout = Layout("fsdp", gpus, samples * length, length, rounds, recompute=recompute, compiled=False)
    setting = f"{gpus} GPUs, {samples} x {length:,}" + (", full recomputation" if recompute else "")
    return Point("llm-foundry", setting, model, layout, H100, tokens_per_second=speed)


def titan(gpus: int, compiled: bool, speed: float):
    """Selective checkpointing keeps every second matmul's output."""
    layout = Layout("fsdp", gpus, 16384, 8192, recompute=0.5, compiled=compiled)
    setting = f"{gpus} GPUs, 2 x 8,192, " + ("compiled" if compiled else "eager")
    return Point("torchtitan", setting, LLAMA_8B, layout, H100_500W, tokens_per_second=speed)


def nanotron(model: Model, nodes: int, tensor: int, pipeline: int, rounds: int, samples: int, mfu: float):
    """The fastest of many layouts, always 256 sequences a step; ZeRO 1, and beside pipelines nothing overlapped."""
    layout = Layout(
        "zero1" if tensor * nodes < 64 else "zero0", 8 * nodes, samples * 4096, 4096, rounds,
        compiled=False, overlapped=pipeline == 1, tensor=tensor, pipeline=pipeline,
    )  # fmt: skip
    return Point("nanotron", f"{8 * nodes} GPUs, TP {tensor}, PP {pipeline}", model, layout, H100, mfu=mfu)


POINTS = [
    titan(8, False, 5762), titan(8, True, 6667), titan(128, False, 5605), titan(128, True, 6514),
    foundry(MPT_1B, 8, 2048, 14, 1, 45455), foundry(MPT_1B, 64, 2048, 20, 1, 44402),
    foundry(MPT_3B, 8, 512, 40, 6, 27965), foundry(MPT_3B, 8, 1024, 20, 6, 27046),
    foundry(MPT_3B, 8, 4096, 5, 6, 20964), foundry(MPT_3B, 8, 8192, 3, 6, 16578),
    foundry(MPT_3B, 16, 2048, 10, 3, 24142), foundry(MPT_3B, 32, 2048, 6, 3, 23021),
    foundry(MPT_3B, 64, 2048, 6, 3, 22525),
    foundry(MPT_7B, 8, 2048, 6, 1, 10643), foundry(MPT_7B, 8, 4096, 16, 2, 8611, recompute=1),
    foundry(MPT_7B, 8, 8192, 8, 2, 6935, recompute=1),
    foundry(MPT_13B, 8, 2048, 2, 1, 4792), foundry(MPT_13B, 64, 2048, 2, 1, 4800),
    nanotron(SMALL, 1, 1, 2, 32, 2, 0.467), nanotron(SMALL, 2, 1, 2, 16, 2, 0.438),
    nanotron(SMALL, 4, 1, 2, 8, 2, 0.404), nanotron(SMALL, 8, 1, 2, 8, 1, 0.355),
    nanotron(SMALL, 16, 4, 1, 1, 8, 0.346),
    nanotron(LARGE, 1, 1, 4, 128, 1, 0.452), nanotron(LARGE, 2, 4, 1, 16, 4, 0.439),
    nanotron(LARGE, 4, 1, 2, 16, 1, 0.433), nanotron(LARGE, 8, 1, 2, 8, 1, 0.395),
    nanotron(LARGE, 16, 8, 1, 2, 8, 0.363),
]  # fmt: skip
