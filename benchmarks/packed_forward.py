"""Forward and backward of one micro-batch: transformers' own forward against the packed one of this engine.

Three ways to the same loss and gradients, on the same weights and samples:

    native, padded    transformers' forward with labels of both heads, samples padded on the right to the longest
    native, packed    the same on one row without padding, position_ids restarting at each sample
    packed            engine/model/packed.py

First all three must agree in loss and gradients; then they are timed in turns, so that a disturbance meets each
alike. Medians are reported, tokens are real ones (padding counts for nothing), memory is what a run adds to the
weights at its peak, its gradients included. There is no optimizer and no second process in it.

The weights are random, the samples are made up in the lengths of voice cloning: reference and target of log-normal
seconds, their transcripts, a system turn, labels on the target. The defaults take two minutes on two CPU cores.
"""

import argparse
import gc
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import engine
from engine.data.labels import Sample, StreamIds, merge
from engine.data.packing import pack
from engine.data.prompts import IGNORED, Prompt, SpecialTokens
from engine.model import attention
from engine.model.flops import Parameters, peak_flops, step_flops
from engine.model.initial import build_on_meta, rebuild_buffers
from engine.model.packed import install

EXAMPLES = """
A GPU, the real model's size (11.5 GB of bf16 weights, as much for gradients):
  python -m benchmarks.packed_forward --hidden_size 3072 --intermediate_size 8192 --layers 28 --heads 24 \\
      --kv_heads 8 --head_dim 128 --samples 32 --repeats 11
"""

FRAMES_PER_SECOND = 25
TEXT_TOKENS_PER_SECOND = 3.5  # English speech, some 15 characters a second
SYSTEM_TOKENS, HEADER_TOKENS = 45, 6
SHORTEST_S, LONGEST_S, SPREAD = 1.5, 20.0, 0.5

TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 5e-2)}
"""Of the loss (relative) and the gradients (norm of the difference by norm); bf16 rounds each value by 2^-9."""

TITLES = {"native_padded": "native, padded", "native_packed": "native, packed", "packed": "packed (this engine)"}


def parse_arguments() -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=Formatter)
    size = parser.add_argument_group("model", "vocabulary and codebooks are the real ones: 128256 and 8 x 1026")
    size.add_argument("--hidden_size", type=int, default=512, metavar="N", help="width of the model")
    size.add_argument("--intermediate_size", type=int, default=1376, metavar="N", help="width of each FFN")
    size.add_argument("--layers", type=int, default=8, metavar="N", help="decoder layers")
    size.add_argument("--heads", type=int, default=8, metavar="N", help="attention heads")
    size.add_argument("--kv_heads", type=int, default=4, metavar="N", help="key and value heads")
    size.add_argument("--head_dim", type=int, default=64, metavar="N", help="width of a head")
    data = parser.add_argument_group("samples")
    data.add_argument("--samples", type=int, default=4, metavar="N", help="samples of the micro-batch")
    data.add_argument("--seconds", type=float, default=6.0, metavar="S", help="median length of a clip; two a sample")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of samples and weights")
    run = parser.add_argument_group("run")
    run.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each forward")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="where it runs")
    run.add_argument("--dtype", choices=TOLERANCES, default="bf16" if gpu else "fp32", help="of weights and compute")
    run.add_argument(
        "--attention", choices=("auto", *attention.IMPLEMENTATIONS), default="auto", help="kernel of the packed forward"
    )
    run.add_argument(
        "--native_attention", choices=("sdpa", "flash_attention_2"), default="sdpa", help="likewise of transformers"
    )
    run.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON to write; none: named after device and day in benchmarks/results"
    )
    return parser.parse_args()


def make_samples(args: argparse.Namespace, config: transformers.HiggsAudioV2Config) -> list[Sample]:
    """Voice-cloning samples of random content: system, reference text and audio, target text and audio."""
    rng = np.random.default_rng(args.seed)
    placeholder, stream = config.audio_token_id, StreamIds()

    def clip_and_text() -> tuple[np.ndarray, np.ndarray]:
        seconds = np.clip(args.seconds * math.exp(rng.normal(0, SPREAD)), SHORTEST_S, LONGEST_S)
        codes = rng.integers(0, stream.bos, (stream.codebooks, round(seconds * FRAMES_PER_SECOND)), np.int16)
        return codes, text(HEADER_TOKENS + round(seconds * TEXT_TOKENS_PER_SECOND) + HEADER_TOKENS)

    def text(tokens: int) -> np.ndarray:
        return rng.integers(10, 100_000, tokens)

    samples = []
    for row in range(args.samples):
        (reference, reference_text), (target, target_text) = clip_and_text(), clip_and_text()
        parts = (text(SYSTEM_TOKENS), reference_text, [placeholder], text(2), target_text, [placeholder], text(2))
        ids = np.concatenate(parts).astype(np.int32)
        labels = np.full_like(ids, IGNORED)
        labels[-2:] = ids[-2:]  # end of audio, end of turn
        prompt = Prompt(ids, labels, (), (False, True))
        samples.append(merge(prompt, [reference, target], SpecialTokens(placeholder, placeholder), stream, row))
    return samples


def make_models(args: argparse.Namespace, config: transformers.HiggsAudioV2Config, device: torch.device):
    """The native and the packed model: two trees of modules around the same weights."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    native, packed = (build_on_meta(config).to(dtype) for _ in range(2))
    native.to_empty(device=device)
    torch.manual_seed(args.seed)
    with torch.no_grad():
        for parameter in native.parameters():
            # outputs of a layer as large as its inputs, so that every layer matters to the loss that is compared
            parameter.normal_(0, parameter.shape[1] ** -0.5) if parameter.ndim == 2 else parameter.fill_(1)
    native.set_attn_implementation(args.native_attention)
    packed.load_state_dict(native.state_dict(), assign=True)
    for model in (native, packed):
        rebuild_buffers(model, device)
    return native, install(packed, attention.choose(args.attention, device, dtype), recompute_layers=False)


def padded_inputs(samples: list[Sample], config: transformers.HiggsAudioV2Config) -> dict[str, torch.Tensor]:
    def padded(arrays: list[np.ndarray], value: int) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(a).long() for a in arrays], batch_first=True, padding_value=value)

    return {
        "input_ids": padded([s.input_ids for s in samples], config.pad_token_id),
        "attention_mask": padded([np.ones(len(s), np.int64) for s in samples], 0),
        "labels": padded([s.labels for s in samples], IGNORED),
        "audio_input_ids": padded([s.audio_ids for s in samples], 0),
        "audio_input_ids_mask": padded([np.ones(len(s.audio_ids), np.int64) for s in samples], 0).bool(),
        "audio_labels": padded([s.audio_labels for s in samples], IGNORED),
    }


def packed_inputs(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """One row for transformers: the first label of a sample is masked, lest the sample before it predicts it."""

    def row(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).long()[None]

    labels = [np.concatenate([[IGNORED], s.labels[1:]]) for s in samples]
    return {
        "input_ids": row([s.input_ids for s in samples]),
        "position_ids": row([np.arange(len(s)) for s in samples]),
        "labels": row(labels),
        "audio_input_ids": row([s.audio_ids for s in samples]),
        "audio_input_ids_mask": torch.ones(1, sum(len(s.audio_ids) for s in samples), dtype=torch.bool),
        "audio_labels": row([s.audio_labels for s in samples]),
    }


@dataclass
class Contender:
    model: torch.nn.Module
    loss: Callable[[], torch.Tensor]

    def run(self) -> torch.Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        gc.collect()


def make_contenders(native, packed, samples: list[Sample], device: torch.device) -> dict[str, Contender]:
    def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    padded, row = on_device(padded_inputs(samples, native.config)), on_device(packed_inputs(samples))
    batch = pack(samples, native.config.audio_token_id).to(device)
    # transformers' loss: the mean over text targets and, for each codebook, over its targets, all nine added up
    text_weight = torch.tensor([1 / sum(s.text_targets for s in samples)], device=device)
    audio_targets = torch.from_numpy(sum(s.audio_targets for s in samples))
    codebook_weights = (1 / audio_targets).float().to(device)
    return {
        "native_padded": Contender(native, lambda: native(**padded, use_cache=False).loss),
        "native_packed": Contender(native, lambda: native(**row, use_cache=False).loss),
        "packed": Contender(packed, lambda: packed(batch, text_weight, codebook_weights)[0]),
    }


def check(contenders: dict[str, Contender], dtype: str) -> dict:
    """Losses and gradients of all against the first; also everyone's warm-up.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    losses, differences, wanted = {}, {}, None
    for name, contender in contenders.items():
        losses[name] = float(contender.run())
        gradients = [p.grad for p in contender.model.parameters()]
        wanted = wanted or gradients
        norm = math.sqrt(sum(float(w.float().square().sum()) for w in wanted))
        squares = sum(float((g.float() - w.float()).square().sum()) for g, w in zip(gradients, wanted, strict=True))
        differences[name] = math.sqrt(squares) / norm
        del gradients
        contender.clear()
    reference = losses["native_padded"]
    loss_limit, gradient_limit = TOLERANCES[dtype]
    for name, loss in losses.items():
        # written so that NaN fails
        if not (abs(loss - reference) <= loss_limit * abs(reference) and differences[name] <= gradient_limit):
            raise SystemExit(f"{name} is another function: losses {losses}, gradients differ by {differences}")
    return {"losses": losses, "gradient_differences": differences, "passed": True}


class PeakMemory:
    """Bytes that a run adds at its peak: allocated on a GPU, resident (Linux only) on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif os.path.exists("/proc/self/clear_refs"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
            self.before = self._resident("VmRSS")

    def added(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return self._resident("VmHWM") - self.before if hasattr(self, "before") else None

    @staticmethod
    def _resident(key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def measure(contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, dict]:
    """Seconds and peak memory of each, in turns, each time another one first."""
    names = list(contenders)
    seconds, memory = {name: [] for name in names}, {name: [] for name in names}
    peak = PeakMemory(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait()
            peak.start()
            start = time.perf_counter()
            contenders[name].run()
            wait()
            seconds[name].append(time.perf_counter() - start)
            memory[name].append(peak.added())
            contenders[name].clear()
    return {
        name: {
            "seconds": [round(s, 4) for s in seconds[name]],
            "median_seconds": statistics.median(seconds[name]),
            "peak_memory_added_bytes": None if None in memory[name] else max(memory[name]),
        }
        for name in names
    }


def hardware(device: torch.device) -> dict:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    file = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    name = models[0] if models else platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def print_table(report: dict) -> None:
    data, first = report["samples"], next(iter(report["results"].values()))
    print(
        f"\n{report['hardware']['device']}, {report['settings']['dtype']}, packed attention {report['attention']}, "
        f"{report['parameters'] / 1e6:,.0f} M parameters\n{data['count']} samples, {data['tokens']:,} tokens "
        f"({data['audio_tokens']:,} audio), padded {data['padded_tokens']:,} "
        f"({1 - data['tokens'] / data['padded_tokens']:.0%} padding)\n"
    )
    print("| forward + backward | tokens/s | ratio | median s (min – max) | adds at peak, MiB | MFU |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, result in report["results"].items():
        seconds, memory, mfu = result["seconds"], result["peak_memory_added_bytes"], result["mfu"]
        print(
            f"| {TITLES[name]} | {result['tokens_per_second']:,.0f} "
            f"| {first['median_seconds'] / result['median_seconds']:.2f} "
            f"| {result['median_seconds']:.3g} ({min(seconds):.3g} – {max(seconds):.3g}) "
            f"| {'–' if memory is None else f'{memory / 2**20:,.0f}'} | {'–' if mfu is None else f'{mfu:.1%}'} |"
        )


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    config = transformers.HiggsAudioV2Config(
        hidden_size=args.hidden_size, intermediate_size=args.intermediate_size, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim, codebook_size=1026,
    )  # fmt: skip
    samples = make_samples(args, config)
    native, packed = make_models(args, config, device)
    contenders = make_contenders(native, packed, samples, device)
    checked = check(contenders, args.dtype)
    results = measure(contenders, args.repeats, device)

    lengths = [len(s) for s in samples]
    audio_rows = sum(int((s.audio_labels != IGNORED).any(1).sum()) for s in samples)
    flops = step_flops(config, lengths, sum(s.text_targets for s in samples), audio_rows)
    machine = hardware(device)
    peak = peak_flops(machine["device"]) if args.dtype == "bf16" else None
    for result in results.values():
        result["tokens_per_second"] = sum(lengths) / result["median_seconds"]
        result["mfu"] = flops / result["median_seconds"] / peak if peak else None
    report = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": machine,
        "versions": {
            "engine": engine.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "attention": next(n for n, function in attention.IMPLEMENTATIONS.items() if function is packed.attend),
        "parameters": Parameters.of(config).total,
        "samples": {
            "count": len(samples), "lengths": lengths, "tokens": sum(lengths),
            "audio_tokens": sum(len(s.audio_ids) for s in samples), "padded_tokens": len(samples) * max(lengths),
        },
        "model_flops": flops,
        "check": checked,
        "results": results,
    }  # fmt: skip
    print_table(report)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower().replace("(r)", "")).strip("-")
    folder = Path(__file__).parent / "results"
    out = args.out or folder / f"packed_forward_{slug}_{report['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
