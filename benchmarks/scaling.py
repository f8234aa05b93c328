"""Higgs Audio v2 on 8 to 512 GPUs, predicted by scaling_model.py, which is first held against published numbers.

    python -m benchmarks.scaling                     # the tables of benchmarks/README.md
    python -m benchmarks.scaling --network 12.5e9    # the same on a slower network
    python -m benchmarks.scaling --plot FILE.svg

No GPU, no training, a second of arithmetic: to choose a layout before there is a cluster, and to have something to
hold a measurement against. Weak scaling: every GPU has the same tokens whatever their number.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from transformers import HiggsAudioV2Config

from benchmarks.scaling_hardware import GPUS_PER_NODE, H100, H200, Constants, Gpu
from benchmarks.scaling_model import Layout, Model, Step, step
from benchmarks.scaling_plot import svg
from benchmarks.scaling_published import POINTS
from engine.model.flops import LINEAR_LAYERS, Parameters, active_adapters

SIZES = (8, 16, 32, 64, 128, 256, 512)
LENGTH, TEXT_LABELS, AUDIO_LABELS = 1024, 2, 448
"""A voice-cloning sample: 41 s of speech, half of it the reference, which has no labels; no text but the ends."""

CONFIG = HiggsAudioV2Config(codebook_size=1026)
FULL = {
    "FSDP, ZeRO 3": {"method": "fsdp"},
    "FSDP, kept after forward": {"method": "fsdp", "reshard": False},
    "FSDP, a replica a node": {"method": "fsdp", "hybrid": True},
    "ZeRO 1": {"method": "zero1", "summed_whole": True, "overlapped": False},
    "ZeRO 2": {"method": "zero2"},
    "ZeRO 3, hpZ": {"method": "zero3", "node_gathers": True},
}
LORA = {name: FULL[name] for name in ("FSDP, ZeRO 3", "FSDP, a replica a node", "ZeRO 1", "ZeRO 3, hpZ")}


def higgs(lora_rank: int | None = None) -> Model:
    """Higgs Audio v2: one of two FFNs a position, heads where labels are."""
    sizes, c = Parameters.of(CONFIG), CONFIG
    heads = (sizes.text_head * TEXT_LABELS + sizes.audio_head * AUDIO_LABELS) / LENGTH
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    whole = Model(
        "Higgs Audio v2", c.num_hidden_layers, c.hidden_size, c.intermediate_size, True, queries,
        sizes.active + heads, sizes.total, sizes.total,
        permuted=2 * (2 * queries + 2 * keys) / c.hidden_size,  # q, k, v to the order of time, the result back
    )  # fmt: skip
    if lora_rank is None:
        return whole
    active = active_adapters(c, lora_rank)
    audio_ffn = active_adapters(c, lora_rank, LINEAR_LAYERS[4:])  # the FFN that the position does not run
    return replace(whole, trained=active + audio_ffn, adapters=active)


def predictions(args: argparse.Namespace, constants: Constants, lora: bool) -> dict[str, dict[int, Step]]:
    """Way to spread the model -> number of GPUs -> step."""
    model, gpu = higgs(args.lora_rank if lora else None), chosen(args)
    table = {}
    for name, options in (LORA if lora else FULL).items():
        options = dict(options)
        hybrid = options.pop("hybrid", False)
        table[name] = {
            gpus: step(
                model,
                Layout(
                    gpus=gpus, tokens=args.tokens, length=LENGTH, rounds=args.rounds, compiled=not args.eager,
                    replicas=gpus // GPUS_PER_NODE if hybrid else 1, **options,
                ),
                gpu,
                constants,
            )
            for gpus in SIZES
        }  # fmt: skip
    return table


def chosen(args: argparse.Namespace) -> Gpu:
    return {"h100": H100, "h200": H200}[args.gpu]


def published_table(constants: Constants) -> str:
    lines = ["| source | model | setting | published | modelled | |", "|---|---|---|---:|---:|---:|"]
    for point in POINTS:
        published, modelled = point.published, point.modelled(constants)
        show = "{:,.0f}" if point.mfu is None else "{:.1%}"
        lines.append(
            f"| {point.source} | {point.model.name} | {point.setting} | {show.format(published)} "
            f"| {show.format(modelled)} | {modelled / published - 1:+.1%} |"
        )
    return "\n".join(lines)


def predicted_table(table: dict[str, dict[int, Step]], title: str, gpu: Gpu) -> str:
    first, last = SIZES[0], SIZES[-1]
    lines = [
        f"| {title}, tokens/s a GPU | " + " | ".join(map(str, SIZES)) + f" | MFU {first} → {last} | kept | limit |",
        "|---|" + "---:|" * (len(SIZES) + 2) + "---|",
    ]
    for name, steps in table.items():
        speeds = " | ".join(f"{s.tokens_per_second:,.0f}" for s in steps.values())
        kept = steps[last].tokens_per_second / steps[first].tokens_per_second
        lines.append(
            f"| {name} | {speeds} | {steps[first].mfu(gpu):.0%} → {steps[last].mfu(gpu):.0%} | {kept:.0%} "
            f"| {steps[last].limit} |"
        )
    return "\n".join(lines)


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=["h100", "h200"], default="h200")
    parser.add_argument("--tokens", type=int, default=16384, help="of one micro-batch on one GPU")
    parser.add_argument("--rounds", type=int, default=2, help="micro-batches of one GPU in a step")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--network", type=float, default=Constants.network, help="bytes/s of one GPU to other nodes")
    parser.add_argument("--eager", action="store_true", help="without torch.compile or fused kernels")
    parser.add_argument("--plot", type=Path, help="writes an SVG")
    return parser.parse_args(given)


def report(args: argparse.Namespace) -> str:
    constants, gpu = replace(Constants(), network=args.network), chosen(args)
    full, lora = (predictions(args, constants, lora) for lora in (False, True))
    if args.plot:
        panels = {
            title: {name: {n: s.mfu(gpu) for n, s in steps.items()} for name, steps in table.items()}
            for title, table in (("full fine-tuning", full), (f"LoRA, rank {args.lora_rank}", lora))
        }
        args.plot.write_text(svg(panels, constants.gemm))
    return "\n\n".join(
        [
            published_table(Constants()),
            predicted_table(full, "full", gpu),
            predicted_table(lora, f"LoRA {args.lora_rank}", gpu),
        ]
    )


if __name__ == "__main__":
    print(report(parse_arguments()))
